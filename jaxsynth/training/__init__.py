"""Training: stages, steps, the loop, sharding, checkpoints and what is printed about them."""
