"""What a Flex Template's launcher starts: one of the commands, which makes a job and ends."""

import os
import sys

from pipelines import flex_template

if __name__ == "__main__":
    sys.exit(flex_template.launch(os.environ, sys.argv[1:]))
