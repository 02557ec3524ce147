"""The processes that train together: torchrun's environment variables, the device, and sums of host numbers."""

import os
import shutil
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gptchat.config import TrainConfig
from gptchat.console import UserError
from gptchat.model.gpt2 import GPT2


class World:
    """This process among all that train: its rank, their number, its device."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"train.device: found {device!r}; wanted auto, cpu or cuda ({reason})"
            ) from None
        if self.device.type == "cuda" and self.size > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.host = dist.new_group(
                backend="gloo"
            )  # numbers that stay on the host never wait for the device

    def sum(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self.host)
        return total.tolist()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def wrap_model(model: GPT2, config: TrainConfig, world: World) -> torch.nn.Module:
    """The model as it is trained: with activation checkpointing, compilation and DDP as the config says."""
    model.activation_checkpointing = config.activation_checkpointing
    trained: torch.nn.Module = model
    if config.compile and has_compiler():
        trained = torch.compile(model)  # type: ignore[assignment]
    return DistributedDataParallel(trained) if world.size > 1 else trained


def has_compiler() -> bool:
    """Whether torch.compile can work here; says so in one line if not."""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if not found:
        print(
            "train.compile: no C++ compiler found (g++ or clang++); training eagerly",
            file=sys.stderr,
        )
    return bool(found)
