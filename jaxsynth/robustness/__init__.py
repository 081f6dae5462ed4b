"""Robustness of classifiers: attacks, corruptions, biases, calibration, OOD detection."""
