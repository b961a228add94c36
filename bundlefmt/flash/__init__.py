"""The method of "LLM in a flash" (arXiv 2312.11514): what stays in DRAM, and what it costs."""
