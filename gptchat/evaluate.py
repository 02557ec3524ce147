"""Measure a model on text: `gptchat evaluate`. figures.py says what the figures are.

    gptchat evaluate --config FILE [--split test] [--prompts FILE] [section.key=value ...]
    gptchat evaluate --model DIR --text FILE [FILE ...]

The first form evaluates a run on one split, from its shards if they are up to date. The second
evaluates any model directory, anyone's GPT-2 too, on any text (a ChatLM: dialogues, TSV or JSONL).
Each file has its own figures; `held_out` text and the split train have one set as a whole.

With --config and at most --prompts, the figures are also written to `test.txt` in the run's folder,
and the model's answers to the dialogues of --prompts to `answers.tsv`. Both are in the model card,
`README.md` of the model directory. `manifest.json` records what they were made from; while that is
unchanged, the figures are printed from there, without importing torch.
"""

import argparse
import glob
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptchat.artifacts import (
    changed_input,
    changed_setting,
    input_states,
    read_manifest,
    write_manifest,
)
from gptchat.config import Config, flatten, load_config
from gptchat.console import CommandParser, UserError, cli
from gptchat.data import shards
from gptchat.data.reading import filled_lines
from gptchat.data.splits import SPLITS, patterns_of
from gptchat.data.tokenizer import tokenizer_for
from gptchat.files import atomic_write, expand, matching_files

if TYPE_CHECKING:
    from gptchat.figures import Figures

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, gptchat, {tag}]
---
# {name}

A GPT-2 trained with gptchat as {what}.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)

## Figures

Of held-out text; a loss is nats a token.

{figures}

## Config

{config}
"""
ANSWERS = """
## Answers

{answers}
"""


@contextmanager
def open_split(config: Config, split: str) -> Iterator[shards.Shards]:
    """A split of the config in the tokenizer of `init_from`: its shards, or temporary ones."""
    tokenizer = tokenizer_for(config)
    if not shards.why_outdated(config, tokenizer, [split]):
        yield shards.open_shards(config, split, tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, data=replace(config.data, weights=(), shards=folder))
        shards.write(config, only=split)
        yield shards.open_shards(config, split, tokenizer)


def measure(config: Config, split: str, task: str = "") -> "dict[str, Figures]":
    """The figures of the model `config.init_from`: of each file of the split, or of all together.

    Raises UserError for a model of another task than `task`, if that is given, and for a file
    without text of the model's task.
    """
    from gptchat import figures  # torch takes seconds to import, and may not be needed

    model, tokenizer, found = figures.load(config.init_from, task)
    config = replace(config, task=found)
    figures_of = {}
    with open_split(config, split) as opened:
        sources = opened.by_source()
        if split == "train" or config.data.held_out > 0:
            sources = {f"{split} of {', '.join(patterns_of(config.data, split))}": opened}
        for name, text in sources.items():
            if text.documents == 0:
                raise UserError(f"{name}: found no text; wanted some for [data] {split}")
            figures_of[name] = figures.of_text(model, config, text, tokenizer, name)
    return figures_of


def format_figures(figures: "Figures") -> str:
    """`name value` of each figure: four decimals, none if the value is a whole number."""
    parts = []
    for key, value in figures.items():
        number = f"{value:,.4f}".removesuffix(".0000")
        parts.append(f"{key.replace('_', ' ')} {number}")
    return ", ".join(parts)


def evaluate_run(config: Config, prompts: str) -> "dict[str, Figures]":
    """The figures of a run on its test split, recorded with its answers to `prompts`.

    A record that is up to date is used. Without test files there are no figures.
    """
    folder = Path(config.run)
    model = folder / "model"
    patterns = patterns_of(config.data, "test")
    settings = {
        "n_ctx": config.model.n_ctx,
        "document": config.data.document,
        "held_out": config.data.held_out,
        "targets": config.data.targets,
        "test": patterns,
        "prompts": prompts,
    }
    inputs = [model / "model.safetensors", *matching_files(patterns)]
    if prompts:
        inputs.append(Path(prompts))
    record = read_manifest(folder)
    if record is not None:
        change = changed_setting(record["settings"], settings)
        if not change and not changed_input(record["inputs"], inputs):
            line = f"{folder}: not evaluated again; model, text and settings are as they were"
            print(line, file=sys.stderr)
            return record["figures"]
    record = {"settings": settings, "inputs": input_states(inputs), "figures": {}}
    if patterns:
        expand(patterns, "[data] test")  # says what is wrong with a name before any work
        record["figures"] = measure(replace(config, init_from=str(model)), "test", config.task)
        write_text(folder / "test.txt", "\n".join(lines_of(record["figures"])))
    if prompts:
        answer(model, prompts, folder / "answers.tsv")
    if patterns:
        write_card(config, record["figures"], prompts)
    write_manifest(folder, record)
    return record["figures"]


def write_text(path: Path, text: str) -> None:
    """Write lines of text. Names of files that are not UTF-8 become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def write_card(config: Config, figures_of: "dict[str, Figures]", prompts: str) -> None:
    """Write the model card, with the run's answers if it was given `prompts`."""
    is_chat = config.task == "chatlm"
    folder = Path(config.run)
    settings = flatten(asdict(config))
    card = CARD.format(
        tag="conversational" if is_chat else "lm",
        name=folder.name,
        what="a chat model, which answers" if is_chat else "a language model, which continues text",
        figures=indented(lines_of(figures_of)),
        config=indented(f"{key} = {value!r}" for key, value in settings.items()),
    )
    if prompts:
        card += ANSWERS.format(answers=indented(answer_lines(folder / "answers.tsv")))
    write_text(folder / "model/README.md", card)


def indented(lines: Iterable[str]) -> str:
    """Lines that Markdown shows as they are."""
    return "\n".join(f"    {line}" for line in lines)


def answer(model: Path, prompts: str, answers: Path) -> None:
    from gptchat import chat

    files = ["--input", prompts, "--output", str(answers)]
    chat.main(["--model", str(model), "--seed", "1", *files])


def answer_lines(answers: Path) -> list[str]:
    lines = []
    for _, line in filled_lines(answers):
        message, reply = line.split("\t")[-2:]
        lines += [f"you> {message}", f"bot> {reply}"]
    return lines


def lines_of(figures_of: "dict[str, Figures]") -> list[str]:
    return [f"{name}: {format_figures(figures)}" for name, figures in figures_of.items()]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        "evaluate",
        "Measure loss, perplexity and bits per byte of a model on each file of a run's split,\n"
        "or on any text; of a ChatLM also the diversity of its answers.",
        "gptchat evaluate --config configs/lm.toml --split valid\n"
        "  gptchat evaluate --model out/chatlm/model --text dialogues.tsv",
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="of the run whose model and files are evaluated")
    add("--model", metavar="DIR", help="model directory (default: that of the config's run)")
    add("--split", choices=SPLITS, help="of the config (default: test)")
    add("--text", metavar="FILE", nargs="+", help="instead of a split; for a ChatLM TSV or JSONL")
    add("--prompts", metavar="FILE", help="dialogues that the run's model answers, too")
    add("overrides", nargs="*", metavar="section.key=value", help="changes a key of the config")
    args = parser.parse_intermixed_args(argv)
    if not args.config and (args.overrides or not (args.model and args.text)):
        raise UserError(
            "wanted --config FILE, or --model DIR and --text FILE without section.key=value"
        )
    if args.prompts and not is_of_run(args):
        raise UserError("--prompts: wanted --config FILE and nothing else that is evaluated")
    return args


def is_of_run(args: argparse.Namespace) -> bool:
    """Whether a run is evaluated as its config says."""
    return args.config and not (args.model or args.text or args.split or args.overrides)


def evaluate(args: argparse.Namespace, config: Config) -> "dict[str, Figures]":
    """The figures that the arguments ask for, by the name of their text."""
    if is_of_run(args):
        return evaluate_run(config, args.prompts or "")
    split = args.split or "test"
    if args.text:
        split = "test"
        names = tuple(glob.escape(name) for name in args.text)
        config = replace(config, data=replace(config.data, test=names, held_out=0.0))
    elif not patterns_of(config.data, split):
        raise UserError(f"[data] {split}: found no files named; wanted some, or --text FILE")
    config = replace(config, init_from=args.model or f"{config.run}/model")
    return measure(config, split, config.task if args.config else "")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    config = load_config(args.config, args.overrides) if args.config else Config()
    figures_of = evaluate(args, config)
    if not figures_of:
        print(f"{args.config}: names no test files, so there are no figures")
    for line in lines_of(figures_of):
        print(line)
    if args.prompts:
        print("\n".join(answer_lines(Path(config.run, "answers.tsv"))))


if __name__ == "__main__":
    cli(main)
