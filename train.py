"""Trains: `python deepy.py train.py your.yml`. Started once a device by deepy's launcher, by torchrun or srun, or alone."""

from __future__ import annotations

import sys

from megatron.launch.worker import worker_config


def main() -> None:
    config = worker_config(sys.argv[1:])

    from megatron.training.trainer import train  # torch comes after the environment that worker_config completes

    train(config)


if __name__ == "__main__":
    main()
