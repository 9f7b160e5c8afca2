"""`make demo`: the whole way once, on text that comes with the requirements."""
