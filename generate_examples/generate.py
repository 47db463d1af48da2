"""Runs `lumina-mgpt generate` under its released name."""

import sys

from lumina_mgpt.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
