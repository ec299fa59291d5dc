"""Dense, ASP, SR-STE, STEP and the default on the demo task: equal steps, each at its own best rate and lam, three seeds.

``python examples/benchmarks/compare.py`` is ``bench.py compare``, and takes the same arguments: a grid on seed 0, the two
best settings of each row on the other seeds, then one thing at a time changed in STEP at its 2:4 setting. It is a part of
the benchmark ``main``, with the same results in ``results/main``; what is there is not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import main

RESULTS = Path(__file__).parent / "results" / "main"

if __name__ == "__main__":
    main(["compare", "--out", str(RESULTS), *sys.argv[1:]])
