"""The bytes on disk, free of I/O: bytes go in and values come out, and back."""
