"""Our GPT-2 beside transformers': logits, loss, gradients, optimizer steps, cache."""

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel

from gptchat.config import TrainConfig
from gptchat.model import pretrained
from gptchat.model.gpt2 import GPT2
from gptchat.model.kv_cache import KVCache
from gptchat.model.weights import conv1d_layout
from gptchat.training.optim import BETAS, make_optimizers
from tests.hf_models import close, random_gpt2, write

torch.set_num_threads(1)
TYPE_ROWS = (7, 290)  # not 0 and 1: the mapping must matter
BOUND = {torch.float64: 1e-9, torch.float32: 1e-5}


class Pair(NamedTuple):
    theirs: GPT2LMHeadModel
    ours: GPT2
    dtype: torch.dtype


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("exact"), torch.float64)


def make_pair(directory: Path, dtype: torch.dtype) -> Pair:
    theirs = random_gpt2(1, dtype, gptchat={"task": "chatlm", "type_rows": TYPE_ROWS})
    ours, _, task = pretrained.load_model(write(theirs, directory), dtype=dtype)
    assert task == "chatlm" and ours.config.type_rows == TYPE_ROWS
    return Pair(theirs, ours, dtype)


def batch(seed: int, rows: int = 3, length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, types 0 and 1 in runs, and labels with a third of the positions masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (rows, length), generator=generator)
    types = (torch.rand(rows, length, generator=generator) < 0.2).cumsum(1) % 2
    labels = ids.masked_fill(torch.rand(rows, length, generator=generator) < 0.3, -100)
    return ids, types, labels


def as_rows(types: Tensor | None) -> Tensor | None:
    """Token types as callers of transformers pass them: rows of the embedding."""
    return None if types is None else torch.tensor(TYPE_ROWS)[types]


def our_loss(model: GPT2, ids: Tensor, types: Tensor | None, labels: Tensor) -> Tensor:
    targets = torch.cat([labels[:, 1:], torch.full((len(ids), 1), -100)], 1).flatten()
    positions = (targets != -100).nonzero().squeeze(1)
    loss_sum = model(ids, targets[positions], positions, types)
    return loss_sum / len(positions)


def their_loss(pair: Pair, ids: Tensor, types: Tensor | None, labels: Tensor) -> Tensor:
    output = pair.theirs(ids, token_type_ids=as_rows(types), labels=labels)
    if pair.dtype == torch.float32:
        return output.loss
    return F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )  # theirs rounds to float32


@pytest.mark.parametrize("typed", [False, True], ids=["no types", "types"])
def test_logits_equal_those_of_transformers(pair: Pair, typed: bool) -> None:
    ids, types, _ = batch(0)
    chosen = types if typed else None
    with torch.no_grad():
        found = pair.ours.logits(pair.ours.hidden(ids, chosen))
        wanted = pair.theirs(ids, token_type_ids=as_rows(chosen)).logits
    assert found.shape == wanted.shape == (3, 40, 300) and wanted.std() > 0.5
    assert close(found, wanted, BOUND[pair.dtype])


def test_types_change_the_logits_and_none_is_not_type_0(exact: Pair) -> None:
    ids, types, _ = batch(0)
    with torch.no_grad():
        hidden = [
            exact.ours.hidden(ids, chosen) for chosen in (None, types, torch.zeros_like(types))
        ]
    assert not close(hidden[0], hidden[1], 1e-2) and not close(hidden[0], hidden[2], 1e-2)


@pytest.mark.parametrize("typed", [False, True], ids=["no types", "types"])
def test_loss_and_gradients_equal_those_of_transformers(pair: Pair, typed: bool) -> None:
    ids, types, labels = batch(1)
    chosen, bound = types if typed else None, BOUND[pair.dtype]
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    found = our_loss(pair.ours, ids, chosen, labels)
    wanted = their_loss(pair, ids, chosen, labels)
    found.backward()
    wanted.backward()
    assert close(found, wanted, bound)
    assert_parameters_agree(pair, bound, gradients=True)


def assert_parameters_agree(pair: Pair, bound: float, gradients: bool) -> None:
    theirs = {name.removeprefix("transformer."): p for name, p in pair.theirs.named_parameters()}
    ours = dict(pair.ours.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        found, wanted = (p.grad if gradients else p.detach() for p in (parameter, theirs[name]))
        assert found is not None and wanted is not None, name
        found = conv1d_layout(name, found)
        if name.endswith(
            "c_attn.bias"
        ):  # softmax does not see a key bias: its gradient is zero but for rounding
            (query, key, value), (query2, key2, value2) = found.chunk(3), wanted.chunk(3)
            assert (key - key2).abs().max() <= bound, name
            found, wanted = torch.cat([query, value]), torch.cat([query2, value2])
        assert close(found, wanted, bound), name


def test_three_adamw_steps_give_equal_losses_and_weights(pair: Pair) -> None:
    pair = Pair(copy.deepcopy(pair.theirs), copy.deepcopy(pair.ours), pair.dtype)
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1)
    optimizers = [make_optimizers(pair.ours, config), their_optimizer(pair.theirs, config)]
    for step in range(3):
        ids, types, labels = batch(step)
        losses = [our_loss(pair.ours, ids, types, labels), their_loss(pair, ids, types, labels)]
        for loss in losses:
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert abs(losses[0] - losses[1]) <= 1e-6, step
    if pair.dtype == torch.float64:
        assert_parameters_agree(pair, 1e-9, gradients=False)


def their_optimizer(model: GPT2LMHeadModel, config: TrainConfig) -> torch.optim.Optimizer:
    """As transformers' Trainer groups them: no decay for biases and LayerNorm."""
    plain = {name for name, _ in model.named_parameters() if "bias" in name or "ln_" in name}
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if (name in plain) == group],
            "weight_decay": 0.0 if group else config.weight_decay,
        }
        for group in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS, fused=False)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(chunks=st.lists(st.integers(1, 17), min_size=1, max_size=12), typed=st.booleans())
def test_logits_with_a_cache_in_any_split_equal_those_without(
    exact: Pair, chunks: list[int], typed: bool
) -> None:
    ids, types, _ = batch(2, rows=2)
    chunks = [*chunks, 40]
    with torch.no_grad():
        wanted = exact.ours.logits(exact.ours.hidden(ids, types if typed else None))
        found, start, cache = [], 0, dirty_cache(exact, slots=4)
        for chunk in chunks:
            new = slice(start, min(start + chunk, 40))
            n = new.stop - new.start
            if n:
                view = cache.view(1, torch.full((2,), start), n, new.stop)
                found.append(
                    exact.ours.logits(
                        exact.ours.hidden(ids[:, new], types[:, new] if typed else None, cache=view)
                    )
                )
            start = new.stop
    assert close(torch.cat(found, 1), wanted, 1e-9)


def dirty_cache(pair: Pair, slots: int) -> KVCache:
    """A cache that others have used before: what stands in it must not matter."""
    cache = pair.ours.kv_cache(slots, 48, pair.dtype)
    cache.kv.normal_(0, 5)
    return cache
