"""Make, adapt and judge synthetic training data in JAX."""

__version__ = "0.1.0"
