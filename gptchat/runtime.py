"""Process settings that commands share: garbage collector, allocator, signals, parent process, and
what a hanging process can be asked."""

import contextlib
import ctypes
import faulthandler
import gc
import io
import signal

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
PR_SET_PDEATHSIG = 1  # of Linux's prctl (linux/prctl.h)


def tune_memory() -> None:
    """Make allocations and garbage collections cheaper, in a process that has loaded all it needs.

    Python's garbage collector no longer visits the objects that exist now; walking through all of
    torch's cost a decoding step 6 %. glibc keeps the memory that is freed: otherwise every large
    tensor goes back to the kernel and is faulted in again, which doubles the time of a training
    step. Without glibc that part does nothing.
    """
    gc.collect()
    gc.freeze()
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 2**28)


def dump_threads_on_signal() -> None:
    """Let SIGUSR1 print the stacks of all threads to stderr; the process goes on.

    It works while a thread is stuck in C code. Without SIGUSR1 (Windows), or without a stderr that
    is a file, nothing is set.
    """
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it ends, even if that was killed.

    Elsewhere than on Linux this does nothing.
    """
    try:
        prctl = ctypes.CDLL("libc.so.6").prctl
    except (OSError, AttributeError):
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
