"""Image classifiers and feature extractors."""
