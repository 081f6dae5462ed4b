"""Each robustness metric's formula, once."""
