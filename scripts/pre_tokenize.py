"""Released name of `lumina-mgpt pre-tokenize`: records to token shards."""

import sys

from lumina_mgpt.cli.pre_tokenize import main

if __name__ == "__main__":
    sys.exit(main())
