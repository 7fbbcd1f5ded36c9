"""Benchmarks: variants side by side in one run, results as JSON. `python -m bench --help`."""

import os

# torch's profiler, which counts memory here, logs every start and stop; read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
