"""Token-weighted loss, perplexity, bits per byte; for a ChatLM also the diversity of its answers.

    python -m gptchat.evaluate --config configs/lm.toml [--split test] [--model DIR] [section.key=value ...]
    python -m gptchat.evaluate --model DIR --text FILE [FILE ...]

The first evaluates a run on the files of a split; the second any model directory, anyone's GPT-2 too, on any text (TSV
for a ChatLM). Each file is encoded with the model's own tokenizer and told by itself. It is read as in training:
documents, each followed by [EOS], are one stream that begins behind an [EOS] and is cut into consecutive windows of the
context. So every token is a target once, and the first ones of a window have little context; a plain loop over these
windows with transformers' model gives the same figures.

Bits per byte: the loss of all targets, [EOS] included, over the UTF-8 bytes of the documents' text. It is what an ideal
compressor would need, so models with different tokenizers may be compared by it, unlike by loss and perplexity.
"""

import argparse
import glob
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gptchat.config import Config, load_config
from gptchat.console import Progress, UserError, cli
from gptchat.data import shards
from gptchat.data.batches import Batch, Batches
from gptchat.data.tokenizer import tokenizer_for
from gptchat.files import expand
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2
from gptchat.training.metrics import metrics, sum_losses

N_ANSWERS = 200  # to dialogues spread evenly over the file


def distinct(texts: Iterable[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts, given as words or ids (Li et al. 2016, distinct-1 and -2)."""
    grams = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def evaluate(model: GPT2, config: Config, path: Path) -> dict[str, float]:
    """Figures of a file, and of answers to its dialogues; `config` names the task and, as `init_from`, the model."""
    n_ctx, device = model.config.n_positions, model.wte.weight.device
    with tempfile.TemporaryDirectory() as folder:
        data = replace(
            config.data, train=(), valid=(), test=(glob.escape(str(path)),), shards=folder
        )
        config, tokenizer = replace(config, data=data), tokenizer_for(config)
        shards.write(config)
        split = shards.open_shards(config, "test", tokenizer)
        batches = Batches(
            split, tokenizer, min(config.model.n_ctx or n_ctx, n_ctx), 8, targets=data.targets
        )
        found = asdict(
            metrics(*sum_losses(model, shown(batches, path.name), device), batches.n_bytes)
        )
        if config.task == "lm":
            return found
        spread = range(0, split.documents, -(-split.documents // N_ANSWERS))
        contexts = [split.dialogue(i)[:-1] for i in spread]
        generator = TextGenerator(model, tokenizer, "chatlm")
        words = [text.split() for text in generator.sample_answers(contexts)]
    return found | {
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "n_answers": len(words),
        "words_per_answer": sum(map(len, words)) / len(words),
    }


def shown(batches: Batches, name: str) -> Iterator[Batch]:
    """The batches of an evaluation, with progress."""
    with Progress(batches.rows_per_epoch, name, "row") as bar:
        for batch in batches.evaluation():
            yield batch
            bar.update(len(batch.input_ids))


def prepare(args: argparse.Namespace) -> tuple[GPT2, Config, list[Path]]:
    """The model, a config with its task and directory, and the files. Raises UserError where they do not fit."""
    if not args.config and (args.overrides or not (args.model and args.text)):
        raise UserError(
            "wanted --config FILE, or --model DIR and --text FILE without section.key=value"
        )
    config = load_config(args.config, args.overrides) if args.config else Config()
    patterns = [glob.escape(name) for name in args.text or []] or getattr(config.data, args.split)
    if not patterns:
        raise UserError(f"[data] {args.split}: found no files named; wanted some, or --text FILE")
    files = expand(patterns, "--text" if args.text else f"[data] {args.split}")
    directory = args.model or f"{config.run}/model"
    model, tokenizer, task = pretrained.load_model(
        directory, "cuda" if torch.cuda.is_available() else "cpu"
    )
    if args.config and task != config.task:
        raise UserError(
            f"{directory}: found a model of task {task}; wanted {config.task}, the task of {args.config}"
        )
    if not 0 <= tokenizer.eos_id < model.config.vocab_size:
        raise UserError(
            f"{directory}: found no [EOS] or <|endoftext|> in the vocabulary; wanted one to end documents"
        )
    return model, replace(config, task=task, init_from=directory), files


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gptchat.evaluate", description="Loss, perplexity, bits per byte."
    )
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--model", metavar="DIR", help="default: that of the config's run")
    parser.add_argument("--split", choices=shards.SPLITS, default="test")
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", help="these instead of a split's; TSV for a ChatLM"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    model, config, files = prepare(args)
    figures = {str(path): evaluate(model, config, path) for path in files}
    if args.json:
        return print(json.dumps({"model": config.init_from, "files": figures}, indent=2))
    for path, found in figures.items():
        told = (
            f"{key.replace('_', ' ')} {value:,.4f}".removesuffix(".0000")
            for key, value in found.items()
        )
        print(f"{path}: {', '.join(told)}")


if __name__ == "__main__":
    cli(main)
