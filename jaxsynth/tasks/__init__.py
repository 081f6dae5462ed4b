"""Tasks: what each kind of training optimizes, as a loss and a batch."""
