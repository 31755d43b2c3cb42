"""Pruners for recurrent layers and for attention whose heads have a width of their own.

torch-pruning's LSTM pruner takes single rows of one layer for hidden units; here a unit takes the rows of all its gates, in any layer,
direction or cell, with or without a projection. Heads are removed whole: their rows of all three projections, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from torchopt.channels.layers.attention import HeadAttention
from torchopt.channels.layers.slices import Own, Pruner, Step, cut_tensor, gone_from


def recurrent_steps(module: nn.RNNBase | nn.RNNCellBase, own: Own) -> Iterator[Step]:
    """Which pruner removes what from each layer and direction."""
    for name in [name for name in module._parameters if name.startswith("weight_ih")]:
        suffix = name.removeprefix("weight_ih")
        projected = f"weight_hr{suffix}" in module._parameters
        units = gone_from(own, f"weight_hr{suffix}" if projected else f"weight_hh{suffix}", 1)
        for pruner, side, gone in (
            (_Recurrent(suffix), "in", gone_from(own, name, 1)),
            (_Recurrent(suffix), "out", units),
            (_Projected(suffix), "out", gone_from(own, f"weight_hr{suffix}", 0)),
        ):
            if len(gone):
                yield pruner, side, gone


class _Recurrent(Pruner):
    """One layer and direction of an LSTM, GRU or RNN, or a cell: hidden units with the rows of all their gates."""

    def __init__(self, suffix: str) -> None:
        super().__init__()
        self.suffix = suffix

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        rows = len(getattr(layer, f"weight_ih{self.suffix}"))
        projected = getattr(layer, f"weight_hr{self.suffix}", None)
        hidden = getattr(layer, f"weight_hh{self.suffix}").shape[1] if projected is None else projected.shape[1]
        gates = [gate + i for gate in range(0, rows, hidden) for i in idxs]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            cut_tensor(layer, name + self.suffix, 0, gates)
        cut_tensor(layer, ("weight_hh" if projected is None else "weight_hr") + self.suffix, 1, idxs)
        layer.hidden_size = hidden - len(idxs)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove inputs, in place."""
        cut_tensor(layer, f"weight_ih{self.suffix}", 1, idxs)
        if self.suffix in ("", "_l0"):
            layer.input_size = getattr(layer, f"weight_ih{self.suffix}").shape[1]
        return layer


class _Projected(_Recurrent):
    """What the hidden state of an LSTM is projected to."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        cut_tensor(layer, f"weight_hr{self.suffix}", 0, idxs)
        cut_tensor(layer, f"weight_hh{self.suffix}", 1, idxs)
        layer.proj_size = len(getattr(layer, f"weight_hr{self.suffix}"))
        return layer


def attention_steps(module: HeadAttention, own: Own) -> Iterator[Step]:
    """Which pruner removes what from the projections."""
    packed = module.in_proj_weight is not None
    inner = module.num_heads * module.head_dim
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    rows = np.concatenate([gone_from(own, name, 0) + place * inner for place, name in enumerate(names)])
    for name in names:
        if len(columns := gone_from(own, name, 1)):
            yield _Heads(name), "in", columns
    if len(rows):
        yield _Heads(names[0]), "out", rows


class _Heads(Pruner):
    """Rows of the three projections, counted over all of them, make heads; columns are the embeddings that they read."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove outputs, in place."""
        inner = layer.num_heads * layer.head_dim
        parts = [[i - place * inner for i in idxs if i // inner == place] for place in range(3)]
        if layer.in_proj_weight is not None:
            cut_tensor(layer, "in_proj_weight", 0, idxs)
        else:
            for name, part in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
                cut_tensor(layer, name, 0, part)
        cut_tensor(layer, "in_proj_bias", 0, idxs)
        cut_tensor(layer, "bias_k", 2, parts[1])
        cut_tensor(layer, "bias_v", 2, parts[2])
        layer.num_heads -= len(parts[0]) // layer.head_dim
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove inputs, in place."""
        cut_tensor(layer, self.name, 1, idxs)
        width = getattr(layer, self.name).shape[1]
        if self.name in ("in_proj_weight", "q_proj_weight"):
            layer.embed_dim = width
        if self.name != "q_proj_weight":
            layer.kdim = width if self.name != "v_proj_weight" else layer.kdim
            layer.vdim = width if self.name != "k_proj_weight" else layer.vdim
        return layer
