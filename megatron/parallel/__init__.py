"""Which device does what: the only package that speaks to torch.distributed."""
