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
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from gptchat import pretrained, shards
from gptchat.batches import Batch, Batches
from gptchat.config import Config, Progress, UserError, cli, expand, load
from gptchat.dialogue import Turn, encode_prompt
from gptchat.engine import Engine, Request, generate
from gptchat.model import GPT2
from gptchat.sampling import Sampling
from gptchat.tokenizer import Tokenizer, for_config

CHAT = Sampling(temperature=0.6, top_k=40, top_p=0.95, repetition_penalty=1.15, max_new_tokens=100)  # for small models
N_ANSWERS = 200  # to dialogues spread evenly over the file


@dataclass(frozen=True)
class Metrics:
    """Of target tokens: mean loss in nats, perplexity e^loss, bits per byte of what the targets stand for."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_targets: int
    n_bytes: int | None


def metrics(loss_sum: float, n_targets: int, n_bytes: int | None = None) -> Metrics:
    """Figures of a sum of cross-entropies in nats; NaN where there is no target."""
    loss = loss_sum / n_targets if n_targets else math.nan
    bits_per_byte = loss_sum / math.log(2) / n_bytes if n_bytes else None
    return Metrics(loss, math.inf if loss > 700 else math.exp(loss), bits_per_byte, n_targets, n_bytes)


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """The context in which a forward pass runs in "bf16", "fp16" or "fp32" (no autocast)."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


@torch.no_grad()
def sum_losses(model: torch.nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu",
               precision: str = "fp32") -> tuple[float, int]:
    """The sum of the cross-entropies (nats) over all targets of `batches` and their number, without dropout."""
    training, n_targets = model.training, 0
    total = torch.zeros((), dtype=torch.float64, device=device)  # a list of losses would pin the heap batch by batch
    model.eval()
    for batch in batches:
        with autocast(device, precision):
            total += model(**batch.inputs(device))
        n_targets += batch.n_targets
    model.train(training)
    return float(total), n_targets


def make_request(tokenizer: Tokenizer, task: str, turns: Sequence[Turn], n_ctx: int, sampling: Sampling,
                 n: int = 1) -> Request:
    """The request that answers a dialogue, or for an LM goes on with its turns as one text.

    Room for `max_new_tokens` (but not more than half of `n_ctx`) is kept by dropping the oldest turns. Raises UserError
    where the last turn, for an LM the text, leaves too little.
    """
    room = n_ctx - min(sampling.max_new_tokens, n_ctx // 2)
    stop_ids = (pretrained.stop_id(tokenizer, task),)
    if task == "chatlm":
        ids, types = encode_prompt(turns, [], tokenizer.cls_id, tokenizer.sep_id, room)
        return Request(ids, types, sampling, n, stop_ids)
    text = [id for _, turn in turns for id in turn] or [tokenizer.eos_id]
    if len(text) > room:
        raise UserError(f"prompt: the text takes {len(text)} tokens; wanted {room} at most")
    return Request(text, None, sampling, n, stop_ids)


def answers(model: GPT2, tokenizer: Tokenizer, task: str, dialogues: Iterable[Sequence[Turn]]) -> list[str]:
    """What the model answers to each dialogue, or how it goes on with it: drawn as in a chat, the same each time."""
    n_ctx = model.config.n_positions
    cut = [[(speaker, ids[1 - n_ctx // 2:]) for speaker, ids in turns] for turns in dialogues]  # as training cuts them
    requests = [make_request(tokenizer, task, turns, n_ctx, replace(CHAT, seed=i)) for i, turns in enumerate(cut)]
    never = pretrained.never_generated(model.config, tokenizer, task)
    engine = Engine(model, max(1, min(16, len(requests))), suppress=never)
    return [tokenizer.decode(candidates[0].ids) for candidates in generate(engine, requests)]


def distinct(texts: Iterable[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts, given as words or ids (Li et al. 2016, distinct-1 and -2)."""
    grams = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / max(1, len(grams))


def evaluate(model: GPT2, config: Config, path: Path) -> dict[str, float]:
    """Figures of a file, and of answers to its dialogues; `config` names the task and, as `init_from`, the model."""
    n_ctx, device = model.config.n_positions, model.wte.weight.device
    with tempfile.TemporaryDirectory() as folder:
        data = replace(config.data, train=(), valid=(), test=(glob.escape(str(path)),), shards=folder)
        config, tokenizer = replace(config, data=data), for_config(config)
        shards.write(config)
        split = shards.open_shards(config, "test", tokenizer)
        batches = Batches(split, tokenizer, min(config.model.n_ctx or n_ctx, n_ctx), 8, targets=data.targets)
        found = asdict(metrics(*sum_losses(model, shown(batches, path.name), device), batches.n_bytes))
        if config.task == "lm":
            return found
        spread = range(0, split.documents, -(-split.documents // N_ANSWERS))
        words = [text.split() for text in
                 answers(model, tokenizer, "chatlm", [split.dialogue(i)[:-1] for i in spread])]
    return found | {"distinct_1": distinct(words, 1), "distinct_2": distinct(words, 2), "n_answers": len(words),
                    "words_per_answer": sum(map(len, words)) / len(words)}


def shown(batches: Batches, name: str) -> Iterator[Batch]:
    """The batches of an evaluation, with progress."""
    with Progress(batches.rows_per_epoch, name, "row") as bar:
        for batch in batches.evaluation():
            yield batch
            bar.update(len(batch.input_ids))


def prepare(args: argparse.Namespace) -> tuple[GPT2, Config, list[Path]]:
    """The model, a config with its task and directory, and the files. Raises UserError where they do not fit."""
    if not args.config and (args.overrides or not (args.model and args.text)):
        raise UserError("wanted --config FILE, or --model DIR and --text FILE without section.key=value")
    config = load(args.config, args.overrides) if args.config else Config()
    patterns = [glob.escape(name) for name in args.text or []] or getattr(config.data, args.split)
    if not patterns:
        raise UserError(f"[data] {args.split}: found no files named; wanted some, or --text FILE")
    files = expand(patterns, "--text" if args.text else f"[data] {args.split}")
    directory = args.model or f"{config.run}/model"
    model, tokenizer, task = pretrained.load(directory, "cuda" if torch.cuda.is_available() else "cpu")
    if args.config and task != config.task:
        raise UserError(f"{directory}: found a model of task {task}; wanted {config.task}, the task of {args.config}")
    if not 0 <= tokenizer.eos_id < model.config.vocab_size:
        raise UserError(f"{directory}: found no [EOS] or <|endoftext|> in the vocabulary; wanted one to end documents")
    return model, replace(config, task=task, init_from=directory), files


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gptchat.evaluate", description="Loss, perplexity, bits per byte.")
    parser.add_argument("--config", metavar="FILE")
    parser.add_argument("--model", metavar="DIR", help="default: that of the config's run")
    parser.add_argument("--split", choices=shards.SPLITS, default="test")
    parser.add_argument("--text", metavar="FILE", nargs="+", help="these instead of a split's; TSV for a ChatLM")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    model, config, files = prepare(args)
    figures = {str(path): evaluate(model, config, path) for path in files}
    if args.json:
        return print(json.dumps({"model": config.init_from, "files": figures}, indent=2))
    for path, found in figures.items():
        told = (f"{key.replace('_', ' ')} {value:,.4f}".removesuffix(".0000") for key, value in found.items())
        print(f"{path}: {', '.join(told)}")


if __name__ == "__main__":
    cli(main)
