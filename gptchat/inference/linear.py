"""Fast linear layers for inference, behind one seam: `prepare` swaps the nn.Linear modules of a model in place.

A decoding step reads every weight once, so on a CPU it is as fast as memory and the weights' layout allow: they are
packed once, as float32 or bfloat16 into oneDNN's blocked layout, as int8 into FBGEMM's (all layers of GPT-2 124M, two
cores: 10, 5.1 and 3.6 ms for one row). All else on a CPU is float32 in every dtype, the KV cache too:
with one query row SDPA reads a float32 cache at the memory's speed, a bfloat16 one nine times slower.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptchat.console import UserError
from gptchat.model.gpt2 import GPT2, gelu_tanh

DTYPES = ("float32", "bfloat16", "int8")


class PackedLinear(nn.Module):
    """y = x W^T + b of float32 rows, computed in `dtype`; with `gelu`, GPT-2's gelu of that, left in `dtype`. Where
    oneDNN is missing, it is F.linear."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        self.dtype, self.weight, self.gelu = dtype, linear.weight.detach().to(dtype), gelu  # (N, K)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.packed = packs(dtype)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.kernel = torch.ops.mkldnn._linear_pointwise.default._op

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return gelu_tanh(y) if self.gelu else y.float()
        if self.gelu:
            return self.kernel(x, self.weight, self.bias, "gelu", [], "tanh")
        return self.kernel(x, self.weight, self.bias, "none", [], "").float()


class Int8Linear(nn.Module):
    """y = x W^T + b of float32 rows, W in 8 bits with a scale per output, x in 8 bits with a scale per row: what comes
    out of a row does not depend on its neighbours.

    FBGEMM's kernel rounds x itself, to levels x + levels + 1, but with one scale for all rows; so each row comes
    divided by its largest. `levels` is 127; 63 where the CPU lacks VNNI, whose predecessor saturates.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63
        steps = weight.abs().amax(1).clamp_min(1e-30) / 127  # (N,)
        levels = (weight / steps[:, None]).round().to(torch.int8)  # (N, K)
        with warnings.catch_warnings():  # a later torch may lack quantized tensors; ours is pinned
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(steps), dtype=torch.int64)
            quantized = torch._make_per_channel_quantized_tensor(levels, steps.double(), zeros, 0)
        self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        # `_op` is what the operator calls, 2 us later, once it has looked for arguments of its own kind
        self.kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        y = self.kernel(
            x / largest, 1 / self.levels, self.levels + 1, self.weight
        )  # of 0 / 0 any number, times 0
        return y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels of that dtype here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model: GPT2, dtype: str) -> None:
    """Swap every nn.Linear for a fast layer, which takes over GPT-2's gelu where one follows and its kernel has it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                gelu = dtype != "int8" and name == "c_fc" and parent.activation is gelu_tanh
                fast = (
                    Int8Linear(child)
                    if dtype == "int8"
                    else PackedLinear(child, getattr(torch, dtype), gelu)
                )
                setattr(parent, name, fast)
                if gelu:
                    parent.activation = nn.Identity()


@torch.no_grad()
def prepare(model: GPT2, dtype: str = "float32") -> torch.dtype:
    """Make the model ready to generate where it stands, in place, and return the dtype of its activations, and so of a
    KV cache. Its parameters themselves stay as they are, so that another model that shares them is not changed.

    On a CPU the linear layers are packed, with bfloat16 and int8 the token embedding becomes bfloat16, all else is
    float32. So weights are held once, but for the tied table of embedding and head, whose rows the packed
    layout does not give out. On other devices everything becomes float32 or bfloat16; int8 is refused (UserError).
    "auto" is bfloat16 where the device multiplies it (a GPU since Ampere, a CPU with AVX512-BF16), else float32.
    """
    on_cpu = model.wte.weight.device.type == "cpu"
    if dtype == "auto":
        native = torch.cpu._is_avx512_bf16_supported() if on_cpu else torch.cuda.is_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; wanted auto, {', '.join(DTYPES)}")
    if dtype == "int8" and not (on_cpu and "fbgemm" in torch.backends.quantized.supported_engines):
        raise UserError("dtype is 'int8', which needs an x86 CPU; wanted float32 or bfloat16")
    if on_cpu:
        pack(model, dtype)
    activations = torch.float32 if on_cpu or dtype == "float32" else torch.bfloat16
    cast: dict[int, nn.Parameter] = {}  # by identity, so that what is tied stays tied
    for module in model.modules():
        to = torch.bfloat16 if dtype != "float32" and module is model.wte else activations
        for name, parameter in module.named_parameters(recurse=False):
            values = nn.Parameter(parameter.detach().to(to), requires_grad=False)
            setattr(module, name, cast.setdefault(id(parameter), values))
    return activations
