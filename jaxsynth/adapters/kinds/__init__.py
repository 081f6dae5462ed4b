"""One module for each kind of adapter."""
