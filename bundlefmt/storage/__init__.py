"""The operating system: devices, aligned memory, read backends, whole-file writes.

Knows offsets and buffers; knows nothing of neurons or models.
"""
