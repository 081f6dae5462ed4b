"""PyTorch's own files, read without running what they hold."""
