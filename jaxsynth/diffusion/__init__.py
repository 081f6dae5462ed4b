"""Diffusion: noise schedules, samplers, guidance, losses, learned variances."""
