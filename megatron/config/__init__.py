"""YAML configuration: flat GPT-NeoX and SepLLM keys in, typed frozen groups out."""
