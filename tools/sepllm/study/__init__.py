"""The attention patterns of the paper beside one another on one small model (`python -m tools.sepllm.study`)."""
