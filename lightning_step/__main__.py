"""``python -m lightning_step`` is ``lightning-step``."""

import sys

from lightning_step.cli import main

if __name__ == "__main__":
    sys.exit(main())
