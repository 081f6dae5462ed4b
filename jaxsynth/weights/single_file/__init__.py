"""Whole Stable Diffusions in one file, in the original code's names."""
