"""Rounding of activations as training differentiates it, in passes that a processor does at the speed of its memory.

    x̂ = s · clamp(round(x / s), q_min - z, q_max - z)        ∂x̂/∂x = 1 inside the range, 0 outside
    LSQ: ∂x̂/∂s = x̂/s - x/s inside, x̂/s outside        (Esser et al. 2020, arXiv:1902.08153, eq. 3)

The numbers are those of ONNX's QuantizeLinear, bit for bit: x is divided by s and rounded to even. Torch's own operators multiply by 1/s
and add z before they round, so that values within 1e-7 of half a step go to the other side; on CPUs they go element by element and keep
a mask. Here each step is one vectorized pass, and the backward pass asks the input itself whether it lay inside: 2 to 3 times faster.
While training elsewhere, and where a compiler traces the model, torch's operators are used.

`FixedQuantize` is what a finalized model keeps of it: the rounding on a fixed grid, as ONNX's pair of nodes where it is exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchopt.errors import StateError
from torchopt.quantize.layers.kernels import Affine, affine_of

HALVED = (
    "quantize: the finalized model was made {}, and its integers are of float32 values; use it as finalize gave it (an input in float32), "
    "or quantize the float network with mode='float16'"
)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """Return x on the grid; the gradient passes straight through inside the range.

    Args:
        x: float32, any shape.
        scale: float32, one value.
        zero_point: int32, one value.
        qmin: the smallest integer.
        qmax: the largest.

    Example:
        >>> fake_quantize(torch.tensor([-1.0, 0.7, 999.0]), torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32), 0, 255)
        tensor([  0.0000,   0.5000, 127.5000])
    """
    if not _by_passes(x):
        return torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zero_point.reshape(()), qmin, qmax)
    z = int(zero_point)
    return _Round.apply(x, scale.reshape(()), qmin - z, qmax - z)  # type: ignore[no-any-return, no-untyped-call]


def learned_fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> torch.Tensor:
    """The same with a gradient to `scale`, which is scaled by 1/√(N·q_max) over the N entries of x."""
    damping = (x.numel() * qmax) ** -0.5
    if not _by_passes(x):
        zero = zero_point.to(x.dtype)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, qmin, qmax, damping)
    z = int(zero_point)
    return _LearnedRound.apply(x, scale, qmin - z, qmax - z, damping)  # type: ignore[no-any-return, no-untyped-call]


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """View a tensor as (N,) in the order in which its memory holds it: no copy of a channels-last batch.

    Example:
        >>> in_memory_order(torch.arange(6).reshape(2, 3).T)
        tensor([0, 1, 2, 3, 4, 5])
    """
    return x.permute(order(x)).reshape(-1)


def order(x: torch.Tensor) -> list[int]:
    """Return the dimensions of a tensor, from the slowest to the fastest in its memory."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def _by_passes(x: torch.Tensor) -> bool:
    here = x.device.type == "cpu" or not (torch.is_grad_enabled() and x.requires_grad)
    return here and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _rounded(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """x on the grid; by a number in place of a tensor a GPU would not divide, but multiply with its inverse."""
    return x.div(scale).round_().clamp_(low, high).mul_(scale)


def _inside(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The gradient where round(x / s) is no further than the ends of the grid, else 0."""
    step = float(scale)
    return torch.ops.aten.hardtanh_backward(gradient, x, (low - 0.5) * step, (high + 0.5) * step)  # type: ignore[no-any-return]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.grid = scale, low, high
        return _rounded(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return _inside(gradient, x, *ctx.grid), None, None, None


class _LearnedRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int, damping: float) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.ends, ctx.damping = (low, high), damping
        return _rounded(x, scale.reshape(()), low, high)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        grid = scale.reshape(()), *ctx.ends
        to_x = _inside(gradient, x, *grid)
        dims = order(x)
        flat = [t.permute(dims).reshape(-1) for t in (gradient, _rounded(x, *grid), to_x, x)]
        to_scale = (torch.dot(flat[0], flat[1]) - torch.dot(flat[2], flat[3])) / scale * ctx.damping
        return to_x, to_scale, None, None, None


class FixedQuantize(nn.Module):
    """Rounds to a fixed integer grid; exports to QuantizeLinear and DequantizeLinear.

    Args:
        scale: float32, 0-d.
        zero_point: integer, 0-d.
        qmin: the smallest integer.
        qmax: the largest.

    Example:
        >>> FixedQuantize(torch.tensor(0.5), torch.tensor(0), 0, 255)(torch.tensor([-1.0, 0.7, 1000.0]))
        tensor([  0.0000,   0.5000, 127.5000])
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> None:
        super().__init__()
        self.qmin, self.qmax = qmin, qmax
        self.register_buffer("scale", scale.detach().to(torch.float32).reshape(()).clone())
        self.register_buffer("zero_point", zero_point.detach().reshape(()).to(_storage(qmin, qmax)).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest representable values; x of any shape, float32.

        Raises:
            StateError: the model was moved to another precision.
        """
        if self.scale.dtype != torch.float32:
            raise StateError(HALVED.format(str(self.scale.dtype).removeprefix("torch.")))
        if torch.onnx.is_in_onnx_export():
            return self._onnx(x)
        if torch.compiler.is_exporting():
            grid = self.scale, self.zero_point, self.qmin, self.qmax, self.zero_point.dtype
            codes = torch.ops.quantized_decomposed.quantize_per_tensor.tensor(x, *grid)
            return torch.ops.quantized_decomposed.dequantize_per_tensor.tensor(codes, *grid)
        return fake_quantize(x, self.scale, self.zero_point.to(torch.int32), self.qmin, self.qmax)

    def affine(self) -> Affine | None:
        """Return the grid; None where it is wider than integer kernels take."""
        return affine_of(self.scale, self.zero_point, self.qmin, self.qmax)

    def _onnx(self, x: torch.Tensor) -> torch.Tensor:
        """The pair of ONNX operators itself, with `scale` and `zero_point` as its initializers."""
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", [x, self.scale, self.zero_point], dtype=self.zero_point.dtype, shape=x.shape
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", [codes, self.scale, self.zero_point], dtype=torch.float32, shape=x.shape
        )

    @classmethod
    def of(cls, quantizer: Any) -> FixedQuantize:
        """Return the fixed quantizer on the grid that an `ActivationQuantizer` has found."""
        scale, zero_point = quantizer.calculate_qparams()
        return cls(scale, zero_point, quantizer.quant_min, quantizer.quant_max)

    def describe(self) -> list[int]:
        """Return what the buffers do not hold: [qmin, qmax]."""
        return [self.qmin, self.qmax]

    @classmethod
    def described(cls, ends: list[int]) -> FixedQuantize:
        """Return a quantizer with these ends whose buffers a state is to be loaded into.

        Example:
            >>> FixedQuantize.described([0, 255]).qmax
            255
        """
        return cls(torch.ones(()), torch.zeros((), dtype=torch.int32), *ends)

    def codes(self, value: float) -> int:
        """Return the integer that `value` rounds to."""
        return int(self._codes(torch.tensor(value, dtype=torch.float32)))

    def _codes(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.round(x / self.scale) + self.zero_point.to(torch.int32)).clamp(self.qmin, self.qmax)

    def extra_repr(self) -> str:
        """Grid, scale and zero point."""
        return f"{self.qmin}…{self.qmax}, scale={float(self.scale):.4g}, zero_point={int(self.zero_point)}"


def _storage(qmin: int, qmax: int) -> torch.dtype:
    """The integer type whose whole range is [qmin, qmax], or that holds it."""
    if qmin < 0:
        return torch.int8 if qmax < 128 else torch.int16
    return torch.uint8 if qmax < 256 else torch.uint16
