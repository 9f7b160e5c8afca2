"""Scores of a checkpoint on lm-eval's tasks: `python deepy.py eval.py CONFIG...`, or `python eval.py CONFIG...` for one process."""

import sys

from megatron.launch.worker import worker_config


def main() -> int:
    """The exit status; 2, and a sentence, where the input is wrong."""
    config = worker_config()  # before torch: it completes the environment
    from megatron.inference.tasks import evaluate

    try:
        evaluate(config)
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
