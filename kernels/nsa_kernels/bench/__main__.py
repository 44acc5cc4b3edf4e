"""`python -m nsa_kernels.bench`."""

import sys

from nsa_kernels.bench.run import main

sys.exit(main())
