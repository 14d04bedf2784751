"""What `leadline chat` is made of."""
