"""Tests of both packages.

One thread for each process's linear algebra: tests compute on small arrays and several processes share the CPUs, where
OpenMP's threads would wait for one another busily. Set before NumPy and torch are loaded, which read it then.
"""

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
