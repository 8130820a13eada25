"""`python -m exaone_export`, the same as the `exaone-export` command."""

from __future__ import annotations

from exaone_export.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
