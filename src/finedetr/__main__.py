"""`python -m finedetr`, which `torchrun -m finedetr` uses too."""

from __future__ import annotations

import sys

from finedetr.cli import main

if __name__ == "__main__":
    sys.exit(main())
