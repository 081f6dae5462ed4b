"""The published systems as compositions of the shared rooms."""
