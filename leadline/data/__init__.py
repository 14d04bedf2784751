"""Corpora to segments: documents (corpus), token files (shards), bins (pack), batches (loader)."""
