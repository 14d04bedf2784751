"""Number formats: eight-bit and four-bit floats with power-of-two scales. Torch only, no kernels."""
