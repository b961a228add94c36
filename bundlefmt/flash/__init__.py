"""The paper's method: which neurons a token needs, and how few of them are read."""
