"""`python -m qpass`: the command line, where the script is not on the path."""

import sys

from qpass.cli import main

sys.exit(main())
