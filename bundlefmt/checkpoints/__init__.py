"""What a Hugging Face checkpoint looks like: its files, and the families' tensor names."""
