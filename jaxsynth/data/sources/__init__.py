"""Where images come from: folders, TFDS, arrays."""
