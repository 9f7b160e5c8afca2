"""Looking at what SepLLM does: its separators, how many a text has, what they save, and what they draw."""
