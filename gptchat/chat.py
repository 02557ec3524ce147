"""Talk to a model in the terminal, or answer one prompt, or a file of dialogues.

    gptchat chat --model out/chatlm/model [--temperature 0.7] [--pick median] ...
    gptchat chat --model DIR --prompt TEXT
    gptchat chat --model DIR --input prompts.tsv --output answers.tsv

Every setting is an option and a name of /set. The default is the model's own
(generation_config.json).

In the terminal an answer streams, unless it is picked among several. A ChatLM keeps the turns of
the conversation, and drops the oldest ones when the context is full. An LM continues each line by
itself. Ctrl-C ends an answer; what was said by then is kept as the turn. If stdin is not a
terminal, its lines are answered in the same way.

--output holds each dialogue of --input (`data/dialogue_files.py`; for an LM, lines of text) with
its answer, as in training data. If a last turn, or an LM's text, is too long by itself, its front
is left out. An answer does not depend on the other dialogues, but for the rounding that
`inference.engine` describes.
"""

import argparse
import copy
import glob
import re
import readline  # noqa: F401 -- gives input() line editing
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

from gptchat.config import load_config
from gptchat.console import CommandParser, Progress, UserError, cli
from gptchat.data.dialogue import TextTurn, Turn
from gptchat.data.dialogue_files import format_named, format_of, read_prompts
from gptchat.data.reading import to_bytes
from gptchat.files import atomic_write, expand
from gptchat.inference.engine import Request
from gptchat.inference.generate import SLOTS, Piece, TextGenerator, load_generator
from gptchat.inference.linear import DTYPES
from gptchat.inference.pick import CANDIDATES, PICKS
from gptchat.inference.sampling import SETTINGS, Sampling, chosen_seed
from gptchat.inference.text import WordFilter
from gptchat.runtime import tune_memory

LISTS = ("forbid", "stop")  # settings whose option may be repeated
NAMES = (*SETTINGS, "seed", "pick", *LISTS)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but tab and line feed
ESCAPED = {r"\n": "\n", r"\t": "\t", "\\\\": "\\"}  # in a --stop
ESCAPE = re.compile(r"\\[nt\\]")
HELP = """/set             the settings
/set NAME VALUE  change one, such as: /set temperature 0.7
/reset           forget the conversation
/quit            leave, as Ctrl-D does; Ctrl-C ends an answer"""


def make_parser() -> CommandParser:
    parser = CommandParser(
        "chat",
        "Talk to a model in the terminal, or answer one prompt, or a file of dialogues.",
        "gptchat chat --model out/chatlm/model --temperature 0.7\n"
        "  gptchat chat --model out/chatlm/model --input prompts.tsv --output answers.tsv",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="model directory, such as out/chatlm/model")
    add("--config", metavar="FILE", help="instead of --model: of the run whose model it is")
    add("--prompt", metavar="TEXT", help="answer this and leave")
    input_help = "answer each line: a dialogue as TSV or (.jsonl) JSONL, or just a text"
    add("--input", metavar="FILE", help=input_help)
    output_help = "where the lines of --input and their answers go, in the same format"
    add("--output", metavar="FILE", help=output_help)
    dtype_help = "of the weights (auto: int8 or bfloat16 if fast here)"
    add("--dtype", default="auto", choices=("auto", *DTYPES), help=dtype_help)
    for name, declared in SETTINGS.items():
        add(option(name), type=declared.type, help=f"{declared.help} (default: the model's)")
    seed_help = (
        "gives the same answer again; -1: another one each time (default). Line i of --input, "
        "counted from 0, has the seed + i"
    )
    add("--seed", type=int, default=-1, help=seed_help)
    pick_help = (
        "among several answers, which then do not stream. median: the one of median length; mmi: "
        "the one with the highest mutual information with the context (default: the model's)"
    )
    add("--pick", choices=PICKS, help=pick_help)
    forbid_help = "never said; may be repeated"
    add("--forbid", action="append", default=[], metavar="WORD", help=forbid_help)
    stop_help = (
        r"ends an answer, unsaid; \n is a line break, \t a tab, \\ a backslash; may be repeated"
    )
    add("--stop", action="append", type=unescaped, default=[], metavar="TEXT", help=stop_help)
    return parser


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def unescaped(text: str) -> str:
    r"""The text with a line break for \n, a tab for \t, and a backslash for \\."""
    return ESCAPE.sub(lambda found: ESCAPED[found[0]], text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    if (args.model is None) == (args.config is None):
        raise UserError("wanted either --model DIR or --config FILE")
    if args.config:
        args.model = f"{load_config(args.config).run}/model"
    unpaired = (args.input is None) != (args.output is None)
    if unpaired or (args.input and args.prompt is not None):
        raise UserError("wanted --input and --output together, and no --prompt with them")
    if args.input:
        expand([glob.escape(args.input)], "--input")  # it is there
        if format_named(args.output) not in (None, format_of(args.input)):
            raise UserError(
                f"--output {args.output}: found another format than that of --input {args.input}; "
                "wanted the same ending"
            )
    return args


def make_sampling(generator: TextGenerator, args: argparse.Namespace) -> Sampling:
    """The settings as the engine takes them, with a random seed for -1.

    Settings that were not given become the model's, in place. Raises UserError for a wrong one.
    """
    for name in SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(generator.sampling, name))
    if args.pick is None:
        args.pick = generator.default_pick
    word_filter = None
    words = [word for word in args.forbid if word]
    if words:
        word_filter = WordFilter(generator.tokenizer, words)
    try:
        generator.check_pick(args.pick, generator.task)
        return Sampling(
            **{name: getattr(args, name) for name in SETTINGS},
            seed=chosen_seed(args.seed),
            word_filter=word_filter,
            logprobs=0 if args.pick == "mmi" else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def encode_turns(generator: TextGenerator, turns: Sequence[TextTurn]) -> list[Turn]:
    """Token ids of turns. Bytes that were not UTF-8 become "?"."""
    encoded: list[Turn] = []
    for speaker, text in turns:
        valid_text = text.encode(errors="replace").decode()
        encoded.append((speaker, generator.tokenizer.encode(valid_text)))
    return encoded


def make_request(
    generator: TextGenerator, turns: Sequence[Turn], args: argparse.Namespace, number: int = 0
) -> Request:
    """The request for an answer to encoded turns. Item `number` of a list has the seed + number.

    Raises UserError for a last turn that is too long, or a wrong setting.
    """
    sampling = make_sampling(generator, args).for_item(number)
    n = 1
    if args.pick != "first":
        n = generator.candidates if generator.candidates > 1 else CANDIDATES
    return generator.request(turns, sampling, n)


def stream(
    generator: TextGenerator, requests: Sequence[Request], args: argparse.Namespace
) -> Generator[Piece]:
    stop = [text for text in args.stop if text]
    return generator.stream(requests, stop, args.pick)


class Conversation:
    """The chat in a terminal or with a pipe: reads lines, obeys commands, answers messages."""

    def __init__(self, generator: TextGenerator, args: argparse.Namespace):
        self.generator = generator
        self.args = args
        self.turns: list[TextTurn] = []  # empty for an LM
        self.prompt, self.label = ("you> ", "bot> ") if sys.stdin.isatty() else ("", "")

    def run(self) -> None:
        """Read lines until Ctrl-D, /quit, or Ctrl-C twice in a row at the prompt."""
        interrupted = False
        while True:
            try:
                line = input(self.prompt).strip()
                interrupted = False
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.obey(line)
                else:
                    self.reply(line)
            except UserError as error:
                print(f"error: {error}")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if interrupted:
                    print()
                    return
                interrupted = True
                print("\n(Ctrl-C again, or Ctrl-D, leaves)")

    def obey(self, line: str) -> None:
        """Carry out a command. Raises UserError for a wrong one."""
        command, name, value = (*line.split(maxsplit=2), "", "")[:3]
        if command == "/reset":
            self.turns = []
        elif command == "/help":
            print(HELP)
        elif command == "/set" and name:
            self.change_setting(name.replace("-", "_"), value)
        elif command == "/set":
            for name in NAMES:
                print(name, getattr(self.args, name))
        else:
            raise UserError(f"{command}: no such command; /help lists them")

    def change_setting(self, name: str, value: str) -> None:
        """Change a setting; a wrong name or value raises UserError and changes nothing."""
        if name not in NAMES:
            raise UserError(f"{name}: no such setting; /set lists them")
        changed = copy.copy(self.args)
        if name in LISTS:
            setattr(changed, name, [])  # to which the parser appends
        make_parser().parse_args([f"{option(name)}={value}"], changed)
        make_sampling(self.generator, changed)  # checks the ranges
        self.args = changed

    def reply(self, message: str) -> None:
        """Print the answer to a message and keep both as turns (ChatLM)."""
        is_chat = self.generator.task == "chatlm"
        if is_chat and not message:
            return
        turns = [*self.turns, (0, message)]
        request = make_request(self.generator, encode_turns(self.generator, turns), self.args)
        print(self.label, end="", flush=True)
        answer = self.say_answer(request)
        print()
        if is_chat and answer:
            self.turns = [*turns, (1, answer)]

    def say_answer(self, request: Request) -> str:
        """Print an answer as it comes, until it ends or Ctrl-C is pressed; returns its text."""
        answer = ""
        interrupts: list[int] = []  # Ctrl-C is noted; it must not interrupt a step of the engine
        previous = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        try:
            with closing(stream(self.generator, [request], self.args)) as pieces:
                for piece in pieces:
                    say(piece.text)
                    answer += piece.text
                    if interrupts:
                        break
        finally:
            signal.signal(signal.SIGINT, previous)
        return answer


def say(text: str) -> None:
    """Print text at once, on a terminal without control characters."""
    if sys.stdout.isatty():
        text = CONTROL.sub("\ufffd", text)
    print(text, end="", flush=True)


def answer_prompt(generator: TextGenerator, args: argparse.Namespace) -> None:
    turns = encode_turns(generator, [(0, args.prompt)])
    for piece in stream(generator, [make_request(generator, turns, args)], args):
        say(piece.text)
    print()


def answer_file(generator: TextGenerator, args: argparse.Namespace) -> None:
    """Write each dialogue of --input, followed by its answer, to --output."""
    prompts = list(read_prompts(args.input))
    requests = []
    cut = []  # where the rows are that do not fit
    for number, prompt in enumerate(prompts):
        turns = encode_turns(generator, prompt.turns)
        turns, was_cut = generator.cut_to_fit(turns, args.max_new_tokens)
        if was_cut:
            cut.append(prompt.place)
        requests.append(make_request(generator, turns, args, number))
    if cut:
        print(
            f"warning: {cut[0]}: the first of {len(cut)} rows that are longer than the context of "
            f"{generator.n_ctx} tokens; the front of their text was left out",
            file=sys.stderr,
        )
    answers = [""] * len(prompts)
    with atomic_write(Path(args.output)) as temporary:
        with Progress(len(prompts), "answers", "row") as bar:
            for piece in stream(generator, requests, args):
                answers[piece.index] += piece.text
                bar.update(int(piece.last))
        answered = format_of(args.input).answered
        pairs = zip(prompts, answers, strict=True)
        lines = [answered(prompt.entry, answer) for prompt, answer in pairs]
        temporary.write_bytes(to_bytes("".join(lines), args.output))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    slots = SLOTS if args.input else CANDIDATES
    is_conversation = not args.input and args.prompt is None
    generator = load_generator(args.model, slots, args.dtype, prefix_cache=is_conversation)
    tune_memory()
    make_sampling(generator, args)  # checks the ranges before the first message
    if args.input:
        answer_file(generator, args)
    elif args.prompt is not None:
        answer_prompt(generator, args)
    else:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if sys.stdin.isatty():
            size = f"{generator.n_parameters:,} parameters"
            print(f"{args.model}: {generator.task}, {size}. /help lists the commands.")
        Conversation(generator, args).run()


if __name__ == "__main__":
    cli(main)
