"""GPT-2 with token types: causal, packed and cached attention.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-LayerNorm blocks, learned positions,
`gelu_new`, a head tied to the token embedding. Parameter names are those of Hugging Face's GPT2LMHeadModel without the
`transformer.` prefix; our linear weights are (out, in), theirs (in, out). Shapes: B rows, T positions, C channels,
H heads, D = C / H, V vocabulary entries, N target positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptchat.model.kv_cache import CacheView, KVCache
from gptchat.model.loss import CrossEntropy, at_least_float32


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class GPT2Config:
    """The keys of Hugging Face's GPT2Config that change what is computed, and `type_rows`: token type t adds the row
    `wte[type_rows[t]]` to the embedding."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    type_rows: tuple[int, int] = (0, 1)


def use_manual_attention(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether masked attention is written out, on a CPU: for bfloat16 rows of 256 that takes a third of SDPA's time
    (longer rows' scores would take much memory), for single queries of many sequences three quarters."""
    return device.type == "cpu" and (length == 1 or dtype == torch.bfloat16 and length <= 512)


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.n_head, self.layer, self.attn_pdrop = config.n_head, layer, config.attn_pdrop
        self.scale = (
            1 / math.sqrt(config.n_embd // config.n_head) if config.scale_attn_weights else 1.0
        )

    def forward(self, x: Tensor, mask: Tensor | None, cache: CacheView | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, qkv[1:])
        dropout = self.attn_pdrop if self.training else 0.0
        if mask is not None and use_manual_attention(q.device, q.dtype, T):
            scores = (
                (k @ (q * self.scale).mT).mT if T == 1 else (q * self.scale) @ k.mT
            )  # (B, H, T, all)
            y = F.dropout(torch.softmax(scores + mask, -1), dropout) @ v  # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                scale=self.scale,
                is_causal=mask is None and cache is None,
            )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return self.dropout(y) if self.training else y


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc: nn.Module = nn.Linear(config.n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        # None where `c_fc` applies it itself
        self.activation: Activation | None = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def fuse_activation(self, c_fc: nn.Module) -> None:
        """Replace the first layer by one that applies the activation too: a kernel for inference."""
        self.c_fc = c_fc
        self.activation = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, n_inner)
        if self.activation is not None:
            x = self.activation(x)
        x = self.c_proj(x)  # (B, T, C)
        return self.dropout(x) if self.training else x


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: CacheView | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    type_rows: Tensor

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte, self.wpe = (
            nn.Embedding.from_pretrained(torch.empty(rows, config.n_embd), freeze=False)
            for rows in (config.vocab_size, config.n_positions)
        )
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("type_rows", torch.tensor(config.type_rows), persistent=False)
        self.activation_checkpointing = False
        if not self.wte.weight.is_meta:  # random numbers on "meta" import dynamo: 2 seconds
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's: N(0, 0.02), zero biases, the projections into the residual stream scaled by 1/sqrt(2 n_layer)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (
                    1 / math.sqrt(2 * self.config.n_layer)
                    if name.endswith("c_proj.weight")
                    else 1.0
                )
                parameter.normal_(0.0, self.config.initializer_range * scale)
            else:
                parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
        cache: CacheView | None = None,
        target_positions: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) of `input_ids` (B, T); with `targets` (N,), the ids wanted at the flat positions
        `target_positions` (N,), by default all, the sum of their cross-entropies instead (a scalar, fp32 at least).

        `token_type_ids` (B, T) are 0 or 1; None adds nothing. `segments` (B, T) numbers the documents packed into a
        row: attention stays within equal numbers. `cache` holds the earlier tokens.
        """
        hidden = self.hidden(input_ids, token_type_ids, position_ids, segments, cache)
        if targets is None:
            return hidden
        hidden = hidden.flatten(0, 1)
        return self.loss(hidden if target_positions is None else hidden[target_positions], targets)

    def hidden(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> Tensor:
        if cache is not None:
            position_ids = cache.position_ids
        elif position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(position_ids)  # (B, T, C)
        if token_type_ids is not None:
            x = x + self.wte(self.type_rows[token_type_ids])
        x = self.dropout(x)
        mask = cache.mask if cache is not None else self.mask(input_ids.shape[1], segments, x)
        for block in self.h:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.ln_f(x)

    def mask(self, length: int, segments: Tensor | None, x: Tensor) -> Tensor | None:
        """What is added to the scores, (1 or B, 1, T, T): 0 where the query (row) may look at the key (column), else
        minus infinity. None stands for plain causal attention by SDPA."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if segments is None and not use_manual_attention(x.device, dtype, length):
            return None
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()[None, None]
        if segments is not None:
            seen = seen & (segments[:, :, None] == segments[:, None, :])[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=x.device).masked_fill_(~seen, -torch.inf)

    def kv_cache(self, slots: int, length: int, dtype: torch.dtype = torch.float32) -> KVCache:
        """An empty cache for `slots` sequences of `length` positions, on the model's device."""
        config = self.config
        return KVCache(
            config.n_layer,
            config.n_head,
            config.n_embd // config.n_head,
            slots,
            length,
            dtype,
            self.wte.weight.device,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        return self.lm_head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum of the cross-entropies of `targets` (N,) after `hidden` (N, C); none where a target is -100."""
        logits = self.logits(hidden)
        if (
            torch.compiler.is_compiling() or logits.dtype == torch.float16
        ):  # fuses it; wants the scaled gradient
            return F.cross_entropy(
                logits.to(at_least_float32(logits.dtype)), targets, reduction="sum"
            )
        return CrossEntropy.apply(logits, targets)
