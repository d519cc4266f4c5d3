"""One thread per process: on busy machines two OpenMP threads are many times slower than one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; child processes inherit it
