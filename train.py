"""Trains: `python deepy.py train.py your.yml`. Started once a device by deepy's launcher, by torchrun or srun, or alone."""

import sys

from megatron.launch.worker import worker_config


def main() -> int:
    """The exit status; 2, and a sentence, where the input is wrong."""
    config = worker_config()  # before torch: it completes the environment
    from megatron.parallel.mesh import end_communication
    from megatron.training.trainer import CannotStart, train

    try:
        train(config)
    except CannotStart as mistake:
        print(mistake, file=sys.stderr)
        return 2
    end_communication()
    return 0


if __name__ == "__main__":
    sys.exit(main())
