"""Fast linear layers for inference, and the only home of private torch APIs.

`prepare_for_inference` casts a model's parameters and, on a CPU, replaces its nn.Linear modules, in
place. A decoding step reads every weight once, so its speed depends on memory bandwidth and the
layout of the weights. float32 and bfloat16 are packed into oneDNN's blocked layout, int8 into
FBGEMM's (one row through all layers of GPT-2 124M on two cores: 10, 5.1 and 3.6 ms). Everything
else on a CPU is float32, except the token embedding, which is bfloat16 with bfloat16 and int8. The
KV cache is float32 too: with a single query SDPA reads a bfloat16 cache nine times slower.

The kernels are private parts of torch, which may change with any release. So each is compared with
F.linear on a small layer, once per process, before layers are packed. Where it is missing, raises
or disagrees, F.linear takes its place and one line on stderr says so. (A CPU for which oneDNN has
no such kernel uses F.linear without a message.)

Invariants: a layer's output row does not depend on what the other rows hold, and the parameters
that the model had are never written to: other models may share them. With int8, whose sums are of
integers, nor does it depend on the number of rows; oneDNN chooses its order of summation by that
number, which moves float32 by 1e-6 of the largest output and bfloat16 by its own rounding.
"""

import sys
import warnings
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptchat.console import UserError
from gptchat.model.gpt2 import GPT2
from gptchat.runtime import multiplies_bfloat16

DTYPES = ("float32", "bfloat16", "int8")
# What F.linear computes in, where it replaces the kernel of a dtype
PLAIN_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
# How far an output row may be from F.linear's in the self-test: relative, in the 2-norm
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05}
# A context in which torch looks for no `__torch_function__` of arguments: 7 us a packed weight.
without_torch_function = getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)


def cast_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    return bias.detach().to(dtype)


class PlainLinear:
    """y = x W^T + b of float32 rows, by F.linear in `dtype`. Returns float32.

    The kernels are compared with this layer, and it replaces those that cannot be used.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.dtype = dtype
        self.weight = weight.to(dtype)  # (out, in)
        self.bias = cast_bias(bias, dtype)  # (out,)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias).float()


class PackedLinear(PlainLinear):
    """The same by oneDNN, from weights in its own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(weight, bias, dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.kernel = torch.ops.mkldnn._linear_pointwise.default._op

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return self.kernel(x, self.weight, self.bias, "none", [], "").float()


class Int8Linear:
    """y = x W^T + b of float32 rows, by FBGEMM in 8 bits: W has a scale per output, x one per row.

    FBGEMM's kernel quantizes x itself, but with one scale for all rows. So each row is divided by
    its largest absolute value first, and x in [-1, 1] becomes an integer in [-127, 127]. W has one
    bit less on a CPU without VNNI, whose instructions add two products, with x in [1, 255], in 16
    bits. (One bit less for x instead would be three times as inexact: x has larger outliers.)
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        largest_integer = 127 if torch.cpu._is_vnni_supported() else 64  # 2 * 255 * 64 < 2 ** 15
        weight = weight.float()  # (out, in)
        scales = weight.abs().amax(1).clamp_min(1e-30) / largest_integer  # (out,)
        integers = (weight / scales[:, None]).round().to(torch.int8)
        zero_points = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():  # torch means to drop quantized tensors
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(
                integers, scales.double(), zero_points, 0
            )
        self.weight = torch.ops.quantized.linear_prepack(quantized, None)
        # `_op` skips the operator's search for arguments that override it: 2 us a call
        self.kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op
        self.bias = cast_bias(bias, torch.float32)  # (out,)

    def __call__(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        # The kernel's input is unsigned: after x come its scale and zero point. A row of zeros
        # gives 0 / 0 = NaN, which the kernel turns into some integer; times `largest` = 0 it is 0
        # again.
        y = self.kernel(x / largest, 1 / 127, 128, self.weight)
        if self.bias is None:
            return y.mul_(largest)
        return torch.addcmul(self.bias, y, largest)


FastLinear = PlainLinear | Int8Linear


def fast_linear(linear: nn.Linear, dtype: str) -> FastLinear:
    """A layer for float32 rows on a CPU: `linear` in `dtype`.

    Where the kernel does not work it is a PlainLinear, which computes int8 in float32.
    """
    weight = linear.weight.detach()
    if kernel_works(dtype):
        return _kernel_linear(weight, linear.bias, dtype)
    return PlainLinear(weight, linear.bias, PLAIN_DTYPE[dtype])


def _kernel_linear(weight: Tensor, bias: Tensor | None, dtype: str) -> FastLinear:
    if dtype == "int8":
        return Int8Linear(weight, bias)
    return PackedLinear(weight, bias, PLAIN_DTYPE[dtype])


@cache
def kernel_works(dtype: str) -> bool:
    """Whether the kernel gives what F.linear gives. It is tried once per process, on a small layer.

    A failure is reported on stderr. That oneDNN has no kernel of this dtype for the machine is not
    a failure.
    """
    try:
        if dtype != "int8" and not onednn_supports(PLAIN_DTYPE[dtype]):
            return False
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(48, 64, generator=generator)
        weight[0] = 4.0  # equal numbers become the largest products, which saturate first
        x = torch.cat([torch.randn(1, 64, generator=generator), torch.full((1, 64), 100.0)])
        for bias in (weight[:, 0].contiguous(), None):
            expected = PlainLinear(weight, bias, torch.float32)(x)  # (2, 48)
            difference = _kernel_linear(weight, bias, dtype)(x) - expected
            error = (difference.norm(dim=1) / expected.norm(dim=1)).max().item()
            if not error <= TOLERANCE[dtype]:
                raise ArithmeticError(f"differs from F.linear by {error:.1%}")
    except Exception as error:  # a private API that has changed may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(
            f"warning: torch {torch.__version__} lacks the {dtype} kernel as gptchat knows it; "
            f"F.linear takes its place, which is slower ({reason:.200})",
            file=sys.stderr,
        )
        return False
    return True


def onednn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for float32 or bfloat16 on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _best_dtype(device: torch.device) -> str:
    """What is fastest on the device: int8 or bfloat16 if it multiplies that, else float32."""
    if device.type == "cpu" and _has_fbgemm():
        return "int8"
    if multiplies_bfloat16(device):
        return "bfloat16"
    return "float32"


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def pack_layers(model: GPT2, dtype: str) -> None:
    """Replace every nn.Linear by a fast layer."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                delattr(module, name)  # calling what is no module takes 3 us less
                setattr(module, name, fast_linear(child, dtype))


@torch.no_grad()
def prepare_for_inference(model: GPT2, dtype: str = "float32") -> torch.dtype:
    """Make the model fast to generate with, in place. Returns the dtype for its KV cache.

    `dtype` is one of `DTYPES`, or "auto": int8 on an x86 CPU, else bfloat16 where the device
    multiplies it (a GPU since Ampere), else float32. The modules get new parameters: another model
    that shares the old ones is not changed.

    On a CPU the linear layers are packed, the token embedding becomes bfloat16 if the dtype is
    bfloat16 or int8, and all else float32. So each weight is in memory once, except the table that
    embedding and head share: rows cannot be read out of the packed layout. On other devices
    everything becomes float32 or bfloat16.

    Raises UserError for another dtype, and for int8 where there is no FBGEMM (not an x86 CPU).
    """
    device = model.wte.weight.device
    on_cpu = device.type == "cpu"
    if dtype == "auto":
        dtype = _best_dtype(device)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; wanted auto, {', '.join(DTYPES)}")
    if dtype == "int8" and not (on_cpu and _has_fbgemm()):
        raise UserError("dtype is 'int8', which needs an x86 CPU; wanted float32 or bfloat16")
    if on_cpu:
        pack_layers(model, dtype)
    embedding = torch.bfloat16
    if dtype == "float32":
        embedding = torch.float32
    activations = embedding
    if on_cpu:
        activations = torch.float32
    _cast_parameters(model, embedding, activations)
    return activations


def _cast_parameters(model: GPT2, embedding: torch.dtype, others: torch.dtype) -> None:
    """Give the modules new parameters: the token embedding as `embedding`, the rest as `others`."""
    # id of an old parameter -> the new one, so that what is tied stays tied
    cast: dict[int, nn.Parameter] = {}
    for module in model.modules():
        dtype = embedding if module is model.wte else others
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in cast:
                values = parameter.detach().to(dtype)
                cast[id(parameter)] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, cast[id(parameter)])
