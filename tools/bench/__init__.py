"""Benchmarks: attention alone (`python -m tools.bench.attention`) and the whole training step (`python -m tools.bench.train_step`)."""
