"""How `gptchat serve` is told to stop: Ctrl-C, SIGTERM and SIGHUP all raise KeyboardInterrupt."""

import contextlib
import signal
from collections.abc import Iterator

from gptchat.runtime import handle_stop_signals


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
