"""python -m pbsattn.bench, the benchmarks until 0.2: names the new command, until 0.3."""

import sys

from .__main__ import moved

if __name__ == "__main__":
    sys.exit(moved("bench"))
