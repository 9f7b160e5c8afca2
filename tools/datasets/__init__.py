"""Making token files."""
