"""Passes on a GPU that are recorded once and then replayed: CUDA graphs.

A decoding step launches some hundred kernels that take microseconds each, so that launching them
from Python is what takes the time. A graph launches all of them at once. It repeats what it has
recorded, at the same addresses: inputs are copied into its own tensors, shapes and numbers are
those of the recording. So there is a graph for each combination of them, recorded when it is first
met.

Not the default: no line of this has run on a GPU yet (`gptchat/README.md`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pass = Callable[..., Tensor]


@dataclass
class Recording:
    """A recorded pass: its own inputs, its output, and what computes the one from the others."""

    inputs: list[Tensor]
    output: Tensor
    replay: Callable[[], None]


def record(function: Pass, inputs: list[Tensor], length: int, pool: Any) -> Recording:
    """Record `function(*inputs, length)` on the current CUDA device, after one pass to warm up."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        function(*inputs, length)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = function(*inputs, length)
    return Recording(inputs, output, graph.replay)


class Graphs:
    """`function(*inputs, length)` of tensors and a number, recorded for each of their shapes.

    The result stands in memory that the next call of any of these graphs may overwrite. The
    function has to compute the same when it is run again on the same inputs: the first call does
    so.
    """

    def __init__(self, function: Pass):
        self.function = function
        self.recordings: dict[tuple, Recording] = {}
        self.pool: Any = None  # of memory, which the graphs share; made with the first one

    def __call__(self, *inputs: Tensor, length: int) -> Tensor:
        key = (length, *(tensor.shape for tensor in inputs))
        recording = self.recordings.get(key)
        if recording is None:
            if self.pool is None and torch.cuda.is_available():
                self.pool = torch.cuda.graph_pool_handle()
            copies = [tensor.clone() for tensor in inputs]
            recording = record(self.function, copies, length, self.pool)
            self.recordings[key] = recording
        for own, given in zip(recording.inputs, inputs, strict=True):
            own.copy_(given)
        recording.replay()
        return recording.output
