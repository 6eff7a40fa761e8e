"""`python -m ftops` is the command `ftops`."""
import sys

from ftops.cli import main

sys.exit(main())
