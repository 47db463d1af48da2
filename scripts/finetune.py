"""Released name of `lumina-mgpt finetune`: trains a model."""

import sys

from lumina_mgpt.cli.finetune import main

if __name__ == "__main__":
    sys.exit(main())
