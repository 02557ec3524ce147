"""What commands share of process and machine: cores, device, allocator, signals, parent."""

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
PR_SET_PDEATHSIG = 1  # of Linux's prctl (linux/prctl.h)
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_TO_REPEAT = 1.0


def granted_cores() -> int:
    """The cores that this process may use; a machine can have more."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_device() -> str:
    """The GPU if there is one, else the CPU, as torch names it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_bfloat16(device: "torch.device | str") -> bool:
    """Whether a device has instructions for products in bfloat16, which make them faster.

    A GPU has them since Ampere, an x86 CPU with AVX512-BF16 or AMX. Others convert every number,
    which takes thirty times as long as float32 on a CPU with AVX2.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def tune_memory() -> None:
    """Make garbage collections and allocations cheaper, in a process that has loaded all it needs.

    Python's garbage collector no longer visits the objects that exist now (6 % of a decoding step).
    glibc keeps freed memory; giving large tensors back to the kernel doubles the time of a training
    step.
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


def handle_stop_signals(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers,
) -> None:
    """Set the handler of SIGINT, SIGTERM and SIGHUP.

    An ignored SIGHUP (nohup) stays ignored; an ignored SIGINT (a shell's background) does not.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def on_stop_signals(stop: Callable[[], None]) -> None:
    """From now on SIGINT, SIGTERM and SIGHUP call `stop`, in the main thread.

    One that comes SECONDS_TO_REPEAT or more after the first of its kind ends the process at once,
    with exit status 128 + its number. Sooner ones belong to the first: Ctrl-C, for example, comes
    from the terminal and from torchrun.
    """
    first_times: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        stop()
        now = time.monotonic()
        if now - first_times.setdefault(number, now) >= SECONDS_TO_REPEAT:
            os._exit(128 + number)

    handle_stop_signals(handle)


def end_with_parent() -> None:
    """Have Linux send this process SIGTERM when its parent ends, even if that is killed.

    It may come several times: when each of the parent's threads ends.
    """
    try:
        prctl = ctypes.CDLL("libc.so.6").prctl
    except (OSError, AttributeError):
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
