"""Talk to a model in the terminal, streaming; or answer one prompt, or a file of them.

    python -m gptchat.chat --model out/chatlm/model [--temperature 0.7] [--pick median] ...
    python -m gptchat.chat --model DIR --prompt TEXT
    python -m gptchat.chat --model DIR --input prompts.tsv --output answers.tsv

A ChatLM keeps the turns, the oldest leaving when the context is full; an LM goes on with each text by itself. A row of
--input is a dialogue, its last column what is to be answered; --output has the answer behind it, as training data has.
An answer depends on its dialogue, the settings and the seed, not on the rows beside it.
"""

import argparse
import os
import random
import re
import readline  # line editing and history for input()
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from gptchat.console import Progress, UserError, cli
from gptchat.data.dialogue import alternate, format_row, read_rows
from gptchat.files import atomic_write
from gptchat.inference.engine import Request
from gptchat.inference.generate import (
    CANDIDATES,
    CHAT_SAMPLING,
    SLOTS,
    TextGenerator,
    load_generator,
)
from gptchat.inference.linear import DTYPES
from gptchat.inference.sampling import SETTINGS, Sampling
from gptchat.inference.text import WordFilter
from gptchat.runtime import tune_memory

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey
HELP = """/set             the settings
/set NAME VALUE  change one, such as: /set temperature 0.7
/reset           forget the conversation
/quit            leave, as Ctrl-D does; Ctrl-C ends an answer"""


class Parser(argparse.ArgumentParser):
    """Tells a wrong option in one line, like all wrong use."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def settings_parser() -> Parser:
    """How answers are drawn: options of the command line and names of /set."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    for name, declared in SETTINGS.items():
        default = getattr(CHAT_SAMPLING, name)
        add(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"{declared.metadata['help']} (default %(default)s)",
        )
    add(
        "--seed",
        type=int,
        default=-1,
        help="gives the same answer again; -1: another one each time (default)",
    )
    add("--forbid", action="append", default=[], metavar="WORD", help="never said; may be repeated")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends an answer, unsaid; may be repeated",
    )
    add(
        "--pick",
        choices=("first", "median"),
        default="first",
        help=f"median: of {CANDIDATES} answers the one of median length, which does not stream",
    )
    return parser


def make_sampling(generator: TextGenerator, settings: argparse.Namespace) -> Sampling:
    """The settings as the engine takes them. Raises UserError for one that is out of its range."""
    numbers = {name: getattr(settings, name) for name in SETTINGS}
    seed = random.getrandbits(63) if settings.seed < 0 else settings.seed
    words = [word for word in settings.forbid if word]
    word_filter = WordFilter(generator.tokenizer, words) if words else None
    try:
        return Sampling(**numbers, seed=seed, word_filter=word_filter)
    except ValueError as error:
        raise UserError(str(error)) from None


def make_request(
    generator: TextGenerator, turns: Sequence[tuple[int, str]], settings: argparse.Namespace
) -> Request:
    """What is to be answered. Raises UserError for a last turn that is too long."""
    encode = generator.tokenizer.encode
    encoded = [(speaker, encode(text.encode(errors="replace").decode())) for speaker, text in turns]
    n = CANDIDATES if settings.pick == "median" else 1
    return generator.request(encoded, make_sampling(generator, settings), n)


def stop_strings(settings: argparse.Namespace) -> list[str]:
    return [text for text in settings.stop if text]


class Conversation:
    """The chat in a terminal: lines in, commands obeyed, messages answered."""

    def __init__(self, generator: TextGenerator, settings: argparse.Namespace, colour: bool):
        self.generator, self.settings, self.turns = generator, settings, list[tuple[int, str]]()
        paint = "\x1b[1;36m{}\x1b[0m " if colour else "{} "
        self.label, self.prompt = (
            (paint.format("bot>"), paint.format("you>")) if sys.stdin.isatty() else ("", "")
        )
        self.prompt = re.sub(
            "(\x1b.*?m)", "\x01\\1\x02", self.prompt
        )  # so readline knows that it takes no room

    def run(self) -> None:
        """Until Ctrl-D, /quit, or Ctrl-C twice in a row at the prompt."""
        hinted = False
        while True:
            try:
                line = input(self.prompt).strip()
                hinted = False
                if line == "/quit":
                    return
                self.obey(*line.split(maxsplit=2)) if line.startswith("/") else self.reply(line)
            except UserError as error:
                print(f"error: {error}")
            except EOFError:
                return print()
            except KeyboardInterrupt:
                if hinted:
                    return print()
                hinted = True
                print("\n(Ctrl-C again, or Ctrl-D, leaves)")

    def obey(self, command: str, name: str = "", value: str = "") -> None:
        """Carry out a command. Raises UserError for one that there is not."""
        if command == "/reset":
            self.turns = []
        elif command == "/set" and name:
            changed = argparse.Namespace(**vars(self.settings))
            if name in ("forbid", "stop"):
                setattr(changed, name, [])
            settings_parser().parse_args([f"--{name.replace('_', '-')}={value}"], changed)
            make_sampling(self.generator, changed)
            self.settings = changed
        elif command in ("/set", "/help"):
            print(
                HELP
                if command == "/help"
                else "\n".join(f"{k} {v}" for k, v in vars(self.settings).items())
            )
        else:
            raise UserError(f"{command}: no such command; /help lists them")

    def reply(self, message: str) -> None:
        """Stream the answer; Ctrl-C ends it, and what was said by then is the turn."""
        if not message and self.generator.task == "chatlm":
            return
        turns, text = [*self.turns, (0, message)], ""
        request = make_request(self.generator, turns, self.settings)
        print(self.label, end="", flush=True)
        pressed: list[int] = []  # Ctrl-C is only noted, so that no step of the engine is torn
        before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
        with closing(self.generator.stream([request], stop_strings(self.settings))) as pieces:
            while not pressed and (answered := next(pieces, None)):
                say(answered.text)
                text += answered.text
        signal.signal(signal.SIGINT, before)
        print()
        if text and self.generator.task == "chatlm":
            self.turns = [*turns, (1, text)]


def say(piece: str) -> None:
    """Print it at once; on a terminal without what that would obey."""
    print(CONTROL.sub("\ufffd", piece) if sys.stdout.isatty() else piece, end="", flush=True)


def answer_file(
    generator: TextGenerator, settings: argparse.Namespace, source: str, output: str
) -> None:
    """Write each row of a file and its answer as a row of `output`. Raises UserError with file and row."""
    if not Path(source).is_file():
        raise UserError(
            f"{source}: found no such file; wanted dialogues, a row each, their turns divided by tabs"
        )
    rows, requests = list(read_rows(source, 1)), list[Request]()
    for number, row in enumerate(rows, 1):
        try:
            requests.append(make_request(generator, alternate(row, last_speaker=0), settings))
        except UserError as error:
            raise UserError(f"{source}: row {number}: {error}") from None
    texts = [""] * len(rows)
    with atomic_write(Path(output)) as temporary, Progress(len(rows), "answers", "row") as bar:
        for piece in generator.stream(requests, stop_strings(settings)):
            texts[piece.index] += piece.text
            bar.update(piece.last)
        lines = [format_row([*row, text]) for row, text in zip(rows, texts, strict=True)]
        temporary.write_text("".join(lines), encoding="utf-8")


def chat(
    generator: TextGenerator, settings: argparse.Namespace, directory: str, colour: bool
) -> None:
    """Talk in the terminal (or from a pipe, a line each); the lines typed are kept beside the model directory."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not sys.stdin.isatty():
        return Conversation(generator, settings, colour=False).run()
    history = Path(directory).resolve().parent / "chat_history"
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    print(
        f"{directory}: {generator.task}, {generator.n_parameters:,} parameters. /help lists the commands."
    )
    try:
        Conversation(generator, settings, colour).run()
    finally:
        with suppress(OSError):
            readline.write_history_file(history)


def main(argv: Sequence[str] | None = None) -> None:
    settings = settings_parser()
    parser = Parser(
        prog="python -m gptchat.chat", parents=[settings], description="Talk to a model."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model directory, such as out/chatlm/model")
    add("--prompt", metavar="TEXT", help="answer this and leave")
    add("--input", metavar="TSV", help="answer each row: a dialogue, or just a line")
    add("--output", metavar="TSV", help="where the rows of --input and their answers go")
    add(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the weights (auto: bfloat16 if fast here)",
    )
    add("--no-color", action="store_true", help="so does the environment variable NO_COLOR")
    args = parser.parse_args(argv)
    chosen = argparse.Namespace(
        **{name: getattr(args, name) for name in vars(settings.parse_args([]))}
    )
    if (args.input is None) != (args.output is None) or (args.input and args.prompt is not None):
        raise UserError("wanted --input and --output together, and no --prompt with them")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    generator = load_generator(args.model, SLOTS if args.input else CANDIDATES, args.dtype)
    tune_memory()
    make_sampling(generator, chosen)
    if args.input:
        answer_file(generator, chosen, args.input, args.output)
    elif args.prompt is not None:
        requests = [make_request(generator, [(0, args.prompt)], chosen)]
        for piece in generator.stream(requests, stop_strings(chosen)):
            say(piece.text)
        print()
    else:
        colour = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
        chat(generator, chosen, args.model, colour)


if __name__ == "__main__":
    cli(main)
