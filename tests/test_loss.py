"""CrossEntropy, which overwrites its logits: what goes wrong with them is never silent."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptchat.model.loss import summed_cross_entropy

V = 50


def logits_of(hidden: Tensor) -> Tensor:
    """(N, V), not a leaf of the graph: as the model makes them."""
    weight = torch.randn(V, hidden.shape[1], generator=torch.Generator().manual_seed(1))
    return F.linear(hidden, weight.to(hidden.dtype))


def random_hidden(n: int = 7) -> Tensor:
    hidden = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return hidden.requires_grad_()


TARGETS = torch.tensor([0, 5, -100, 49, 3, -100, 7])


def test_logits_used_after_the_loss_make_the_backward_pass_raise() -> None:
    logits = logits_of(random_hidden())
    loss = summed_cross_entropy(logits, TARGETS)
    penalty = logits.logsumexp(-1).square().sum()
    with pytest.raises(RuntimeError, match="logits were used after their cross-entropy"):
        (loss + 1e-4 * penalty).backward()


def test_logits_used_before_the_loss_make_the_backward_pass_raise() -> None:
    logits = logits_of(random_hidden())
    penalty = logits.logsumexp(-1).square().sum()
    loss = summed_cross_entropy(logits, TARGETS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + 1e-4 * penalty).backward()


def test_logits_that_only_another_loss_uses_later_make_the_backward_pass_raise() -> None:
    logits = logits_of(random_hidden())
    summed_cross_entropy(logits, TARGETS)
    with pytest.raises(RuntimeError, match="logits were used after their cross-entropy"):
        F.cross_entropy(logits, TARGETS).backward()


def test_second_backward_pass_raises() -> None:
    loss = summed_cross_entropy(logits_of(random_hidden()), TARGETS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("train_the_head", [False, True])
def test_second_derivative_raises(train_the_head: bool) -> None:
    hidden = random_hidden()
    head = torch.randn(V, 4, generator=torch.Generator().manual_seed(1))
    loss = summed_cross_entropy(hidden @ head.requires_grad_(train_the_head).T, TARGETS)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_logits_that_are_a_parameter_are_refused() -> None:
    logits = torch.zeros(len(TARGETS), V, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        summed_cross_entropy(logits, TARGETS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_of_a_row_that_does_not_count_do_not_matter(bad: float) -> None:
    results = []
    for number in (0.0, bad):
        hidden = random_hidden()
        logits = logits_of(hidden)
        added = torch.zeros(len(TARGETS), 1).masked_fill((TARGETS == -100)[:, None], number)
        loss = summed_cross_entropy(logits + added, TARGETS)  # whose gradient reaches `hidden`
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None
    assert torch.equal(results[0][1], results[1][1])


def test_nan_in_a_row_that_counts_makes_the_loss_nan() -> None:
    logits = logits_of(random_hidden()).detach()
    logits[1, 30] = math.nan
    assert summed_cross_entropy(logits, TARGETS).isnan()


@pytest.mark.parametrize("target", [-1, -99, -101, V, V + 1])
def test_target_that_is_no_id_is_refused_and_named(target: int) -> None:
    targets = TARGETS.clone()
    targets[4] = target
    logits = logits_of(random_hidden())
    before = logits.clone()
    with pytest.raises(ValueError, match=f"target {target}, wanted 0 to 49, or -100"):
        summed_cross_entropy(logits, targets)
    assert torch.equal(logits, before)
