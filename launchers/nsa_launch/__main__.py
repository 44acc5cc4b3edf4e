"""`python -m nsa_launch` is `nsa-dist`, for environments whose scripts are not on the path."""

import sys

from nsa_launch.cli import main

sys.exit(main())
