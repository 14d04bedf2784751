"""Inference: token ids in, token ids out. Nothing here knows text."""
