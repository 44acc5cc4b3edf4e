"""The kernels' benchmark, `nsa_kernels.bench`: python kernels/bench/run.py --out DIR, or --help."""

import sys

from nsa_kernels.bench.run import main

if __name__ == "__main__":  # compiling starts processes that import this file
    sys.exit(main())
