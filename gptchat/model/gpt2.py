"""GPT-2 with token types: causal, packed and cached attention.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-LayerNorm blocks,
learned positions, GELU's tanh form, and an output head that shares the token embedding's weights. A
token of type t also gets the embedding's row `type_rows[t]`.

Training calls the model, which returns a summed loss, so that DDP and torch.compile can wrap it.
Inference calls `hidden`, then `logits` for the positions it needs.

Parameter names are those of Hugging Face's GPT2LMHeadModel without the `transformer.` prefix. Our
linear weights are (out, in), theirs (in, out); `weights.py` transposes them.

Shapes: B rows, T positions, S positions attended to, C channels, H heads, D = C / H, V vocabulary
entries, N targets.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptchat.config import ModelConfig
from gptchat.model.kv_cache import CacheView, KVCache
from gptchat.model.loss import at_least_float32, summed_cross_entropy
from gptchat.settings import setting


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {  # by the names of Hugging Face's configs
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
MASK_ALIGNMENT = 8  # elements; SDPA's GPU kernels copy a mask whose rows are not aligned
NO_TYPE_ROWS = (-1, -1)  # of a foreign model, before `convert.adapt`
OURS = {"ours": True}  # metadata of a config's field


@dataclass(frozen=True)
class GPT2Config:
    """The keys of Hugging Face's GPT2Config that change what is computed, with its defaults.

    A field marked OURS is unknown to transformers; config.json has it under the key `gptchat`. A
    model with NO_TYPE_ROWS takes no token types.
    """

    vocab_size: int = setting(50257, "rows of the token embedding", min=1, max=2**24)
    n_positions: int = setting(1024, "positions of the context", min=1, max=2**24)
    n_embd: int = setting(768, "width", min=1, max=2**16)
    n_layer: int = setting(12, "blocks", min=1, max=1000)
    n_head: int = setting(12, "attention heads of a block", min=1, max=2**16)
    n_inner: int | None = setting(None, "width in the MLP; null: 4 n_embd", min=1, max=2**18)
    activation_function: str = setting("gelu_new", "of the MLP", choices=tuple(ACTIVATIONS))
    layer_norm_epsilon: float = setting(1e-5, "of LayerNorms", min=1e-30, max=1)
    embd_pdrop: float = setting(0.1, "dropout of the embedding", min=0, max=1)
    attn_pdrop: float = setting(0.1, "dropout of attention weights", min=0, max=1)
    resid_pdrop: float = setting(0.1, "dropout of what a block adds", min=0, max=1)
    initializer_range: float = setting(0.02, "deviation of new weights", min=0, max=1000)
    scale_attn_weights: bool = setting(True, "divide attention scores by the root of D")
    type_rows: tuple[int, int] = field(default=(0, 1), metadata=OURS)

    @classmethod
    def of(cls, size: ModelConfig, vocab_size: int) -> "GPT2Config":
        """The config of a new model with the sizes of a config file's section [model]."""
        return cls(
            vocab_size=vocab_size,
            n_positions=size.n_ctx,
            n_embd=size.n_embd,
            n_layer=size.n_layer,
            n_head=size.n_head,
            embd_pdrop=size.dropout,
            attn_pdrop=size.dropout,
            resid_pdrop=size.dropout,
        )


def additive_mask(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: -inf where `unseen` (..., T, S) is true, else 0."""
    length = unseen.shape[-1]
    padded = length + -length % MASK_ALIGNMENT
    mask = torch.zeros(*unseen.shape[:-1], padded, dtype=dtype, device=unseen.device)
    return mask[..., :length].masked_fill_(unseen, -torch.inf)


def packed_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (B, 1, T, T) of `segments` (B, T): a token sees itself and earlier equal ones."""
    length = segments.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    same_document = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return additive_mask(~(earlier & same_document)[:, None], dtype)


def use_manual_attention(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether `manual_attention` is faster than SDPA with a mask.

    On CPUs single queries take 3/4 of SDPA's time, bfloat16 rows of 256 a third. (Above 512 the
    scores would take much memory.)
    """
    if device.type != "cpu":
        return False
    return length == 1 or (dtype == torch.bfloat16 and length <= 512)


def manual_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Attention of scaled queries (B, H, T, D) to keys and values (B, H, S, D) -> (B, H, T, D)."""
    if q.shape[2] == 1:
        scores = (k @ q.mT).mT  # (B, H, 1, S), faster than the same as q @ k.mT
    else:
        scores = q @ k.mT  # (B, H, T, S)
    weights = torch.softmax(scores + mask, -1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.scale = 1.0
        if config.scale_attn_weights:
            self.scale = 1 / math.sqrt(config.n_embd // config.n_head)

    def forward(self, x: Tensor, mask: Tensor | None, cache: CacheView | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, qkv[1:])  # (B, H, S, D)
        dropout = self.attn_pdrop if self.training else 0.0
        if mask is not None and use_manual_attention(q.device, q.dtype, T):
            y = manual_attention(q * self.scale, k, v, mask, dropout)
        else:
            causal = mask is None and cache is None
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=self.scale
            )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return self.dropout(y) if self.training else y


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, n_inner)
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


def uninitialized_embedding(rows: int, n_embd: int) -> nn.Embedding:
    """An nn.Embedding without random weights, which `initialize` would overwrite."""
    return nn.Embedding.from_pretrained(torch.empty(rows, n_embd), freeze=False)


def model_on_meta(config: GPT2Config) -> "GPT2":
    """A model without memory for its weights: only their names and shapes."""
    with torch.device("meta"):
        return GPT2(config)


class GPT2(nn.Module):
    type_rows: Tensor

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = uninitialized_embedding(config.vocab_size, config.n_embd)
        self.wpe = uninitialized_embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("type_rows", torch.tensor(config.type_rows), persistent=False)
        if not self.wte.weight.is_meta:  # random numbers on "meta" import dynamo: 2 seconds
            self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's initial weights: N(0, 0.02), zero biases, LayerNorm gains of one.

        The projections into the residual stream are scaled by 1 / sqrt(2 n_layer).
        """
        std = self.config.initializer_range
        residual_scale = 1 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, std * residual_scale)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, std)
            elif name.endswith("weight"):  # of a LayerNorm
                parameter.fill_(1.0)
            else:
                parameter.fill_(0.0)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        target_positions: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """The summed cross-entropy of `targets`, a scalar of float32 or wider.

        `targets` (N,) are the ids to predict at `target_positions` (N,), indices into the flattened
        B * T positions; None means all of these. The rest is as in `hidden`.
        """
        hidden = self.hidden(input_ids, token_type_ids, position_ids, segments)
        hidden = hidden.flatten(0, 1)  # (B * T, C)
        if target_positions is not None:
            hidden = hidden[target_positions]  # (N, C)
        return self.loss(hidden, targets)

    def hidden(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        segments: Tensor | None = None,
        cache: CacheView | None = None,
    ) -> Tensor:
        """The hidden states (B, T, C) of `input_ids` (B, T).

        `token_type_ids` (B, T) are 0 or 1; None adds nothing, which is not type 0.
        `position_ids` (B, T) or (T,) are 0..T-1 by default.
        `segments` (B, T) number the documents packed into a row: a token attends only to its own.
        `cache` holds earlier tokens; it gives the positions, and `segments` is ignored.
        """
        length = input_ids.shape[1]
        if cache is not None:
            position_ids = cache.position_ids
        elif position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)  # (T,)
        x = self.wte(input_ids) + self.wpe(position_ids)  # (B, T, C)
        if token_type_ids is not None:
            x = x + self.wte(self.type_rows[token_type_ids])
        if self.training:
            x = self.dropout(x)
        mask = self._mask(x, segments, cache)
        for block in self.h:
            x = block(x, mask, cache)
        return self.ln_f(x)

    def _mask(self, x: Tensor, segments: Tensor | None, cache: CacheView | None) -> Tensor | None:
        """The additive mask (1 or B, 1, T, S) for `x` (B, T, C), in the dtype of attention.

        None means causal attention by SDPA; with a cache, a single query that sees everything.
        """
        if cache is not None:
            return None if cache.unseen is None else additive_mask(cache.unseen, cache.dtype)
        length, device, dtype = x.shape[1], x.device, x.dtype
        if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if segments is not None:
            return packed_mask(segments, dtype)
        if not use_manual_attention(device, dtype, length):
            return None
        later = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        return additive_mask(later[None, None], dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        return self.lm_head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy of `targets` (N,) given `hidden` (N, C); -100 does not count.

        torch.compile fuses F.cross_entropy. float16 needs it, too: ours computes the gradient of
        the logits before a GradScaler scales it, so float16 would round it to 0.
        """
        logits = self.logits(hidden)  # (N, V)
        if torch.compiler.is_compiling() or logits.dtype == torch.float16:
            logits = logits.to(at_least_float32(logits.dtype))
            return F.cross_entropy(logits, targets, reduction="sum")
        return summed_cross_entropy(logits, targets)

    def kv_cache(self, slots: int, length: int, dtype: torch.dtype) -> KVCache:
        """An empty cache for `slots` sequences of `length` positions, on the model's device."""
        config = self.config
        return KVCache(
            n_layer=config.n_layer,
            n_head=config.n_head,
            head_dim=config.n_embd // config.n_head,
            slots=slots,
            length=length,
            dtype=dtype,
            device=self.wte.weight.device,
        )
