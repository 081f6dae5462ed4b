"""Training of the shipped tiny base models."""
