"""Checkpoints into bundle files and back, and the proof that a file is whole."""
