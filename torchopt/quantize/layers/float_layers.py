"""The quantized layers themselves: which float layer each stands for, and how it computes on given weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.blocks import FusedBlockLinear, takes_blocks
from torchopt.quantize.layers.dynamic import FusedDynamicLinear
from torchopt.quantize.layers.modules import Fused


class FusedLinear(Fused, nn.Linear):
    """A linear layer on an integer weight grid."""

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ weight.T + bias."""
        return F.linear(x, weight, bias)


class _Convolution(Fused):
    """Convolutions of every rank share the padding logic of torch's own `_conv_forward`."""

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution."""
        return self._conv_forward(x, weight, bias)  # type: ignore[operator, no-any-return]


class FusedConv1d(_Convolution, nn.Conv1d):
    """A 1-d convolution on an integer weight grid."""


class FusedConv2d(_Convolution, nn.Conv2d):
    """A 2-d convolution on an integer weight grid."""


class FusedConv3d(_Convolution, nn.Conv3d):
    """A 3-d convolution on an integer weight grid."""


class _Transposed(Fused):
    """Transposed convolutions."""

    functional: Any

    def forward(self, x: torch.Tensor, output_size: Any = None) -> torch.Tensor:  # type: ignore[override]
        """Return act(bn(layer(x))), of the sizes asked for, as torch's layer does."""
        if output_size is not None:  # kept, so that corrections, which know the input alone, compute the same
            m: Any = self
            m.output_padding = tuple(
                m._output_padding(x, output_size, m.stride, m.padding, m.kernel_size, len(m.kernel_size), m.dilation)
            )
        return super().forward(x)

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The transposed convolution."""
        m: Any = self
        return type(self).functional(x, weight, bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)  # type: ignore[no-any-return]


class FusedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """A transposed 1-d convolution on an integer weight grid."""

    functional = staticmethod(F.conv_transpose1d)


class FusedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """A transposed 2-d convolution on an integer weight grid."""

    functional = staticmethod(F.conv_transpose2d)


class FusedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """A transposed 3-d convolution on an integer weight grid."""

    functional = staticmethod(F.conv_transpose3d)


class FusedEmbedding(Fused, nn.Embedding):
    """An embedding on an integer weight grid, one scale a row."""

    bias = None

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The rows that `x` names."""
        return F.embedding(x, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)


FUSED: dict[type[nn.Module], type[Fused]] = {
    nn.Linear: FusedLinear,
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.Conv3d: FusedConv3d,
    nn.ConvTranspose1d: FusedConvTranspose1d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.ConvTranspose3d: FusedConvTranspose3d,
    nn.Embedding: FusedEmbedding,
}


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """Return torch's layer that `module` is, or that it computes as: a class of anyone's own that leaves `forward` alone.

    Example:
        >>> class Mine(nn.Conv3d):
        ...     stride_of = 2
        >>> layer_class(Mine(1, 2, 3)).__name__, layer_class(nn.ReLU())
        ('Conv3d', None)
    """
    mine = type(module)
    if mine in FUSED or mine.__module__.startswith("torch.") or parametrize.is_parametrized(module):
        return mine if mine in FUSED else None
    same = ("forward", "_conv_forward")
    return next((c for c in FUSED if issubclass(mine, c) and all(getattr(mine, m, c) is getattr(c, m, c) for m in same)), None)


def fused(layer: nn.Module, config: Quantize, bits: int) -> Fused | None:
    """Return the quantized layer that takes over `layer`'s parameters, or None where there is none of its class.

    Example:
        >>> type(fused(nn.Conv2d(1, 4, 3), Quantize(), 8)).__name__
        'FusedConv2d'
    """
    known = layer_class(layer)
    cls = FUSED[known] if known else None
    if config.mode == "dynamic" and cls is FusedLinear:
        cls = FusedDynamicLinear
    elif config.block_size is not None and takes_blocks(layer, config.block_size):
        cls = FusedBlockLinear
    return None if cls is None else cls.of(layer, config, bits)
