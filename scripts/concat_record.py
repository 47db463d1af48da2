"""Released name of `lumina-mgpt concat-records`: token shards to one record file."""

import sys

from lumina_mgpt.cli.concat_records import main

if __name__ == "__main__":
    sys.exit(main())
