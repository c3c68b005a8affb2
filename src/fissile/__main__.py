"""`python -m fissile` is the `fissile` command."""

from __future__ import annotations

from fissile.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
