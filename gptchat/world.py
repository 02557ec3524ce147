"""The processes that train together: torchrun's environment variables, the device, and sums of host numbers."""

import ctypes
import gc
import os

import torch
import torch.distributed as dist

from gptchat.config import UserError


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
            raise UserError(f"train.device: found {device!r}; wanted auto, cpu or cuda ({reason})") from None
        if self.device.type == "cuda" and self.size > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.host = dist.new_group(backend="gloo")  # numbers that stay on the host never wait for the device

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


def settle() -> None:
    """For a process that has loaded all it needs: Python's collector passes over what there is (its walks through all
    of torch cost a decoding step 6 %), and glibc keeps what is freed. Else every large tensor goes back to the kernel,
    to be faulted in again, which doubles a training step. Constants: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD."""
    gc.collect()
    gc.freeze()
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
        mallopt(parameter, value)
