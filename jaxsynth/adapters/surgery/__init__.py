"""Changes of a network that are no low-rank update: rows, inputs, padding."""
