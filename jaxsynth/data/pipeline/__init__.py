"""Batches: decoding, augmentation, mixing."""
