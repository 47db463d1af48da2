"""Released name of `lumina-mgpt generate`: pictures of prompts, and of pictures."""

import sys

from lumina_mgpt.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
