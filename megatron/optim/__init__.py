"""Parameter groups, optimizers and the learning rate."""
