"""`python -m inferflux` is the `inferflux` command (so that `torchrun -m inferflux` works)."""

import sys

from inferflux.cli import main

if __name__ == "__main__":
    sys.exit(main())
