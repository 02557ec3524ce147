"""Muon against torch's own, against a singular value decomposition, and matrix by matrix."""

import pytest
import torch
from torch import nn

from gptchat.training.muon import Muon, orthogonalized


def parameters(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_singular_values_become_nearly_one_and_directions_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.mT @ orthogonalized(matrix[None])[0].float() @ right.mT  # nearly diagonal
    assert ((values.diagonal() > 0.6) & (values.diagonal() < 1.3)).all()
    assert (values - values.diagonal().diag()).abs().max() < 0.03


def test_steps_are_those_of_torch() -> None:
    """Up to bfloat16's rounding in the iteration, which is batched here."""
    shapes = [(16, 16), (64, 16), (16, 64), (16, 16)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for seed in range(5):
        step(optimizer, ours, seed)
        step(reference, theirs, seed)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 0.01 * 0.02 * 5  # a hundredth of the steps' size


def test_stacked_matrices_are_updated_as_each_alone() -> None:
    (stacked,) = parameters((48, 16))
    alone = [nn.Parameter(part.detach().clone()) for part in stacked.chunk(3)]
    together = Muon([stacked], lr=0.02, weight_decay=0.1, parts=3)
    apart = Muon(alone, lr=0.02, weight_decay=0.1)
    for seed in range(3):
        gradient = torch.randn(48, 16, generator=torch.Generator().manual_seed(seed))
        stacked.grad = gradient
        for part, part_gradient in zip(alone, gradient.chunk(3), strict=True):
            part.grad = part_gradient.clone()
        together.step()
        apart.step()
    assert torch.equal(stacked, torch.cat(alone))
