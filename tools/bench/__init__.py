"""Benchmarks: attention alone (`attention`, `cores`), the whole training step (`train_step`, `profile_step`), growth with the length (`growth`), and
the data loader (`loader`), each run as `python -m tools.bench.NAME`."""
