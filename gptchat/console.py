"""What all commands share: errors of one line, the command-line parser, and progress bars.

`cli` runs a command. A user's mistake is a `UserError`: one line on stderr, exit status 2. Work
that went wrong by itself is a `RunFailed`: one line, exit status 1. Bugs of ours keep their
traceback. Nothing here imports torch.
"""

import argparse
import contextlib
import errno
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tqdm import tqdm


class UserError(Exception):
    """A user's mistake. The message is one line: where it is, what was found, what is wanted."""


class RunFailed(Exception):
    """Work that went wrong by itself. One line: where, what was found, what is kept, what to do."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its kind if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def cli(main: Callable[[], None]) -> None:
    """Run a command's `main`.

    An OSError that names a file is a user's mistake, too. Ctrl-C gives exit status 130; a reader of
    the output that has left, as `head` does, 141. What stdout cannot encode, such as file names
    that are not UTF-8, is printed as escapes.
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
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is not None:
            fail(2, f"{error.filename}: {error.strerror}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
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

    Otherwise the next files that are opened would get their descriptors.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def discard_what_cannot_be_printed() -> None:
    """Send what is left to print to /dev/null if the terminal is closed or the reader has left.

    Otherwise Python would fail to print it at the end, and exit with status 120.
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

    def parse_config_and_overrides(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The arguments of a command that takes a config: `config` and `overrides`."""
        self.add_argument("--config", required=True, metavar="FILE", help="TOML file")
        overrides_help = "used instead of the config's"
        self.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides_help)
        return self.parse_intermixed_args(argv)

    def print_help(self, file: Any = None) -> None:
        # argparse's own says nothing if this fails.
        print(self.format_help(), end="", file=file, flush=True)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


class Progress:
    """A line on stderr with progress, mean rate, time left and `figures`, a context manager.

    A terminal's line is redrawn in place; a log file gets a line every ten seconds. If stderr is
    closed, the work goes on.
    """

    def __init__(self, total: float | None, desc: str, unit: str, initial: float = 0):
        self.total = total
        self.desc = desc
        self.unit = unit
        self.initial = initial
        self.n = initial
        self.figures = ""
        self.is_terminal = sys.stderr.isatty()
        self.start = self.last_shown = time.monotonic()

    def update(self, n: float = 1) -> None:
        self.n += n
        seconds = 0.2 if self.is_terminal else 10
        if time.monotonic() - self.last_shown >= seconds:
            self.show()

    def show(self, end: str = "") -> None:
        self.last_shown = time.monotonic()
        line = tqdm.format_meter(
            self.n,
            self.total,
            self.last_shown - self.start,
            ncols=shutil.get_terminal_size().columns if self.is_terminal else None,
            prefix=self.desc,
            unit=self.unit,
            unit_scale=True,
            initial=self.initial,
            postfix=self.figures,
        )
        if self.is_terminal:
            self._print(f"\r\x1b[K{line}", end)
        else:
            self._print(line)

    def write(self, line: str) -> None:
        self._print(f"\r\x1b[K{line}" if self.is_terminal else line)

    def _print(self, text: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError):
            print(text, end=end, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.show(end="\n")
