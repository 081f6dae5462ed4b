"""Procedurally drawn data sets."""
