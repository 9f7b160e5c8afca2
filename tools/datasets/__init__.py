"""Making token files, and looking into them."""
