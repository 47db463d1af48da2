"""Runs `lumina-mgpt generate-with-image` under its released name."""

import sys

from lumina_mgpt.cli.generate_with_image import main

if __name__ == "__main__":
    sys.exit(main())
