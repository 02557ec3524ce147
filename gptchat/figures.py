"""The figures of a model on text: loss, perplexity, bits per byte; of a ChatLM also its answers'.

An LM's documents, each followed by [EOS], form one stream that is cut into consecutive windows of
the context length. So every token is a target once, and the first tokens of a window have little
context. A ChatLM's targets are its responses, each followed by [CLS], unless the config says
otherwise.

Bits per byte is the loss of all targets, [EOS] included, divided by the UTF-8 bytes of their text.
Unlike loss and perplexity it may be compared between models with different tokenizers.

A ChatLM also answers up to 200 dialogues spread evenly over the text, the same way each time.
`repeats_itself` and `repeats_context` are the shares of answers in which a run of four words occurs
twice, or also in an earlier turn. In scripts that are written without spaces each character counts
as a word.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from gptchat.config import Config
from gptchat.console import Progress, UserError
from gptchat.data.batches import Batch, Batches
from gptchat.data.scripts import units
from gptchat.data.shards import Shards
from gptchat.data.tokenizer import Tokenizer
from gptchat.inference.generate import TextGenerator
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2
from gptchat.runtime import default_device
from gptchat.training.metrics import metrics, sum_losses

MAX_ANSWERS = 200  # per file
BATCH_SIZE = 8  # rows
REPEATED = 4  # words in a row that count as a repetition
Figures = dict[str, Any]  # numbers by name, in the order in which they are printed


def ngrams(text: Sequence, n: int) -> list[tuple]:
    """All runs of `n` items of a text, which is a sequence of words or ids."""
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def distinct(texts: Iterable[Sequence], n: int) -> float:
    """Distinct-n (Li et al. 2016): distinct n-grams over all n-grams of the texts; 0 without any.

    No n-gram spans two texts.
    """
    found = list(chain.from_iterable(ngrams(text, n) for text in texts))
    return len(set(found)) / max(1, len(found))


def repeats_itself(text: Sequence) -> bool:
    found = ngrams(text, REPEATED)
    return len(set(found)) < len(found)


def repeats_context(text: Sequence, context: Sequence) -> bool:
    return not set(ngrams(context, REPEATED)).isdisjoint(ngrams(text, REPEATED))


def of_text(model: GPT2, config: Config, text: Shards, tokenizer: Tokenizer, name: str) -> Figures:
    figures = loss_figures(model, config, text, tokenizer, name)
    if config.task == "chatlm":
        figures |= answer_figures(model, text, tokenizer)
    return figures


def loss_figures(
    model: GPT2, config: Config, split: Shards, tokenizer: Tokenizer, name: str
) -> Figures:
    n_ctx = model.config.n_positions
    if config.model.n_ctx:
        n_ctx = min(config.model.n_ctx, n_ctx)
    batches = Batches([split], tokenizer, n_ctx, BATCH_SIZE, targets=config.data.held_out_targets)
    device = model.wte.weight.device
    loss_sum, n_targets = sum_losses(model, with_progress(batches, name), device)
    return asdict(metrics(loss_sum, n_targets, batches.n_bytes))


def with_progress(batches: Batches, name: str) -> Iterator[Batch]:
    with Progress(batches.rows_per_epoch, name, "row") as bar:
        for batch in batches.evaluation():
            yield batch
            bar.update(len(batch.input_ids))


def answer_figures(model: GPT2, split: Shards, tokenizer: Tokenizer) -> Figures:
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


def load(directory: str, task: str = "") -> tuple[GPT2, Tokenizer, str]:
    """The model to evaluate, its tokenizer and its task, which must be `task` if that is given."""
    model, tokenizer, found = pretrained.load_model(directory, default_device())
    if task and found != task:
        raise UserError(f"{directory}: found a model of task {found}; wanted {task}")
    if not 0 <= tokenizer.eos_id < model.config.vocab_size:
        raise UserError(
            f"{directory}: found no [EOS] or <|endoftext|> in the vocabulary; "
            "wanted one to end documents"
        )
    return model, tokenizer, found
