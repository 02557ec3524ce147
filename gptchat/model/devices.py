"""What the device of a model can do."""

import torch


def default_device() -> str:
    """The GPU where there is one, else the CPU, as torch names it."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions for products in bfloat16, which make them faster.

    A GPU has them since Ampere, an x86 CPU with AVX512-BF16 or AMX. Others convert every number:
    on a CPU with AVX2 alone, a product of 192 x 768 numbers took thirty times as long in bfloat16
    as in float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
