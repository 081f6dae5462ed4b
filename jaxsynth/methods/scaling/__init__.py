"""Scaling studies: what synthetic images are worth, by their number, prompts and mixtures."""
