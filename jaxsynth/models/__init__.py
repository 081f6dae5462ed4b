"""Networks in Flax NNX, named as their PyTorch originals."""
