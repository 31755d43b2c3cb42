"""Linear layers whose input is rounded to 8 bits at run time, on the range that it has in each call: no data, no tracing.

    lo = min(0, min x)    hi = max(0, max x)    s = (hi − lo) / 255    z = round(clamp(−lo / s, 0, 255))
    x̂ = s · (clamp(round(x / s) + z, 0, 255) − z)        y = x̂ · ŵᵀ + b

This is DynamicQuantizeLinear of ONNX to the bit, one range for the whole tensor, so that what torch computes is what ONNX Runtime's
integer kernel computes. Rounding passes the gradient straight through: nothing lies outside its own range.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from torchopt.errors import ModelError
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.modules import Fused

LEVELS = 255


class Round(torch.autograd.Function):
    """x̂ of the file's equation; the gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the rounded tensor."""
        low, high = torch.aminmax(x)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / LEVELS
        scale = torch.where(scale == 0, 1.0, scale)
        zero_point = (-low / scale).clamp(0, LEVELS).round()
        return torch.div(x, scale).round_().add_(zero_point).clamp_(0, LEVELS).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """Straight through."""
        return gradient


def dynamic_round(x: torch.Tensor) -> torch.Tensor:
    """Return the 256 values nearest to a tensor's own, on the grid that its range gives; x of any shape, at least one element.

    Example:
        >>> dynamic_round(torch.tensor([-1.0, 0.004, 0.1, 1.55]))
        tensor([-1.0000,  0.0000,  0.1000,  1.5500])
    """
    x = x.float()  # grids are float32, also under autocast
    if torch.onnx.is_in_onnx_export():
        return _onnx(x)
    return cast(torch.Tensor, Round.apply(x))


def _onnx(x: torch.Tensor) -> torch.Tensor:
    """The pair of ONNX operators itself; `export.passes.DynamicMatMulPass` lets the product that follows read the integers."""
    codes, scale, zero_point = torch.onnx.ops.symbolic_multi_out(
        "DynamicQuantizeLinear", [x], dtypes=(torch.uint8, torch.float32, torch.uint8), shapes=(x.shape, (), ())
    )
    return torch.onnx.ops.symbolic("DequantizeLinear", [codes, scale, zero_point], dtype=torch.float32, shape=x.shape)


def called(layer: nn.Module) -> nn.Module:
    """Let `layer` be called wherever it stands: torch's encoder layers read the weights of theirs, and call none, unless one has a hook.

    Example:
        >>> len(called(called(nn.Linear(2, 1)))._forward_hooks)
        1
    """
    if _pass not in layer._forward_hooks.values():
        layer.register_forward_hook(_pass)
    return layer


def _pass(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that changes nothing."""


class DynamicLinear(nn.Linear):
    """A plain linear layer, weights on their grid, that rounds its input to 8 bits in each call."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x̂ · ŵᵀ + b; input of shape (…, in_features), float32."""
        return F.linear(dynamic_round(input), self.weight, self.bias)

    @classmethod
    def of(cls, layer: nn.Module) -> DynamicLinear:
        """Turn a plain linear layer into one that rounds its input, in place.

        Raises:
            ModelError: it is no linear layer.

        Example:
            >>> DynamicLinear.of(nn.Linear(2, 1))
            DynamicLinear(in_features=2, out_features=1, bias=True)
        """
        if type(layer) is not nn.Linear:
            raise ModelError(f"quantize: {type(layer).__name__} does not round its input at run time; an nn.Linear is needed")
        layer.__class__ = cls
        return cast(DynamicLinear, called(layer))


class FusedDynamicLinear(Fused, nn.Linear):
    """A linear layer that trains on an integer weight grid, with its input rounded at run time."""

    def _start(self, config: Quantize, bits: int) -> None:
        super()._start(config, bits)
        called(self)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x̂ · weightᵀ + bias; before the first milestone x itself."""
        return F.linear(dynamic_round(x) if self.rounding else x, weight, bias)

    def plain(self) -> nn.Module:
        """Return the layer that a finalized model keeps."""
        return DynamicLinear.of(super().plain())
