"""Denoised neural weights: a generator of LoRA initial weights from text."""
