"""The C library's allocator, told to keep what is freed: a training step asks for it again at once.

A step on a CPU makes the same few hundred tensors as the one before. glibc takes large ones from
the system and gives them back after every use, and the system zeroes each page before it hands it
out again: 20,000 page faults in a step of the smallest model. `docs/results.md` has figures.
GPUs need none of this: there PyTorch has an allocator of its own that keeps what is freed.
"""

import ctypes

# Of glibc's malloc.h: parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep what it frees for its next allocations, from now on; says whether the
    C library can be told so (glibc can).

    The memory that a process holds then stays at its peak.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # All from the heap, whatever its size, and the heap's end never given back.
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, LARGEST) == 1
