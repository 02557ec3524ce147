"""Loss, perplexity and bits per byte of a model on text; for a ChatLM also its answers' diversity.

    gptchat evaluate --config FILE [--split test] [--model DIR] [section.key=value ...]
    gptchat evaluate --model DIR --text FILE [FILE ...]

The first form evaluates a run on the files of one split; the second evaluates any model directory,
anyone's GPT-2 too, on any text (a ChatLM: dialogues, TSV or JSONL). Each file is encoded with the
model's own tokenizer, and has figures of its own.

Text is read as in training: documents, each followed by [EOS], form one stream that begins after an
[EOS] and is cut into consecutive windows of the context length. So every token is a target once,
and the first tokens of a window have little context. A plain loop over these windows with
transformers' model gives the same figures. A ChatLM's targets are its responses, each followed by
[CLS], unless the config says otherwise. Every target token counts alike.

Bits per byte is the loss of all targets, [EOS] included, divided by the UTF-8 bytes of their text:
what an ideal compressor would need. Unlike loss and perplexity it may be compared between models
with different tokenizers.

A ChatLM also answers up to 200 dialogues spread evenly over the file, the same way each time.
`repeats_itself` and `repeats_context` are the shares of answers in which four words in a row stand
twice, or stand in an earlier turn too. Words stand between white space; in scripts that are written
without spaces (Chinese, Japanese, Thai and others: scripts.py) each character counts as a word.
"""

import argparse
import glob
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from gptchat.config import Config, DataConfig, load_config
from gptchat.console import CommandParser, Progress, UserError, cli
from gptchat.data import shard_writer, shards
from gptchat.data.batches import Batch, Batches
from gptchat.data.scripts import units
from gptchat.data.splits import SPLITS, patterns_of
from gptchat.data.tokenizer import Tokenizer, tokenizer_for
from gptchat.files import expand
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from gptchat.model.devices import default_device
from gptchat.model.gpt2 import GPT2
from gptchat.training import model_card
from gptchat.training.metrics import metrics, sum_losses

MAX_ANSWERS = 200  # per file
BATCH_SIZE = 8  # rows
REPEATED = 4  # words in a row that count as a repetition
Figures = dict[str, Any]  # by name, in the order in which they are printed: numbers


def ngrams(text: Sequence, n: int) -> list[tuple]:
    """All runs of `n` items of a text, which is a sequence of words or ids."""
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def distinct(texts: Iterable[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts.

    Known as distinct-1 and distinct-2 (Li et al. 2016); 0 if there are no n-grams.
    """
    found = list(chain.from_iterable(ngrams(text, n) for text in texts))
    return len(set(found)) / max(1, len(found))


def repeats_itself(text: Sequence) -> bool:
    """Whether a run of REPEATED items stands in a text twice."""
    found = ngrams(text, REPEATED)
    return len(set(found)) < len(found)


def repeats_context(text: Sequence, context: Sequence) -> bool:
    """Whether a run of REPEATED items of a text stands in its context too."""
    return not set(ngrams(context, REPEATED)).isdisjoint(ngrams(text, REPEATED))


def evaluate_data(model: GPT2, config: Config, split: str, name: str) -> Figures:
    """The figures of the config's split; progress is shown under `name`.

    `config` names the task, the data and, as `init_from`, the model's directory. Raises UserError
    for a file that cannot be read as that task's text, or if there is none.
    """
    tokenizer = tokenizer_for(config)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, data=replace(config.data, weights=(), shards=folder))
        shard_writer.write(config, only=split)
        opened = shards.open_shards(config, split, tokenizer)
        figures = loss_figures(model, config, opened, tokenizer, name)
        if config.task == "chatlm":
            figures |= answer_figures(model, opened, tokenizer)
    return figures


def loss_figures(
    model: GPT2, config: Config, split: shards.Shards, tokenizer: Tokenizer, name: str
) -> Figures:
    """Loss, perplexity and bits per byte of a split; progress is shown under `name`."""
    n_ctx = model.config.n_positions
    if config.model.n_ctx:
        n_ctx = min(config.model.n_ctx, n_ctx)
    batches = Batches([split], tokenizer, n_ctx, BATCH_SIZE, targets=config.data.held_out_targets)
    device = model.wte.weight.device
    loss_sum, n_targets = sum_losses(model, with_progress(batches, name), device)
    return asdict(metrics(loss_sum, n_targets, batches.n_bytes))


def with_progress(batches: Batches, name: str) -> Iterator[Batch]:
    """The batches of an evaluation; the progress is shown while they are taken."""
    with Progress(batches.rows_per_epoch, name, "row") as bar:
        for batch in batches.evaluation():
            yield batch
            bar.update(len(batch.input_ids))


def answer_figures(model: GPT2, split: shards.Shards, tokenizer: Tokenizer) -> Figures:
    """Diversity, length and repetition of a ChatLM's answers to dialogues spread over the split."""
    stride = math.ceil(split.documents / MAX_ANSWERS)
    contexts = [split.dialogue(number)[:-1] for number in range(0, split.documents, stride)]
    answers = TextGenerator(model, tokenizer, "chatlm", dtype="auto").sample_answers(contexts)
    words = [units(answer) for answer in answers]
    n_self = sum(map(repeats_itself, words))
    n_context = 0
    for answer, turns in zip(words, contexts, strict=True):
        earlier = [units(tokenizer.decode(ids)) for _, ids in turns]
        n_context += any(repeats_context(answer, turn) for turn in earlier)
    return {
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "repeats_itself": n_self / len(answers),
        "repeats_context": n_context / len(answers),
        "n_answers": len(answers),
        "words_per_answer": sum(map(len, words)) / len(answers),
    }


def resolve(args: argparse.Namespace) -> tuple[GPT2, Config, dict[str, DataConfig]]:
    """What the arguments ask to evaluate: the model, its config, and the data by their names.

    Raises UserError where something is missing or does not fit together.
    """
    config = Config()
    if args.config:
        config = load_config(args.config, args.overrides)
    elif args.overrides or not (args.model and args.text):
        raise UserError(
            "wanted --config FILE, or --model DIR and --text FILE without section.key=value"
        )
    directory = args.model or f"{config.run}/model"
    data = named_data(args, config)
    model, tokenizer, task = pretrained.load_model(directory, default_device())
    if args.config and task != config.task:
        raise UserError(
            f"{directory}: found a model of task {task}; "
            f"wanted {config.task}, the task of {args.config}"
        )
    if not 0 <= tokenizer.eos_id < model.config.vocab_size:
        raise UserError(
            f"{directory}: found no [EOS] or <|endoftext|> in the vocabulary; "
            "wanted one to end documents"
        )
    return model, replace(config, task=task, init_from=directory), data


def named_data(args: argparse.Namespace, config: Config) -> dict[str, DataConfig]:
    """A name for each text that has figures of its own -> the data whose `args.split` it is.

    That is each file of --text or of the config's split; what is held out of the training files is
    one text. Raises UserError if there is none.
    """
    if args.text:
        paths = expand([glob.escape(name) for name in args.text], "--text")
    else:
        key = f"[data] {args.split}"
        patterns = patterns_of(config.data, args.split)
        if not patterns:
            raise UserError(f"{key}: found no files named; wanted some, or --text FILE")
        if config.data.held_out > 0:
            return {f"{args.split} of {', '.join(patterns)}": config.data}
        paths = expand(patterns, key)
    data: dict[str, DataConfig] = {}
    for path in paths:
        files: Any = {"train": (), "valid": (), "test": (), "held_out": 0.0, "weights": ()}
        files[args.split] = (glob.escape(str(path)),)
        data[str(path)] = replace(config.data, **files)
    return data


def format_figures(figures: Figures) -> str:
    """`name value` of each figure: four decimals, none where the value is a whole number."""
    parts = []
    for key, value in figures.items():
        number = f"{value:,.4f}".removesuffix(".0000")
        parts.append(f"{key.replace('_', ' ')} {number}")
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
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
    add("--split", choices=SPLITS, default="test", help="of the config (default: test)")
    add("--text", metavar="FILE", nargs="+", help="instead of a split; for a ChatLM TSV or JSONL")
    add("--json", action="store_true", help="print one JSON object")
    add("overrides", nargs="*", metavar="section.key=value", help="changes a key of the config")
    args = parser.parse_intermixed_args(argv)
    model, config, data_by_name = resolve(args)
    figures_of = {}
    for name, data in data_by_name.items():
        figures_of[name] = evaluate_data(model, replace(config, data=data), args.split, name)
    if args.json:
        print(json.dumps({"model": config.init_from, "files": figures_of}, indent=2))
    else:
        for name, figures in figures_of.items():
            print(f"{name}: {format_figures(figures)}")
    if args.config and not args.model and not args.text:
        add_to_card(Path(config.init_from), figures_of)


def add_to_card(model: Path, figures_of: dict[str, Figures]) -> None:
    """Add the figures of the run's files to its model card, where that can be written."""
    try:
        model_card.add_evaluation(model, figures_of)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
