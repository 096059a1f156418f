"""Measure side by side: tools/benchmark.py NAME [key=value ...], the same as python -m tools.benchmarks NAME ..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # where `tools` lies

from ssl_vit import errors
from tools.benchmarks.__main__ import main

if __name__ == "__main__":
    sys.exit(errors.run_main(main))
