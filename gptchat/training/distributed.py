"""The processes that train together: their ranks, this one's device, and sums over all of them.

torchrun sets rank and number of processes in the environment; without it there is one process, rank
0. Under torchrun even a single process has a process group and uses DDP. Sums are taken on the host
in float64.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gptchat.config import TrainConfig
from gptchat.console import RunFailed, UserError, first_line
from gptchat.model.gpt2 import GPT2
from gptchat.runtime import end_with_parent


class World:
    """This process among all that train: its rank, their number `size`, its device."""

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.has_group = "RANK" in os.environ
        if not self.has_group:
            self.device = usable_device(device)
            return
        end_with_parent()  # torchrun, which cannot end its processes if it is killed
        self.device = usable_device(device, int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.host_group = dist.new_group(backend="gloo")
        self.patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def first(self, work: Callable[[], object]) -> None:
        """Let process 0 do some work, while the others wait for it, however long it takes."""
        if self.rank == 0:
            work()
        if self.size > 1:
            dist.barrier(self.patient_group)

    def sum(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self.host_group)
        return sums.tolist()

    def require_same_step(self, step: int, run: str) -> None:
        """Raise UserError in all processes unless each found the run at the same step.

        They differ if the machines do not share the folder `run`.
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
        if self.has_group:
            dist.destroy_process_group()


@contextmanager
def lost_processes_in_one_line(world: World) -> Iterator[None]:
    """Raise RunFailed if another process of the run ends while this one waits for it."""
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


def usable_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device of that name; "auto" is CUDA if there is a GPU, else the CPU.

    With `local_rank`, a process takes the GPU of that number. It becomes the current device, or
    every process would hold memory of GPU 0, too. Raises UserError for a device that does not work.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            index = device.index if local_rank is None else local_rank
            device = torch.device("cuda", index or 0)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"train.device: found {name!r}; wanted auto, cpu or cuda ({first_line(error)})"
        ) from None
    return device


def wrap_model(
    model: GPT2, config: TrainConfig, world: World, varying: Sequence[str] = ()
) -> torch.nn.Module:
    """The model as training calls it: compiled if the config says so, in DDP under torchrun.

    `varying` are the dimensions of its arguments that differ from batch to batch, as
    `torch.compiler.config.dynamic_sources` names them. Others are compiled for each size anew.
    """
    wrapped: torch.nn.Module = model
    if config.compile and has_compiler(world.device):
        torch.compiler.config.dynamic_sources = ",".join(varying)
        wrapped = torch.compile(model)  # type: ignore[assignment]
    if world.has_group:
        # The only buffer is `type_rows`, which never changes.
        wrapped = DistributedDataParallel(wrapped, forward_sync_buffers=False)
    return wrapped


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler that it needs; prints one line if not."""
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cuda":  # Triton writes C
        names = [os.environ.get("CC", ""), "gcc", "clang"]
    if any(map(shutil.which, names)):
        return True
    wanted = " or ".join(names[1:])
    print(f"train.compile: found no compiler ({wanted}); training eagerly", file=sys.stderr)
    return False
