"""Token files, packed samples, blends, batches and tokenizers. Reads what GPT-NeoX and Pythia wrote, in the same order, bit for bit."""
