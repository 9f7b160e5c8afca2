"""The GPT-NeoX model around `sepllm.attention`, written as if it ran on one device."""
