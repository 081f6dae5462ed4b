"""Common corruptions of images, 2D and 3D, in JAX."""
