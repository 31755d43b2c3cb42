"""Attention whose heads and embedding have widths of their own: what `nn.MultiheadAttention` becomes when heads are removed.

    head_i = softmax(Q_i K_iᵀ / √d + mask) V_i,    output = [head_1 … head_h] Wᵀ + b        (Vaswani et al. 2017, arXiv:1706.03762)

`nn.MultiheadAttention` ties the width of all heads together to that of the embedding, h · d = e, so that neither can shrink alone.
Removing whole heads (Michel et al., "Are sixteen heads really better than one?", 2019, arXiv:1905.10650) leaves h' · d < e. This
class keeps the parameters of its parent, their names, and its interface; only the shapes are free.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F

from torchopt.errors import DataError


class HeadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with any number of heads of width `head_dim`; `adopt` makes one of an existing module."""

    head_dim_is_free = True  # told to quantization: the same computation, whatever E / heads is

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
        """Attend, with the arguments and results of `nn.MultiheadAttention.forward`.

        Raises:
            DataError: a mask for each head that is for another number of heads, or `is_causal` without its mask.
        """
        if is_causal and attn_mask is None:
            raise DataError(
                "attention: is_causal=True and no attn_mask; give the causal mask too, as nn.MultiheadAttention asks for"
            )
        batched, alike = query.dim() == 3, query is key and key is value
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projected(query, key, value, alike)  # (batch, heads, length, head_dim)
        mask = self._mask(attn_mask, key_padding_mask, q, added=k.shape[2] - key.shape[1])
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            heads = F.dropout(weights, self.dropout, self.training) @ v
        else:
            weights = None
            heads = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = F.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None and average_attn_weights:
            weights = weights.sum(dim=1) / self.num_heads
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alike: bool) -> list[torch.Tensor]:
        """Project, add what the constructor was asked to add to keys and values, and split into heads."""
        if alike and self.in_proj_weight is not None:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            packed = self.in_proj_weight is not None
            weights = self.in_proj_weight.chunk(3) if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v)]

    def _mask(
        self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, added: int
    ) -> torch.Tensor | None:
        """Both masks as one, in a shape that stretches to (batch, heads, queries, keys); keys that were `added` are never masked."""
        parts = []
        if attn_mask is not None:
            if attn_mask.dim() == 3 and attn_mask.shape[0] != q.shape[0] * self.num_heads:
                raise DataError(
                    f"attention: attn_mask has {attn_mask.shape[0]} rows; one for each of {q.shape[0]} examples × {self.num_heads} heads "
                    "that are left is needed"
                )
            parts.append(_additive(attn_mask, q.dtype))
            if attn_mask.dim() == 3:
                parts[0] = parts[0].unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            parts.append(_additive(padding, q.dtype).reshape(q.shape[0], 1, 1, -1))
        if not parts:
            return None
        mask = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return F.pad(mask, (0, added)) if added else mask


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask is True where nothing may be looked at."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


def adopt(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Let heads and embedding of the attention in `model` have widths of their own, in place.

    Args:
        model: holds `nn.MultiheadAttention`, or is one.
        names: of those that are meant; all of them if left out.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.randn(1, 3, 8)
        >>> before = layer(x, x, x)[0]
        >>> adopt(layer)
        >>> torch.allclose(layer(x, x, x)[0], before, atol=1e-6)
        True
    """
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and (names is None or name in names):
            module.__class__ = HeadAttention
            module._qkv_same_embed_dim = False  # the fused kernels of torch, also in nn.TransformerEncoderLayer, ask for this
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _holds_heads(module):
            module.use_nested_tensor = False  # nested tensors are for those kernels only


def release(model: nn.Module, original: nn.Module) -> None:
    """Make attention whose heads are together as wide as the embedding torch's own again, in place.

    Args:
        model: a shrunken copy.
        original: what its encoders were before `adopt`.
    """
    for module in model.modules():
        if isinstance(module, HeadAttention) and module.num_heads * module.head_dim == module.embed_dim:
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            module._qkv_same_embed_dim = module.in_proj_weight is not None
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder) and not _holds_heads(module):
            module.use_nested_tensor = bool(original.get_submodule(name).use_nested_tensor)


def _holds_heads(module: nn.Module) -> bool:
    return any(isinstance(child, HeadAttention) for child in module.modules())
