"""What all commands share: errors of one line, the command-line parser, and progress bars.

Invariants: a user's mistake is a `UserError`, which `cli` turns into one line on stderr and exit
status 2. Work that went wrong by itself is a `RunFailed`: one line too, exit status 1. What other
exceptions `cli` knows is written there; the rest are bugs of ours and keep their traceback. Nothing
here imports torch.
"""

import argparse
import contextlib
import errno
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm


class UserError(Exception):
    """A user's mistake. The message is one line: where it is, what was found, what is wanted."""


class RunFailed(Exception):
    """Work that went wrong by itself. One line: where, what was found, what is kept, what to do."""


def cli(main: Callable[[], None]) -> None:
    """Run a command's `main`.

    UserError, or an OSError that names a file: one line, exit status 2. RunFailed, or a disk that
    is full or fails: one line, exit status 1. Ctrl-C: exit status 130. A reader of the output that
    has left, as `head` does: no line, exit status 141, the shell's for SIGPIPE.
    What stdout cannot encode, such as file names that are not UTF-8, is printed as escapes.
    """
    open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        fail(2, str(error))
    except RunFailed as error:
        fail(1, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and has_lost_reader():
            sys.exit(128 + signal.SIGPIPE)
        elif error.filename is not None:
            fail(2, f"{error.filename}: {error.strerror}")
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            fail(1, f"output cannot be written: {error.strerror}")
        raise
    finally:
        discard_what_cannot_be_printed()


def fail(status: int, message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def open_closed_streams() -> None:
    """Open the standard streams that this process was started without, on /dev/null.

    Their descriptors would go to the next files that are opened.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def has_lost_reader() -> bool:
    """Whether the reader of stdout or stderr has left."""
    streams = select.poll()
    streams.register(sys.stdout, 0)  # 0: errors only
    streams.register(sys.stderr, 0)
    return bool(streams.poll(0))


def discard_what_cannot_be_printed() -> None:
    """Send what is left to print to nowhere, if the terminal is closed or the pipe's reader gone.

    Python would end with status 120 in place of the command's if it cannot print that at the end.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class CommandParser(argparse.ArgumentParser):
    """The parser of `gptchat COMMAND`: its help ends with an example; bad usage is a UserError."""

    def __init__(self, command: str, description: str, example: str, **options: Any):
        options.setdefault("prog", f"gptchat {command}")  # `add_subparsers` passes its own
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def print_help(self, file: Any = None) -> None:
        # argparse's own says nothing if this fails.
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


class Progress:
    """A progress bar with rate and time left; use it as a context manager.

    On a terminal the bar is redrawn in place. Elsewhere (a log file) it is printed as a plain line
    every `seconds`. `figures` are shown behind the rate. What cannot be printed, because the
    terminal is closed or the pipe's reader has ended, is left out: the work goes on.
    """

    def __init__(
        self, total: float | None, desc: str, unit: str, initial: float = 0, seconds: float = 10
    ):
        self.terminal = sys.stderr.isatty()
        self.interval = 0.2 if self.terminal else seconds
        self.last_shown = time.monotonic()
        self.figures: dict[str, str] = {}
        self.bar = tqdm(
            total=total,
            desc=desc,
            unit=unit,
            initial=initial,
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=self.interval,
            file=sys.stderr if self.terminal else _NullStream(),
        )

    def update(self, n: float = 1) -> None:
        self.bar.n += n
        now = time.monotonic()
        if now - self.last_shown >= self.interval:
            self.last_shown = now
            self.show()

    def show(self) -> None:
        self.bar.set_postfix(self.figures, refresh=False)
        if self.terminal:
            self.bar.refresh()  # tqdm passes over a closed terminal by itself
        else:
            self._print(str(self.bar))

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self.terminal:
            self.bar.clear()
        self._print(line)

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.show()
        self.bar.close()


class _NullStream:
    """Discards what tqdm prints: away from a terminal `Progress.show` prints instead."""

    def write(self, text: str) -> None: ...
    def flush(self) -> None: ...
