"""The integers that ONNX Runtime's integer kernels give, so that evaluation in torch gives the same ones, bit for bit.

A kernel computes exactly on integers, and rounds once: it multiplies by a ratio of scales, in float32. Torch computes in float, and
divides by one scale. Both are right to 1e-7, and where the result lies that close to half a step they round to different sides: a few
values in a million, which move more values in each following layer, until fifty layers on the two networks carry rounding errors that
have nothing in common. So between two grids evaluation rounds as the kernel does; q are integers with the zero point z taken off:

    convolution, linear     n = y / (s_x·s_w), a whole number      q = round(n · (s_x·s_w / s_y))
    sum                     q + z = round(a'·r_a + (b'·r_b + (z − (r_a·z_a + r_b·z_b))))      a' = q_a + z_a,  r_a = s_a / s
    product                 q + z = round((q_a·q_b) · (s_a·s_b / s) + z)
    global mean of m        q = round(Σ q_x · (s_x / (s·m)))
    mean of a window        q + z = round(y / s + z)
    hardsigmoid             the sum of x on the scale s_x/6 and ½ (`export/passes/hard_sigmoid.py`)
    all else                q = round(y / s), as QuantizeLinear      (`rounding.py`)

each operation rounded to float32 as written; in a sum, a product and the addition left of it are rounded together. An activation in
between cuts q off. So compute ONNX Runtime's CPU kernels (x86 with FMA); other runtimes may differ in those few values. Of kernels that
take wider integers than 8 bits there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchopt.network.grid import SUFFIX
from torchopt.quantize.layers.weight_grid import along, products

SIXTH, HALF = 1 / 6, 0.5  # hardsigmoid(x) = clip(x / 6 + ½, 0, 1)


class Affine(NamedTuple):
    """The grid s·q of an activation: `scale` and the zero point `zero` float32 0-d, and the ends of q + z."""

    scale: torch.Tensor
    zero: torch.Tensor
    qmin: int
    qmax: int

    def steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return q of values on the grid."""
        return torch.round(x / self.scale)


def affine_of(scale: torch.Tensor, zero_point: torch.Tensor, qmin: int, qmax: int) -> Affine | None:
    """Return the grid of a quantizer's buffers; None where it is wider than integer kernels take."""
    return Affine(scale.reshape(()), zero_point.reshape(()).float(), qmin, qmax) if qmax - qmin < 256 else None


def convolution(y: torch.Tensor, step: torch.Tensor, out: Affine) -> torch.Tensor:
    """Return q + z of a layer's result y; `step` is s_x·s_w, in a shape that multiplies y."""
    n = torch.round(y / step)
    return torch.round(n * (step / out.scale)) + out.zero


def addition(grids: Sequence[Affine], out: Affine, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return q + z of a + b."""
    first, second = grids
    ratio, other = first.scale / out.scale, second.scale / out.scale
    fixed = out.zero - _fused(ratio, first.zero, other * second.zero)
    inner = _fused(second.steps(b) + second.zero, other, fixed)
    return torch.round(_fused(first.steps(a) + first.zero, ratio, inner))


def product(grids: Sequence[Affine], out: Affine, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return q + z of a · b."""
    first, second = grids
    return torch.round(first.steps(a) * second.steps(b) * (first.scale * second.scale / out.scale) + out.zero)


def global_mean(grids: Sequence[Affine], out: Affine, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return q + z of the mean over all positions of each channel; x (batch, channels, …), y its mean, with or without the dimensions."""
    (grid,) = grids
    sums = grid.steps(x).sum(tuple(range(2, x.dim())))
    ratio = grid.scale / (out.scale * math.prod(x.shape[2:]))
    return (torch.round(sums * ratio) + out.zero).reshape(y.shape)


def window_mean(grids: Sequence[Affine], out: Affine, y: torch.Tensor) -> torch.Tensor:
    """Return q + z of what an average pool gives."""
    return torch.round(y / out.scale + out.zero)


def hard_sigmoid(grids: Sequence[Affine], out: Affine, x: torch.Tensor) -> torch.Tensor:
    """Return q + z of hardsigmoid(x)."""
    (grid,) = grids
    ratio = grid.scale * SIXTH / out.scale
    fixed = (out.zero - ratio * grid.zero) + HALF / out.scale
    return torch.round(_fused(grid.steps(x) + grid.zero, ratio, fixed))


def _fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a·b + c, rounded to float32 once."""
    return (a.double() * b.double() + c.double()).float()


FORMULAS: dict[str, Callable[..., torch.Tensor]] = {
    "addition": addition,
    "product": product,
    "global_mean": global_mean,
    "window_mean": window_mean,
    "hard_sigmoid": hard_sigmoid,
}
LAYER = "layer"  # the kind of kernel that a convolution or linear layer has


@torch.no_grad()
def layer_value(layer: Any, y: torch.Tensor, reads: Affine | None, out: Affine | None) -> torch.Tensor | None:
    """Return a layer's result on its grid, float32 of the shape of y; None while a grid is not in use.

    Args:
        layer: a quantized layer that just computed y, or the plain one that it was baked to.
        y: its result.
        reads: the grid of its input.
        out: the grid of its result.
    """
    scale = layer._buffers.get("weight" + SUFFIX, getattr(layer, "scale_in_use", None))
    if scale is None or reads is None or out is None:
        return None
    axis = y.dim() - 1 - len(getattr(layer, "kernel_size", ()))
    step = along(products(reads.scale, scale, y.shape[axis]), y.dim(), axis)
    return on_grid(convolution(y.float(), step, out), out)  # float: autocast may have left 16 bits


class IntegerKernel(nn.Module):
    """Stands after a quantizer and rounds as the runtime's kernel does; while training, calibrating and exporting it lets pass.

    Args:
        kind: "layer" or one of `FORMULAS`.
        reads: names of the quantizers of what the operation takes, from the root of the model.
        writes: the name of the quantizer before it.
        layer: the name of the layer, for a kernel of kind "layer".
        ends: of an activation between the operation and the quantizer, such as (0, 6); None without.
    """

    aside = False  # True while `rounding` is set for a while

    def __init__(
        self, kind: str, reads: Sequence[str], writes: str, layer: str | None = None, ends: Sequence[float | None] | None = None
    ) -> None:
        super().__init__()
        if kind != LAYER and kind not in FORMULAS:
            raise ValueError(f"no integer kernel is called {kind!r}")
        self.kind, self.reads, self.writes, self.layer = kind, tuple(reads), writes, layer
        self.ends = None if ends is None else tuple(ends)
        self.rounding = True
        self.linked: tuple[Any, list[Any], Any]  # in a tuple, so that they are no parts of this module

    def link(self, root: nn.Module) -> None:
        """Find the modules that the names say."""
        maker = None if self.layer is None else root.get_submodule(self.layer)
        self.linked = maker, [root.get_submodule(name) for name in self.reads], root.get_submodule(self.writes)

    def forward(self, rounded: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        """Return what the kernel gives.

        Args:
            rounded: what the quantizer gave.
            values: what the formula of this kind takes.
        """
        if self.training or not self.rounding or exporting():
            return rounded
        return instead(rounded, self._value(*(value.detach() for value in values)))

    @torch.no_grad()
    def _value(self, *values: torch.Tensor) -> torch.Tensor | None:
        """The result on its grid; None while some grid is not in use."""
        maker, sources, sink = self.linked
        grids, out = [source.affine() for source in sources], sink.affine()
        if self.kind == LAYER:
            return layer_value(maker, values[0], grids[0], out)  # y after its activation
        if out is None or any(grid is None for grid in grids):
            return None
        return on_grid(FORMULAS[self.kind](grids, out, *values), out, self.ends)

    def describe(self) -> list[Any]:
        """Return what makes this kernel, as JSON-able values: the arguments of the class."""
        return [self.kind, list(self.reads), self.writes, self.layer, None if self.ends is None else list(self.ends)]

    def extra_repr(self) -> str:
        """What is computed on which grids."""
        return f"{self.layer or self.kind}: {', '.join(self.reads)} → {self.writes}"


def on_grid(codes: torch.Tensor, out: Affine, ends: Sequence[float | None] | None = None) -> torch.Tensor:
    """Return s·q of integers q + z, cut off where the grid, and an activation, ends."""
    low, high = ((out.qmin - out.zero), (out.qmax - out.zero))
    for bound, end in enumerate(ends or ()):
        if end is not None:
            cut = torch.round(end / out.scale)
            low, high = (torch.maximum(low, cut), high) if bound == 0 else (low, torch.minimum(high, cut))
    return (codes - out.zero).clamp_(low, high).mul_(out.scale)


def instead(rounded: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
    """Return `value` with the gradient of `rounded`; `rounded` where there is none."""
    return rounded if value is None else _Instead.apply(rounded, value)  # type: ignore[no-any-return, no-untyped-call]


def exporting() -> bool:
    """True for exporters, which want the quantizer alone: the runtime has its kernels."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def link_kernels(model: nn.Module) -> None:
    """Let every kernel of a model find its modules again, after some were replaced."""
    for module in model.modules():
        if isinstance(module, IntegerKernel):
            module.link(model)


class _Instead(torch.autograd.Function):
    """The second value with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, rounded: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient, None
