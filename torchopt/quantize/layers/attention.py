"""Attention with its two linear layers in the open, so that they are quantized as any others.

    q, k, v = split(W x + b)        y = W_o · softmax(q kᵀ / √d + mask) v + b_o        W: `in_proj`, W_o: `out_proj`

`nn.MultiheadAttention` holds W as a bare Parameter and reads W_o without calling the layer that owns it: no graph shows either, and three
quarters of a transformer's weights outside of its feed-forward layers would stay float. The products of activations and the softmax
stay float: on integers they are not faster (ViT-B/16, one layer on x86: 0.20 ms of softmax in float, 0.97 ms of QLinearSoftmax).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchopt.network.surgery import set_module
from torchopt.network.weights import IN_PROJECTION


class OpenAttention(nn.Module):
    """Computes what an `nn.MultiheadAttention` does, with the same arguments and results.

    Attributes:
        in_proj: `nn.Linear`, E → 3 · heads · d.
        out_proj: `nn.Linear`, heads · d → E.
    """

    _qkv_same_embed_dim = False  # keeps torch's encoder layers from reading the weights past these layers

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = attention.embed_dim, attention.num_heads, attention.batch_first
        self.head_dim = len(attention.in_proj_weight) // 3 // attention.num_heads  # not E / heads where heads were removed
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.drop = nn.Dropout(attention.dropout)
        self.train(attention.training)

    @property
    def in_proj_bias(self) -> torch.Tensor | None:
        """What torch's encoder layers ask for."""
        return self.in_proj.bias

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended values, of the shape of `query`, and the weights (N, L, S) where asked for."""
        swap = not self.batch_first and query.dim() == 3
        q, k, v = (self._heads(x, swap) for x in self._projected(query, key, value))
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (N, heads, L, S)
        for mask in (self._of_heads(attn_mask), _of_keys(key_padding_mask)):
            if mask is not None:
                scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        y = self.out_proj((self.drop(weights) @ v).transpose(-3, -2).flatten(-2))
        y = y.transpose(0, 1) if swap else y
        if not need_weights:
            return y, None
        return y, weights.mean(-3) if average_attn_weights else weights

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v; a tensor that several of them come from is projected once."""
        if query is key and key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        keys = self.in_proj(key)
        values = keys if key is value else self.in_proj(value)
        return self.in_proj(query).chunk(3, -1)[0], keys.chunk(3, -1)[1], values.chunk(3, -1)[2]

    def _heads(self, x: torch.Tensor, swap: bool) -> torch.Tensor:
        """(N, L, heads · d) → (N, heads, L, d)."""
        x = x.transpose(0, 1) if swap else x
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)

    def _of_heads(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(L, S) as it is, (N·heads, L, S) → (N, heads, L, S)."""
        return mask if mask is None or mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))


def open_attentions(model: nn.Module, assignment: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Put an `OpenAttention` in the place of each assigned attention that has one input projection.

    Args:
        model: the network, changed in place unless it is an attention itself.
        assignment: something a module path; those of attentions are returned under the paths of their linear layers.
    """
    moved: dict[str, Any] = {}
    for path, config in assignment.items():
        module = model.get_submodule(path)
        if not can_open(module):
            moved.setdefault(path, config)
            continue
        opened = OpenAttention(module)  # type: ignore[arg-type]
        if not path:
            return opened, {"in_proj": config, "out_proj": assignment.get("out_proj", config)}
        set_module(model, path, opened)
        moved[f"{path}.{IN_PROJECTION}"] = config
    return model, moved


def can_open(module: nn.Module) -> bool:
    """True for an attention that projects all its inputs with one matrix and adds nothing to keys and values.

    Other classes compute what they like; one that says `head_dim_is_free` computes the same with heads of any width.

    Example:
        >>> can_open(nn.MultiheadAttention(8, 2)), can_open(nn.MultiheadAttention(8, 2, kdim=4))
        (True, False)
    """
    known = type(module) is nn.MultiheadAttention or (
        isinstance(module, nn.MultiheadAttention) and "head_dim_is_free" in vars(type(module))
    )
    plain = known and module.in_proj_weight is not None
    return plain and module.bias_k is None and not module.add_zero_attn  # type: ignore[union-attr]


def _of_keys(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(N, S) → (N, 1, 1, S)."""
    return None if mask is None else mask.unsqueeze(-2).unsqueeze(-2)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A linear layer over Parameters that are there already."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer
