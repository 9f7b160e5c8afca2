"""Training: the loop around the DeepSpeed engine, checkpoints, evaluation and what is reported."""
