"""`python -m jaxsynth`: the command where its script is not on the path."""

import sys

from jaxsynth.cli.main import main

sys.exit(main())
