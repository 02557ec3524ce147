"""Muon: momentum whose matrices are orthogonalised before each step (Jordan et al. 2024).

For a matrix W with gradient G, momentum m and learning rate lr:

    M <- m M + (1 - m) G                      the momentum
    U  = orthogonalized(m M + (1 - m) G)      Nesterov's look ahead
    W <- (1 - lr * weight_decay) W - lr * sqrt(max(1, rows / columns)) U

Unlike in torch.optim.Muon, a parameter that stacks several matrices, such as the attention's
queries, keys and values, is orthogonalised matrix by matrix (`parts`). Matrices of one shape are
orthogonalised in one batch.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ_STEPS = 5
# Coefficients of the quintic a X + b (X X^T) X + c (X X^T)^2 X (github.com/KellerJordan/Muon).
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalized(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of each matrix (N, rows, columns).

    A Newton-Schulz iteration in `dtype` moves all singular values into 0.7 to 1.2.
    """
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x.mT if is_tall else x


class Muon(Optimizer):
    """Muon for parameters of two dimensions.

    A group's `parts` is the number of matrices that each of its parameters stacks along the first
    dimension. They are orthogonalised in `dtype`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        parts: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self.dtype = dtype
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": parts}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                update = self._momentum_update(parameter, parameter.grad, group["momentum"])
                parts = group["parts"]
                for matrix, part in zip(parameter.chunk(parts), update.chunk(parts), strict=True):
                    by_shape[matrix.shape].append((matrix, part))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalized(torch.stack([part for _, part in pairs]), self.dtype)
                step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (matrix, _), update in zip(pairs, updates, strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-step_size)

    def _momentum_update(self, parameter: Tensor, gradient: Tensor, momentum: float) -> Tensor:
        """Add a gradient to the momentum; returns what is to be orthogonalised."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)
