"""Linear layers with a scale for every block of inputs: what 4-bit weights need to stay accurate.

    ŵ[o, i] = s[o, i // B] · q[o, i]        q ∈ −7 … 7        s = max |w| of the block / 7, rounded to a float16 number

One large weight costs only its block the resolution, not its whole channel. The scales take half a bit a weight with B = 32, since
they are stored as float16. ONNX Runtime multiplies such weights as they are (MatMulNBits); with
`export(fast_blocks=True)` it rounds the input to 8 bits, block by block, as it goes.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from torchopt.network.grid import set_grid
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.weight_grid import Codes, Snap, one_scale, weight_scale

SMALLEST_HALF = 2.0**-14  # below it float16 loses digits, and the scale stays a float32


class FusedBlockLinear(Fused, nn.Linear):
    """A linear layer on a weight grid whose scale is shared by `config.block_size` inputs of one output."""

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        assert self.config.block_size is not None
        return self.config.block_size

    def scale(self, w: torch.Tensor) -> torch.Tensor:
        """Return the scales, shape (outputs, blocks); all equal where the values of the whole tensor are shared."""
        shape = (w.shape[0], w.shape[1] // self.block)
        if one_scale(self, "weight"):
            return weight_scale(w, self.qmax, None).expand(shape)
        scale = weight_scale(w.reshape(-1, self.block), self.qmax, 0).reshape(shape)
        return torch.where(scale >= SMALLEST_HALF, scale.clamp(max=65504.0).half().float(), scale)

    def spread(self, scale: torch.Tensor) -> torch.Tensor:
        """Return a scale for each weight."""
        return scale.repeat_interleave(self.block, 1)

    def fake_quantized(self, w: torch.Tensor) -> torch.Tensor:
        """Return the weight on its grid, as training uses it."""
        return cast(torch.Tensor, Snap.apply(w, self.spread(self.scale(w)), self.qmax, True))

    def folded(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return weight, bias and scale, ŵ = s·q bit for bit."""
        scale = self.scale(w)
        wide = self.spread(scale)
        q = Codes.apply(w, wide, self.qmax) + 0.0  # integers know no -0.0
        return q * wide, self.bias, scale

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x · weightᵀ + bias."""
        return F.linear(x, weight, bias)

    def bake(self) -> nn.Module:
        """Return the plain layer with its weight on its grid."""
        plain = super().bake()
        set_grid(plain, "weight", self.scale(self.weight.detach()), self.bits, 0, self.block)
        return plain


def takes_blocks(layer: nn.Module, block: int) -> bool:
    """True for a linear layer whose inputs are whole blocks.

    Example:
        >>> takes_blocks(nn.Linear(64, 2), 32), takes_blocks(nn.Linear(50, 2), 32)
        (True, False)
    """
    return type(layer) is nn.Linear and layer.in_features % block == 0
