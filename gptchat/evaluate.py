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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gptchat.batches import Batch
from gptchat.config import UserError
from gptchat.dialogue import Turn, encode_prompt
from gptchat.engine import Engine, Request
from gptchat.model import GPT2
from gptchat.pretrained import never_generated, stop_id
from gptchat.sampling import Sampling
from gptchat.tokenizer import StreamDecoder, Tokenizer


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


def batch_loss(model: torch.nn.Module, batch: Batch, device: torch.device | str) -> Tensor:
    """The sum of the cross-entropies of a batch's targets, a scalar."""
    where, targets = batch.flat_targets()
    inputs = (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.segments)
    moved = [tensor if tensor is None else tensor.to(device, non_blocking=True) for tensor in (*inputs, where, targets)]
    return model(*moved[:4], where=moved[4], targets=moved[5])


@torch.no_grad()
def sum_losses(model: torch.nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu",
               autocast: Callable[[], AbstractContextManager] = nullcontext) -> tuple[float, int]:
    """The sum of the cross-entropies (nats) over all targets of `batches` and their number, without dropout."""
    training, losses, n_targets = model.training, [], 0
    model.eval()
    try:
        for batch in batches:
            with autocast():
                losses.append(batch_loss(model, batch, device))
            n_targets += batch.n_targets
    finally:
        model.train(training)
    return (math.fsum(torch.stack(losses).tolist()) if losses else 0.0), n_targets


def distinct(texts: Iterable[Sequence], n: int) -> float:
    """Distinct n-grams over all n-grams of the texts, given as words or ids (Li et al. 2016, distinct-1 and -2)."""
    grams = [gram for text in texts for gram in zip(*(text[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def make_request(tokenizer: Tokenizer, task: str, turns: Sequence[Turn], sampling: Sampling, n_ctx: int,
                 n: int = 1) -> Request:
    """The request that answers a dialogue, or for an LM goes on with its turns as one text.

    Raises UserError where the last turn (the text) and `max_new_tokens` do not fit into `n_ctx`.
    """
    stop, room = stop_id(tokenizer, task), n_ctx - sampling.max_new_tokens
    if task == "chatlm":
        ids, types = encode_prompt(list(turns), [], tokenizer.cls_id, tokenizer.sep_id, room)
        return Request(ids, types, sampling, n, (stop,))
    text = [id for _, turn in turns for id in turn] or [tokenizer.eos_id]
    if len(text) > room:
        raise UserError(f"the text has {len(text)} tokens; wanted at most {room}, the context of {n_ctx} less "
                        f"max_new_tokens {sampling.max_new_tokens}")
    return Request(text, None, sampling, n, (stop,))


def stream(engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request],
           stop: Sequence[str] = ()) -> Iterator[tuple[int, int, str, str | None]]:
    """(request's index, candidate, new text, finish reason or None) as they come, all requests at once.

    Closing the generator cancels what is unfinished.
    """
    decoders, index = {}, {}
    try:
        for number, request in enumerate(requests):
            id = engine.submit(request)
            index[id] = number
            decoders |= {(id, candidate): StreamDecoder(tokenizer, stop) for candidate in range(request.n)}
        while decoders:
            for output in engine.step():
                key = output.request_id, output.candidate
                decoder, reason = decoders.get(key), output.finish_reason
                if decoder is None:
                    continue
                text = "" if output.token is None else decoder.push(output.token)
                if decoder.stopped and not reason:
                    engine.cancel(*key)
                    reason = "stop"
                if reason:
                    text += decoder.finish()
                    del decoders[key]
                yield index[output.request_id], output.candidate, text, reason
    finally:
        for key in decoders:
            engine.cancel(*key)


def answers(engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[str]:
    """The texts that the first candidates of many requests end with."""
    texts = [""] * len(requests)
    for number, candidate, text, _ in stream(engine, tokenizer, requests):
        texts[number] += text if candidate == 0 else ""
    return texts


def sample(model: GPT2, tokenizer: Tokenizer, task: str, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """What the model answers to each prompt, or how it goes on with it."""
    n_ctx = model.config.n_positions
    requests = [make_request(tokenizer, task, [(0, tokenizer.encode(prompt))], sampling, n_ctx) for prompt in prompts]
    engine = Engine(model, len(requests), suppress=never_generated(model.config, tokenizer, task))
    return answers(engine, tokenizer, requests)
