"""`python -m anyfit` and the command `anyfit`."""

from __future__ import annotations

from anyfit.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
