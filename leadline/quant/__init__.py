"""Which tensor gets which number format, in a finished model and in training."""
