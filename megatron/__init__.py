"""The pretraining framework around `sepllm`: YAML configuration, DeepSpeed engine, checkpoints."""
