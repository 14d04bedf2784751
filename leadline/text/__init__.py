"""Text and token ids: the tokenizer, and the chat format in both directions. Imports nothing else of leadline."""
