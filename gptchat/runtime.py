"""Settings of the process that hold for all commands: the allocator and Python's collector."""

import ctypes
import gc


def settle() -> None:
    """For a process that has loaded all it needs: Python's collector passes over what there is (its walks through all
    of torch cost a decoding step 6 %), and glibc keeps what is freed. Else every large tensor goes back to the kernel,
    to be faulted in again, which doubles a training step. Constants: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD."""
    gc.collect()
    gc.freeze()
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
        mallopt(parameter, value)
