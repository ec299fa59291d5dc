"""Dense, ASP, SR-STE and STEP on the demo task: equal steps, each at its own best rate and lam, three seeds, 2:4 and 1:8.

``python examples/benchmarks/compare.py`` is ``bench.py compare``, and takes the same arguments: a grid on seed 0, the two
best settings of each row on the other seeds, then one thing at a time changed in STEP at its 2:4 setting. About an hour on
two cores; what is in ``results/compare`` is not run again.
"""

from __future__ import annotations

import sys

from bench import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
