"""Makes `python -m lumina_mgpt.cli COMMAND` do the same as `lumina-mgpt COMMAND`."""

import sys

from lumina_mgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
