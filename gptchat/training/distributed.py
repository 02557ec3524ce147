"""The processes that train together: their ranks, this one's device, and sums over all of them.

Rank and number of processes are those that torchrun sets in the environment; without it there is
one process, rank 0, whose sums are its own numbers. Sums are taken on the host in float64, so they
never wait for the device. `wrap_model` prepares a model for training under this.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gptchat.config import TrainConfig
from gptchat.console import RunFailed, UserError
from gptchat.model.gpt2 import GPT2
from gptchat.runtime import end_with_parent


class World:
    """This process among all that train: its rank, their number `size`, its device."""

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = usable_device(device)
        if "RANK" in os.environ:
            end_with_parent()  # torchrun, which cannot end its processes if it is killed
        if self.size == 1:
            return
        backend = "gloo"
        if self.device.type == "cuda":
            backend = "nccl"
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group(backend)
        self.host_group = dist.new_group(backend="gloo")

    def sum(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self.host_group)
        return sums.tolist()

    def require_same_step(self, step: int, run: str) -> None:
        """Compare where each process found the run, by the checkpoint in its folder.

        Raises UserError, in all processes, where a machine has a folder `run` of its own: they
        would make different steps of one run.
        """
        steps = self.sum(*(float(step) * (rank == self.rank) for rank in range(self.size)))
        for rank, its_step in enumerate(steps):
            if its_step != steps[0]:
                raise UserError(
                    f"{run}: process 0 of {self.size} found the run at step {steps[0]:.0f}, "
                    f"process {rank} at step {its_step:.0f}; wanted one folder that all processes "
                    "share (a network file system)"
                )

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


@contextmanager
def lost_processes_in_one_line(world: World) -> Iterator[None]:
    """Raise RunFailed where another process of the run has ended, and this one waited for it."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if world.size == 1 or not is_lost:
            raise
        raise RunFailed(
            f"process {world.rank} of {world.size}: another process of the run has ended, so this "
            "one ends too; the same command goes on from the last checkpoint"
        ) from None


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises UserError if it does not work here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"train.device: found {name!r}; wanted auto, cpu or cuda ({reason})"
        ) from None
    return device


def wrap_model(model: GPT2, config: TrainConfig, world: World) -> torch.nn.Module:
    """The model as training calls it, with the same parameters.

    Activation checkpointing and compilation as the config says; DDP, which averages gradients, with
    several processes.
    """
    model.activation_checkpointing = config.activation_checkpointing
    wrapped: torch.nn.Module = model
    if config.compile and has_compiler():
        wrapped = torch.compile(model)  # type: ignore[assignment]
    if world.size > 1:
        wrapped = DistributedDataParallel(wrapped)
    return wrapped


def has_compiler() -> bool:
    """Whether torch.compile has the C++ compiler that it needs; prints one line if not."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        print(
            "train.compile: no C++ compiler found (g++ or clang++); training eagerly",
            file=sys.stderr,
        )
        return False
    return True
