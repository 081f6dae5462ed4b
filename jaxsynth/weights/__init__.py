"""Weights: files of other libraries, read and written without running anything from them."""
