"""Talk to a model in the terminal, or answer one prompt, or a file of dialogues.

    gptchat chat --model out/chatlm/model [--temperature 0.7] [--pick median] ...
    gptchat chat --model DIR --prompt TEXT
    gptchat chat --model DIR --input prompts.tsv --output answers.tsv

Every setting is an option of the command line and a name of /set. One that is not given is the
model's own (generation_config.json).

In the terminal the answer streams, unless it is picked among several (`--pick median` or `mmi`). A
ChatLM keeps the turns of the conversation, and drops the oldest ones when the context is full. An
LM continues each line by itself. Ctrl-C ends an answer; what was said by then is kept as the turn.
Typed lines are saved in `chat_history` beside the model directory. If stdin is not a terminal, its
lines are answered in the same way, without prompts and history.

A line of --input is a dialogue in TSV or JSONL (`data/dialogue_files.py`) whose last turn is to be
answered, or a text for an LM. --output has the same format: each dialogue is followed by its
answer, as in training data. It is written whole or not at all, and compressed if its name ends in
`.gz`. Dialogues lose their oldest turns as in the terminal. If the last turn, or an LM's text, is
too long by itself, its front is left out, and a warning on stderr counts these lines.

An answer depends on its dialogue, the settings and the seed, not on the other dialogues of the
file. bfloat16 and int8 are exceptions: rounding can depend on the batch and, in the terminal, on
whether earlier turns were computed in this session (see `inference.engine`).
"""

import argparse
import glob
import os
import re
import readline  # line editing and history for input()
import signal
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from gptchat.config import load_config
from gptchat.console import CommandParser, Progress, UserError, cli
from gptchat.data.dialogue import TextTurn, Turn
from gptchat.data.dialogue_files import format_named, format_of, read_prompts
from gptchat.data.reading import to_bytes
from gptchat.files import atomic_write, expand
from gptchat.inference.engine import Request
from gptchat.inference.generate import SLOTS, TextGenerator, load_generator
from gptchat.inference.linear import DTYPES
from gptchat.inference.pick import CANDIDATES, PICKS
from gptchat.inference.sampling import LARGEST_BIAS, SETTINGS, Sampling, chosen_seed, parse_biases
from gptchat.inference.text import WordFilter
from gptchat.runtime import tune_memory

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters but tab and line feed
ESCAPED = {r"\n": "\n", r"\t": "\t", "\\\\": "\\"}  # in a --stop
ESCAPE = re.compile(r"\\[nt\\]")
PROMPT, LABEL = "you> ", "bot> "
# \x01 and \x02 enclose what readline must not count as columns of the prompt.
COLOURED_PROMPT = "\x01\x1b[1;36m\x02you>\x01\x1b[0m\x02 "
COLOURED_LABEL = "\x1b[1;36mbot>\x1b[0m "
HELP = """/set             the settings
/set NAME VALUE  change one, such as: /set temperature 0.7
/reset           forget the conversation
/quit            leave, as Ctrl-D does; Ctrl-C ends an answer"""


class SettingsParser(argparse.ArgumentParser):
    """A parser whose errors, also those of /set, are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def settings_parser() -> SettingsParser:
    """The settings of an answer: options of the command line, and names of /set."""
    parser = SettingsParser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    for name, declared in SETTINGS.items():
        add(option(name), type=declared.type, help=f"{declared.help} (default: the model's)")
    seed_help = (
        "gives the same answer again; -1: another one each time (default). Line i of --input, "
        "counted from 0, has the seed + i"
    )
    add("--seed", type=int, default=-1, help=seed_help)
    forbid_help = "never said; may be repeated"
    add("--forbid", action="append", default=[], metavar="WORD", help=forbid_help)
    bias_help = (
        f"added to the logit of a token id, {-LARGEST_BIAS} to {LARGEST_BIAS}; may be repeated"
    )
    add("--logit-bias", action="append", default=[], metavar="ID=BIAS", help=bias_help)
    stop_help = (
        r"ends an answer, unsaid; \n is a line break, \t a tab, \\ a backslash; may be repeated"
    )
    add("--stop", action="append", default=[], metavar="TEXT", help=stop_help)
    pick_help = (
        "among several answers, which then do not stream. median: the one of median length; mmi: "
        "the one with the highest mutual information with the context (default: the model's)"
    )
    add("--pick", choices=PICKS, help=pick_help)
    return parser


def option(name: str) -> str:
    """The option of the command line for a setting."""
    return "--" + name.replace("_", "-")


def make_sampling(generator: TextGenerator, settings: argparse.Namespace) -> Sampling:
    """The settings as the engine takes them, with a random seed for -1.

    Settings that were not given become the model's, in place. Raises UserError for one that is out
    of its range, or that needs a ChatLM.
    """
    for name in SETTINGS:
        if getattr(settings, name) is None:
            setattr(settings, name, getattr(generator.sampling, name))
    if settings.pick is None:
        settings.pick = generator.default_pick
    numbers = {name: getattr(settings, name) for name in SETTINGS}
    word_filter = None
    words = [word for word in settings.forbid if word]
    if words:
        word_filter = WordFilter(generator.tokenizer, words)
    vocab_size = generator.engine.model.config.vocab_size
    try:
        generator.check_pick(settings.pick, generator.task)
        logit_bias = parse_biases(settings.logit_bias, vocab_size)
        return Sampling(
            **numbers,
            seed=chosen_seed(settings.seed),
            word_filter=word_filter,
            logit_bias=logit_bias,
            logprobs=0 if settings.pick == "mmi" else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def make_request(
    generator: TextGenerator, turns: Sequence[TextTurn], settings: argparse.Namespace
) -> Request:
    """The request for an answer to (speaker, text) turns.

    Raises UserError for a last turn that is too long, or a setting out of its range.
    """
    return encoded_request(generator, encode_turns(generator, turns), settings)


def encode_turns(generator: TextGenerator, turns: Sequence[TextTurn]) -> list[Turn]:
    """Token ids of turns. Lone surrogates, from bytes that were not UTF-8, become "?"."""
    encoded: list[Turn] = []
    for speaker, text in turns:
        valid_text = text.encode(errors="replace").decode()
        encoded.append((speaker, generator.tokenizer.encode(valid_text)))
    return encoded


def encoded_request(
    generator: TextGenerator, turns: Sequence[Turn], settings: argparse.Namespace, number: int = 0
) -> Request:
    """The request for an answer to encoded turns. Item `number` of a list has the seed + number.

    Raises UserError as `make_request` does.
    """
    sampling = make_sampling(generator, settings).for_item(number)
    n = 1
    if settings.pick != "first":
        n = generator.candidates if generator.candidates > 1 else CANDIDATES
    return generator.request(turns, sampling, n)


def stop_strings(settings: argparse.Namespace) -> list[str]:
    r"""The texts of --stop, where \n is a line break, \t a tab, and \\ a backslash.

    An empty one, as after `/set stop`, means none.
    """
    return [ESCAPE.sub(lambda found: ESCAPED[found[0]], text) for text in settings.stop if text]


class Conversation:
    """The chat in a terminal: reads lines, obeys commands, answers messages.

    `prompt` is printed before each line is read, `label` before each answer.
    """

    def __init__(
        self,
        generator: TextGenerator,
        settings: argparse.Namespace,
        prompt: str = "",
        label: str = "",
    ):
        self.generator = generator
        self.settings = settings
        self.prompt = prompt
        self.label = label
        self.turns: list[TextTurn] = []  # empty for an LM

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
        """Carry out a command. Raises UserError for an unknown one, or a wrong setting."""
        words = line.split(maxsplit=2)
        command = words[0]
        if command == "/reset":
            self.turns = []
        elif command == "/help":
            print(HELP)
        elif command == "/set" and len(words) == 1:
            for name, value in vars(self.settings).items():
                print(name, value)
        elif command == "/set":
            value = words[2] if len(words) == 3 else ""
            self.change_setting(words[1], value)
        else:
            raise UserError(f"{command}: no such command; /help lists them")

    def change_setting(self, name: str, value: str) -> None:
        """Change one setting. Raises UserError, and changes nothing, for a wrong name or value."""
        changed = argparse.Namespace(**vars(self.settings))
        list_name = name.replace("-", "_")
        if list_name in ("forbid", "logit_bias", "stop"):
            setattr(changed, list_name, [])  # the value replaces the list; it would be appended
        settings_parser().parse_args([f"{option(name)}={value}"], changed)
        make_sampling(self.generator, changed)  # checks the ranges
        self.settings = changed

    def reply(self, message: str) -> None:
        """Print the answer to a message and keep both as turns (ChatLM)."""
        is_chat = self.generator.task == "chatlm"
        if is_chat and not message:
            return
        turns = [*self.turns, (0, message)]
        request = make_request(self.generator, turns, self.settings)
        print(self.label, end="", flush=True)
        answer = self.say_answer(request)
        print()
        if is_chat and answer:
            self.turns = [*turns, (1, answer)]

    def say_answer(self, request: Request) -> str:
        """Print an answer as it comes, until it ends or Ctrl-C is pressed; returns its text."""
        answer = ""
        interrupts: list[int] = []  # Ctrl-C is only noted, so that no step of the engine is torn
        previous = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        try:
            with closing(
                self.generator.stream([request], stop_strings(self.settings), self.settings.pick)
            ) as pieces:
                for piece in pieces:
                    say(piece.text)
                    answer += piece.text
                    if interrupts:
                        break
        finally:
            signal.signal(signal.SIGINT, previous)
        return answer


def say(text: str) -> None:
    """Print text at once. A terminal would obey control characters, so they are replaced there."""
    if sys.stdout.isatty():
        text = CONTROL.sub("\ufffd", text)
    print(text, end="", flush=True)


def converse(
    generator: TextGenerator, settings: argparse.Namespace, directory: str, colour: bool
) -> None:
    """Talk in the terminal and save typed lines as history, or answer the lines of a pipe."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not sys.stdin.isatty():
        Conversation(generator, settings).run()
        return
    prompt, label = (COLOURED_PROMPT, COLOURED_LABEL) if colour else (PROMPT, LABEL)
    history = Path(directory).resolve().parent / "chat_history"
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    size = f"{generator.n_parameters:,} parameters"
    print(f"{directory}: {generator.task}, {size}. /help lists the commands.")
    try:
        Conversation(generator, settings, prompt, label).run()
    finally:
        with suppress(OSError):
            readline.write_history_file(history)


def answer_prompt(generator: TextGenerator, settings: argparse.Namespace, prompt: str) -> None:
    """Print the answer to one message, or the continuation of one text, as it comes."""
    request = make_request(generator, [(0, prompt)], settings)
    for piece in generator.stream([request], stop_strings(settings), settings.pick):
        say(piece.text)
    print()


def answer_file(
    generator: TextGenerator, settings: argparse.Namespace, source: str, output: str
) -> None:
    """Write each dialogue of a file, followed by its answer, to `output`.

    Raises UserError, with file and line, before anything is written.
    """
    prompts = list(read_prompts(source))
    requests = []
    cut_rows = []  # their numbers
    for number, prompt in enumerate(prompts):
        turns = encode_turns(generator, prompt.turns)
        turns, was_cut = generator.cut_to_fit(turns, settings.max_new_tokens)
        if was_cut:
            cut_rows.append(number + 1)
        requests.append(encoded_request(generator, turns, settings, number))
    if cut_rows:
        first = cut_rows[0]
        print(
            f"warning: {prompts[first - 1].place}: {len(cut_rows)} of {len(prompts)} rows, the "
            f"first being row {first}, are longer than the context of {generator.n_ctx} tokens; "
            "the front of their text was left out",
            file=sys.stderr,
        )
    answers = [""] * len(prompts)
    with atomic_write(Path(output)) as temporary, Progress(len(prompts), "answers", "row") as bar:
        for piece in generator.stream(requests, stop_strings(settings), settings.pick):
            answers[piece.index] += piece.text
            bar.update(int(piece.last))
        answered = format_of(source).answered
        pairs = zip(prompts, answers, strict=True)
        lines = [answered(prompt.entry, answer) for prompt, answer in pairs]
        temporary.write_bytes(to_bytes("".join(lines), output))


def parse_arguments(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, argparse.Namespace]:
    """All arguments, and the settings among them. Raises UserError for wrong use."""
    settings = settings_parser()
    parser = CommandParser(
        "chat",
        "Talk to a model in the terminal, or answer one prompt, or a file of dialogues.",
        "gptchat chat --model out/chatlm/model --temperature 0.7\n"
        "  gptchat chat --model out/chatlm/model --input prompts.tsv --output answers.tsv",
        parents=[settings],
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
    add("--no-color", action="store_true", help="so does the environment variable NO_COLOR")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.config is None):
        raise UserError("wanted either --model DIR or --config FILE")
    if args.config:
        args.model = f"{load_config(args.config).run}/model"
    unpaired = (args.input is None) != (args.output is None)
    if unpaired or (args.input and args.prompt is not None):
        raise UserError("wanted --input and --output together, and no --prompt with them")
    if args.input:
        expand([glob.escape(args.input)], "--input")  # it is there
    if args.input and format_named(args.output) not in (None, format_of(args.input)):
        raise UserError(
            f"--output {args.output}: found another format than that of --input {args.input}; "
            "wanted the same ending"
        )
    names = vars(settings.parse_args([]))
    return args, argparse.Namespace(**{name: getattr(args, name) for name in names})


def main(argv: Sequence[str] | None = None) -> None:
    args, settings = parse_arguments(argv)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    slots = SLOTS if args.input else CANDIDATES
    is_conversation = not args.input and args.prompt is None
    generator = load_generator(args.model, slots, args.dtype, prefix_cache=is_conversation)
    tune_memory()
    make_sampling(generator, settings)  # checks the ranges before the first message
    if args.input:
        answer_file(generator, settings, args.input, args.output)
    elif args.prompt is not None:
        answer_prompt(generator, settings, args.prompt)
    else:
        colour = sys.stdout.isatty() and not args.no_color and not os.environ.get("NO_COLOR")
        converse(generator, settings, args.model, colour)


if __name__ == "__main__":
    cli(main)
