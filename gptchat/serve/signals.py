"""How `gptchat serve` is told to stop: Ctrl-C, SIGTERM and SIGHUP all raise KeyboardInterrupt."""

import contextlib
import signal
from collections.abc import Iterator


def handle_stop_signals(handler: object) -> None:
    """Set the handler of all three. A SIGHUP that is ignored from the start (`nohup`) stays so.

    SIGINT is among them because a shell starts background jobs with it ignored.
    """
    signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handler)  # type: ignore[arg-type]


def stop_on_signals() -> None:
    """From now on they raise KeyboardInterrupt."""
    handle_stop_signals(signal.default_int_handler)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """A signal that comes in this block raises KeyboardInterrupt at its end."""
    pending: list[int] = []
    handle_stop_signals(lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        stop_on_signals()
    if pending:
        raise KeyboardInterrupt


def ignore_stop_signals() -> None:
    """From now on they do nothing."""
    handle_stop_signals(signal.SIG_IGN)
