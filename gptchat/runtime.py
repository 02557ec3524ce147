"""Process settings that commands share: garbage collector, allocator, signals, parent process, and
what a hanging process can be asked."""

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import FrameType

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
PR_SET_PDEATHSIG = 1  # of Linux's prctl (linux/prctl.h)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_REPEAT = 1.0  # from a stop signal to the next of its kind that counts

_actions: dict[int, Callable[[int], None]] = {}  # of `_act_on_signals`, by the signal's number


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

    It works while the main thread is stuck in C code, unless that holds Python's lock. (The module
    faulthandler needs no lock, but it reads the frames of threads that run meanwhile: it crashed
    three of four trainings within 32 to 97 signals.) Without SIGUSR1 (Windows) nothing is set.
    """
    if not hasattr(signal, "SIGUSR1"):
        return
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.siginterrupt(signal.SIGUSR1, False)  # C code that waits in a system call goes on waiting
    # In one more thread: nobody might read what it prints, which must not delay a stop signal.
    _act_on_signals(
        (signal.SIGUSR1,),
        lambda number: threading.Thread(target=_print_threads, daemon=True).start(),
    )


def _print_threads() -> None:
    """Print the stacks of all threads but this one to stderr."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            lines.append(f"Thread {names.get(ident, ident)} (most recent call last):\n")
            lines += traceback.format_stack(frame)
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print("".join(lines), file=sys.stderr, flush=True)


def handle_stop_signals(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers,
) -> None:
    """Set the handler of SIGINT, SIGTERM and SIGHUP.

    SIGINT is handled even if it was ignored from the start, as a shell ignores it for what it
    starts in the background. A SIGHUP that was ignored (nohup) stays so.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def on_stop_signals(stop: Callable[[], None]) -> None:
    """From now on SIGINT, SIGTERM and SIGHUP call `stop`, in a thread of their own.

    One that comes SECONDS_TO_REPEAT or more after the first of its kind ends the process at once,
    with exit status 128 + its number. What comes sooner asks for the same again, since signals come
    in bursts: Ctrl-C from the terminal and from torchrun, that of `end_with_parent` once for each
    thread of a parent that is killed.
    """
    first_times: dict[int, float] = {}

    def act(number: int) -> None:
        stop()
        now = time.monotonic()
        if now - first_times.setdefault(number, now) >= SECONDS_TO_REPEAT:
            os._exit(128 + number)

    handle_stop_signals(lambda number, frame: None)
    _act_on_signals(STOP_SIGNALS, act)


def _act_on_signals(numbers: Iterable[int], action: Callable[[int], None]) -> None:
    """From now on each such signal calls `action`, with its number, in a thread for all signals.

    The signals need handlers, which may do nothing. Python runs handlers between two bytecodes of
    the main thread only, which may be stuck in a sum over processes that never ends; but the C code
    below them writes the number into a pipe at once.
    """
    if not _actions:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch_signals, args=(reader,), daemon=True).start()
    _actions.update(dict.fromkeys(numbers, action))


def _watch_signals(reader: int) -> None:
    """Act on the numbers of signals, a byte each, that are read from a pipe."""
    while True:
        (number,) = os.read(reader, 1)
        action = _actions.get(number)
        if action:
            action(number)


def end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it ends, even if that was killed.

    It may come several times: Linux sends it when a thread of the parent ends, and leaves the child
    to another thread, until none is left. Elsewhere than on Linux this does nothing.
    """
    try:
        prctl = ctypes.CDLL("libc.so.6").prctl
    except (OSError, AttributeError):
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
