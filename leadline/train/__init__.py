"""Pretraining: a script that reads from the top, and its named steps."""
