"""Fast linear layers for inference, and the only home of private torch APIs.

A decoding step reads every weight once, so its speed depends on memory bandwidth and the layout of
the weights: oneDNN's for float32 and bfloat16, FBGEMM's for int8. (One row through all layers of
GPT-2 124M takes 10, 5.1 and 3.6 ms on two cores.)

The kernels are private parts of torch, which may change with any release. So each is compared with
F.linear on a small layer, once per process. If it is missing, raises or disagrees, F.linear takes
its place and one line on stderr says so.

Invariants: an output row does not depend on the contents of other rows, with int8 not on their
number either (oneDNN chooses its order of summation by it). The parameters that the model had are
never written to, since other models may share them.
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
# What F.linear computes in when it replaces the kernel of a dtype
PLAIN_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
# How far an output row may be from F.linear's in the self-test: relative, in the 2-norm
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05}
# A context in which torch looks for no `__torch_function__` of arguments: 7 us a packed weight
without_torch_function = getattr(torch._C, "DisableTorchFunctionSubclass", nullcontext)


class PlainLinear:
    """y = x W^T + b of float32 rows, by F.linear in `dtype`. Returns float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.dtype = dtype
        self.weight = weight.to(dtype)  # (out, in)
        self.bias = None if bias is None else bias.detach().to(dtype)  # (out,)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight, self.bias).float()


class PackedLinear(PlainLinear):
    """The same by oneDNN, from weights in its own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__(weight, bias, dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self.kernel = torch.ops.mkldnn._linear_pointwise.default._op

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel(x.to(self.dtype), self.weight, self.bias, "none", [], "").float()


class Int8Linear:
    """y = x W^T + b of float32 rows, by FBGEMM in 8 bits: W has a scale per output, x one per row.

    FBGEMM's kernel quantizes x with one scale for all rows, so each row is first divided by its
    largest absolute value. W has one bit less on a CPU without VNNI, whose instructions add two
    products, with x in [1, 255], in 16 bits.
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
        self.bias = None if bias is None else bias.detach().float()  # (out,)

    def __call__(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        # After x come its scale and zero point. A row of zeros is 0 / 0 = NaN, which becomes some
        # integer; times `largest` it is 0 again.
        y = self.kernel(x / largest, 1 / 127, 128, self.weight)
        if self.bias is None:
            return y.mul_(largest)
        return torch.addcmul(self.bias, y, largest)


FastLinear = PlainLinear | Int8Linear


def fast_linear(linear: nn.Linear, dtype: str) -> FastLinear:
    """`linear` in `dtype` for float32 rows on a CPU; a PlainLinear if the kernel does not work."""
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
    """Whether the kernel agrees with F.linear on a small layer. A failure is reported on stderr.

    A CPU for which oneDNN has no kernel of this dtype is not a failure.
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


def _pack_layers(model: GPT2, dtype: str) -> None:
    """Replace every nn.Linear by a fast layer, which is no module: calling one takes 3 us more."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                delattr(module, name)
                setattr(module, name, fast_linear(child, dtype))


@torch.no_grad()
def prepare_for_inference(model: GPT2, dtype: str = "float32") -> torch.dtype:
    """Make the model fast to generate with, in place. Returns the dtype for its KV cache.

    `dtype` is one of `DTYPES`, or "auto": int8 on an x86 CPU, else bfloat16 if the device
    multiplies it, else float32. On a CPU it packs the linear layers. The token embedding is
    bfloat16 or float32 there, the rest float32, also the KV cache: SDPA reads a bfloat16 cache nine
    times slower. Raises UserError for another dtype, and for int8 on another CPU.
    """
    device = model.wte.weight.device
    on_cpu = device.type == "cpu"
    has_int8 = on_cpu and "fbgemm" in torch.backends.quantized.supported_engines
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
        if has_int8:
            dtype = "int8"
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; wanted auto, {', '.join(DTYPES)}")
    if dtype == "int8" and not has_int8:
        raise UserError("dtype is 'int8', which needs an x86 CPU; wanted float32 or bfloat16")
    embedding = torch.float32 if dtype == "float32" else torch.bfloat16
    activations = embedding
    if on_cpu:
        _pack_layers(model, dtype)
        activations = torch.float32
    _cast_parameters(model, embedding, activations)
    return activations


def _cast_parameters(model: GPT2, embedding: torch.dtype, others: torch.dtype) -> None:
    """Give the modules new parameters: the token embedding as `embedding`, the rest as `others`."""
    cast: dict[Tensor, nn.Parameter] = {}  # so that what is tied stays tied
    for module in model.modules():
        dtype = embedding if module is model.wte else others
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in cast:
                values = parameter.detach().to(dtype)
                cast[parameter] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, cast[parameter])
