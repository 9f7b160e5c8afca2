"""Text out of a trained model, and scores of it: the work behind generate.py and eval.py."""
