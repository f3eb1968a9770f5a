"""Tests. This process computes in one thread: two tests run at a time, and OpenMP threads that outnumber cores spin."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported
