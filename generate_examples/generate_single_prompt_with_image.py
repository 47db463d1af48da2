"""Released name of `lumina-mgpt generate-with-image`: a picture of one prompt and a control picture."""

import sys

from lumina_mgpt.cli.generate_with_image import main

if __name__ == "__main__":
    sys.exit(main())
