"""What every command shares: errors of one line, and progress."""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm


class UserError(Exception):
    """A person's mistake, told in one line: the file, the place in it, what was found and what is wanted."""


def cli(main: Callable[[], None]) -> None:
    """Run a command's main: a UserError is one line on stderr and exit status 2; Ctrl-C is exit status 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class CommandParser(argparse.ArgumentParser):
    """The parser of `gptchat COMMAND`: its help ends with an example, and wrong use is a UserError, one line."""

    def __init__(self, command: str, description: str, example: str, **options: Any):
        super().__init__(
            prog=f"gptchat {command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists what there is")


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a plain line every `seconds`. Use as a context manager."""

    def __init__(
        self, total: float | None, desc: str, unit: str, initial: float = 0, seconds: float = 10
    ):
        terminal = sys.stderr.isatty()
        self.interval = 0.2 if terminal else seconds
        self.terminal, self.last = terminal, time.monotonic()
        self.figures: dict[str, str] = {}  # told behind the rate
        self.bar = tqdm(
            total=total,
            desc=desc,
            unit=unit,
            initial=initial,
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=self.interval,
            file=sys.stderr if terminal else _Silent(),
        )

    def update(self, n: float = 1) -> None:
        self.bar.n += n
        now = time.monotonic()
        if now - self.last >= self.interval:
            self.last = now
            self.show()

    def show(self) -> None:
        self.bar.set_postfix(self.figures, refresh=False)
        if self.terminal:
            self.bar.refresh()
        else:
            print(str(self.bar), file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if self.terminal:
            self.bar.clear()
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.show()
        self.bar.close()


class _Silent:
    def write(self, text: str) -> None: ...
    def flush(self) -> None: ...
