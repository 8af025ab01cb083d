"""Runs the command line: `python -m tw_jax VERB CONFIG.gin` is `tw VERB CONFIG.gin`."""

import sys

from tw_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
