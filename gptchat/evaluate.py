"""Token-weighted loss, perplexity, bits per byte; for a ChatLM also the diversity of its answers.

    python -m gptchat.evaluate --config configs/lm.toml [--split test] [--model DIR] [section.key=value ...]
    python -m gptchat.evaluate --model DIR --text FILE [FILE ...]

The first evaluates a split of a run's data, the second any text files (for a ChatLM: TSV), each by itself, with any
model directory: anyone's GPT-2 too, and then with its own tokenizer. The text is read as in training: documents, each
followed by [EOS], are one stream that begins behind an [EOS]; consecutive windows of the model's context cut it, so
every token is a target once, and the first of a window has only the last of the window before as its context. That is
what a plain loop over the same windows with transformers' model computes.

Bits per byte: the loss of all targets, [EOS] included, over the UTF-8 bytes of the documents' text. It is what an ideal
compressor would need, so models with different tokenizers may be compared by it, unlike by loss and perplexity.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gptchat.batches import Batch
from gptchat.config import UserError
from gptchat.dialogue import Turn, encode_prompt
from gptchat.engine import Engine, Request, generate
from gptchat.model import GPT2
from gptchat.pretrained import never_generated, stop_id
from gptchat.sampling import Sampling
from gptchat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Metrics:
    """Means over target tokens: loss in nats, perplexity e^loss; `bits_per_byte` is None where no bytes are counted."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_targets: int
    n_bytes: int | None


def metrics(loss_sum: float, n_targets: int, n_bytes: int | None = None) -> Metrics:
    """Figures of a sum of cross-entropies in nats; all NaN where there is no target."""
    loss = loss_sum / n_targets if n_targets else math.nan
    perplexity = math.exp(loss) if loss < 700 else math.inf if n_targets else math.nan
    return Metrics(loss, perplexity, loss_sum / math.log(2) / n_bytes if n_bytes else None, n_targets, n_bytes)


def autocast(device: torch.device | str, precision: str) -> AbstractContextManager:
    """The context in which a forward pass runs in "bf16", "fp16" or "fp32" (no autocast)."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype)


@torch.no_grad()
def sum_losses(model: torch.nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu",
               precision: str = "fp32") -> tuple[float, int]:
    """The sum of the cross-entropies (nats) over all targets of `batches` and their number, without dropout."""
    training, losses, n_targets = model.training, [], 0
    model.eval()
    try:
        for batch in batches:
            with autocast(device, precision):
                losses.append(model(**batch.inputs(device)))
            n_targets += batch.n_targets
    finally:
        model.train(training)
    return math.fsum(torch.stack(losses).tolist() if losses else []), n_targets


def distinct(texts: Iterable[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts, given as words or ids (Li et al. 2016, distinct-1 and -2)."""
    grams = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def make_request(tokenizer: Tokenizer, task: str, turns: Sequence[Turn], n_ctx: int, sampling: Sampling,
                 n: int = 1) -> Request:
    """The request that answers a dialogue, or for an LM goes on with its turns as one text.

    Room for `max_new_tokens` (but not more than half of `n_ctx`) is kept by dropping the oldest turns. Raises UserError
    where the last turn, for an LM the text, leaves too little.
    """
    room = n_ctx - min(sampling.max_new_tokens, n_ctx // 2)
    stop = (stop_id(tokenizer, task),)
    if task == "chatlm":
        ids, types = encode_prompt(turns, [], tokenizer.cls_id, tokenizer.sep_id, room)
        return Request(ids, types, sampling, n, stop)
    text = [id for _, turn in turns for id in turn] or [tokenizer.eos_id]
    if len(text) > room:
        raise UserError(f"the text has {len(text)} tokens; wanted at most {room}, which leaves room for an answer")
    return Request(text, None, sampling, n, stop)


def answers(model: GPT2, tokenizer: Tokenizer, task: str, dialogues: Iterable[Sequence[Turn]], sampling: Sampling,
            slots: int = 16) -> list[str]:
    """What the model answers to each dialogue, or how it goes on with it."""
    requests = [make_request(tokenizer, task, turns, model.config.n_positions, sampling) for turns in dialogues]
    engine = Engine(model, min(slots, len(requests)), suppress=never_generated(model.config, tokenizer, task))
    return [tokenizer.decode(candidates[0].ids) for candidates in generate(engine, requests)]


def sample(model: GPT2, tokenizer: Tokenizer, task: str, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """What the model answers to each prompt."""
    return answers(model, tokenizer, task, [[(0, tokenizer.encode(prompt))] for prompt in prompts], sampling)
