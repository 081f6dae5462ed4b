"""The robustness benchmark of synthetic clones."""
