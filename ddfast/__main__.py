"""`python -m ddfast COMMAND`."""

import sys

from ddfast.cli import main

sys.exit(main())
