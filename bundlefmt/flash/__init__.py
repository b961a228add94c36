"""The method of "LLM in a flash" (arXiv 2312.11514): which neurons a token needs, and which of them
stay in DRAM."""
