"""Start a script on every device: `python deepy.py train.py CONFIG...`; `--check` prints the plan, `--help` the rest."""

import sys

from megatron.launch.main import main

if __name__ == "__main__":
    sys.exit(main())
