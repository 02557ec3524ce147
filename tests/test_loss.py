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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, spread", [(0, 1.0), (100, 1.0), (100, 1e4)])
def test_our_cross_entropy_and_its_gradient_are_f_cross_entropys(
    dtype: torch.dtype, n: int, spread: float
) -> None:
    torch.manual_seed(0)
    logits, targets = (torch.randn(n, 311) * spread).to(dtype), torch.randint(311, (n,))
    targets[::3] = -100
    least = torch.promote_types(dtype, torch.float32)
    found, wanted = (logits.clone().requires_grad_() for _ in range(2))
    loss = summed_cross_entropy(found.clone(), targets)
    (loss * 0.3).backward()
    exact = F.cross_entropy(wanted.to(least), targets, reduction="sum")
    (exact * 0.3).backward()
    assert loss.dtype == least and torch.allclose(loss, exact, rtol=1e-6)
    assert torch.allclose(
        found.grad, wanted.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "is_before, reason",
    [(True, "modified by an inplace operation"), (False, "used after their cross-entropy")],
)
def test_logits_used_besides_the_loss_make_the_backward_pass_raise(
    is_before: bool, reason: str
) -> None:
    logits = logits_of(random_hidden())
    if is_before:
        penalty = logits.logsumexp(-1).square().sum()
    loss = summed_cross_entropy(logits, TARGETS)
    if not is_before:
        penalty = logits.logsumexp(-1).square().sum()
    with pytest.raises(RuntimeError, match=reason):
        (loss + 1e-4 * penalty).backward()


def test_second_backward_pass_and_second_derivative_raise() -> None:
    loss = summed_cross_entropy(logits_of(random_hidden()), TARGETS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    hidden = random_hidden()
    loss = summed_cross_entropy(logits_of(hidden), TARGETS)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
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


@pytest.mark.parametrize("target", [-1, V])
def test_target_that_is_no_id_is_refused_and_named(target: int) -> None:
    targets = TARGETS.clone()
    targets[4] = target
    logits = logits_of(random_hidden())
    before = logits.clone()
    with pytest.raises(ValueError, match=f"target {target}, wanted 0 to 49, or -100"):
        summed_cross_entropy(logits, targets)
    assert torch.equal(logits, before)
