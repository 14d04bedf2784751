"""Serving: a checkpoint behind the HTTP interfaces that clients already speak."""
