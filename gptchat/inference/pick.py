"""Which of several complete answers is given.

first: the first one. median: the one of median length, as in the original program. mmi: the one
with the highest mutual information with its context. A likely answer fits many contexts; mmi looks
for one that is likelier after this context than after none, and that makes the context likely:

    (log p(answer | context) - 0.7 log p(answer)) / (tokens + 5) + 0.1 log p(context | answer)

Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016), has
both objectives; the weights were chosen for the default model. p(answer) is the probability of the
answer as the reply to an empty turn, p(context | answer) that of the context's last turn as the
reply to the answer. The latter needs a ChatLM that has learned the turns of both speakers, or
speakers who talk alike. An empty answer comes last, and so does one that an earlier turn has given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptchat.inference.request import Ids
from gptchat.model.gpt2 import GPT2

PICKS = ("first", "median", "mmi")
CANDIDATES = 5  # the original's default, if the model gives none
PRIOR_WEIGHT = 0.7
CONTEXT_WEIGHT = 0.1
LENGTH_OFFSET = 5  # tokens
TOKENS_AT_ONCE = 512  # of a pass, with padding
LOGITS_AT_ONCE = 256  # positions whose logits (x V) are in memory together


def nearest_to_median(texts: Sequence[str]) -> list[int]:
    """The numbers of the texts, the median length (the longer of two) first, and outwards."""
    by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    middle = len(texts) // 2
    places = sorted(range(len(texts)), key=lambda place: abs(place - middle))
    return [by_length[place] for place in places]


def turns_of(prompt: Ids, sep_id: int) -> list[list[int]]:
    """The turns of a ChatLM's prompt; the last one is what the answer begins with, mostly []."""
    turns: list[list[int]] = [[]]
    for id in prompt:
        if id == sep_id:
            turns.append([])
        else:
            turns[-1].append(id)
    return turns


def mutual_information(
    model: GPT2, sep_id: int, context: Ids, answers: Sequence[Ids], logprobs: Sequence[float]
) -> list[float]:
    """The score of each answer; higher is better.

    `answers` include the id that ended them; `logprobs` are their log-probabilities after the
    context.
    """
    n = len(answers)
    turns = [*[()] * n, *answers]
    logprobs_of_replies = reply_logprobs(model, sep_id, turns, [*answers, *[context] * n])
    prior, backward = logprobs_of_replies[:n], logprobs_of_replies[n:]
    scores = []
    for answer, logprob, alone, of_context in zip(answers, logprobs, prior, backward, strict=True):
        information = (logprob - PRIOR_WEIGHT * alone) / (len(answer) + LENGTH_OFFSET)
        scores.append(information + CONTEXT_WEIGHT * of_context)
    return scores


@torch.inference_mode()
def reply_logprobs(
    model: GPT2, sep_id: int, turns: Sequence[Ids], replies: Sequence[Ids]
) -> list[float]:
    """log p(reply | turn) of each pair. `turn [SEP] reply` must fit into the model's context.

    Pairs of similar length share a pass.
    """
    lengths = [len(turn) + 1 + len(reply) for turn, reply in zip(turns, replies, strict=True)]
    by_length = sorted(range(len(lengths)), key=lambda pair: lengths[pair])
    logprobs = [0.0] * len(lengths)
    while by_length:
        width = lengths[by_length[-1]]
        part = by_length[-max(1, TOKENS_AT_ONCE // width) :]
        del by_length[-len(part) :]
        sums = _score_rows(
            model, sep_id, [turns[pair] for pair in part], [replies[pair] for pair in part], width
        )
        for pair, logprob in zip(part, sums, strict=True):
            logprobs[pair] = logprob
    return logprobs


def _score_rows(
    model: GPT2, sep_id: int, turns: Sequence[Ids], replies: Sequence[Ids], width: int
) -> list[float]:
    device = model.wte.weight.device
    input_ids = torch.zeros(len(turns), width, dtype=torch.int64)
    types = torch.zeros_like(input_ids)
    is_reply = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, (turn, reply) in enumerate(zip(turns, replies, strict=True)):
        start, end = len(turn) + 1, len(turn) + 1 + len(reply)
        input_ids[row, :end] = torch.tensor([*turn, sep_id, *reply])
        types[row, len(turn) :] = 1
        is_reply[row, start:end] = True
    rows, positions = is_reply.nonzero(as_tuple=True)  # of the ids to be scored
    targets = input_ids[rows, positions].to(device)
    hidden = model.hidden(input_ids.to(device), types.to(device))  # (N, T, C)
    states = hidden[rows.to(device), (positions - 1).to(device)]
    scored: list[Tensor] = []
    for some, ids in zip(states.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True):
        logprobs = model.logits(some).float().log_softmax(-1)
        scored.append(logprobs.gather(1, ids[:, None])[:, 0])
    sums = torch.zeros(len(turns), dtype=torch.float64)
    if scored:
        sums.index_add_(0, rows, torch.cat(scored).double().cpu())
    return sums.tolist()
