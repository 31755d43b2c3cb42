"""Layers that train on an integer weight grid: convolutions and linear layers, with batch norm and activation fused in.

Since the weight grid is symmetric per output channel, rounding the weight before batch norm equals rounding the folded weight:

    fold:  y = act(conv(x, ŵ·γ/σ) + β − μ·γ/σ)  =  act(bn(conv(x, ŵ)))        s' = s·|γ|/σ,  q' = sign(γ)·q

so training runs act(bn(conv(x, ŵ))), with neither the scaling of the weight by γ/σ nor the division back that the classical scheme
(Jacob et al. 2018, arXiv:1712.05877, §3.2; torch.ao's ConvBn2d) pays for. Evaluation runs the folded form, bit for bit what
`bake` leaves. Each layer is an `nn.Conv*` / `nn.Linear` whose `weight` is the plain Parameter, so that masks and tables stand on it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from torchopt.errors import ModelError
from torchopt.network.computed import covered
from torchopt.network.grid import set_grid
from torchopt.network.surgery import batch_norm_affine
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.learned import grown, since_start
from torchopt.quantize.layers.weight_grid import (
    ONE_SCALE,
    SHARES,
    SMALLEST_SCALE,
    Codes,
    Snap,
    along,
    lsq,
    lsq_start,
    one_scale,
    products,
    settled,
    weight_scale,
)

MOST_BIAS = 2.0**30  # the integer of a bias: half of what 32 bits hold, the rest is the products
LOW_BITS = 4  # up to here calibration searches where the grid ends


class Fused(nn.Module):
    """What the quantized layers share; mixed in before `nn.Conv2d` and its kin.

    Attributes:
        config: the `Quantize` of this layer.
        bits: bits of the weight grid, which a target may lower.
        bn: the batch norm fused in, or None.
        act: the activation fused in, or None.
        shift: what bias correction adds to each channel before the activation, while the weight is rounded; None without it.
        aside: True while `rounding` is set for a while and not by the buffer (`corrections.walk.rounding`).
        shifts: True where it is not 0, so that training need not add it.
        reach: where the grid of each channel ends, as a fraction of the largest |w|; None is 1 (8 bits, learned scales).
        reads: the quantizers of the inputs, one for each grid that its calls read, where the runtime keeps the bias as an integer, in
            steps of both scales; else none.
        held: weight and bias folded beforehand, while calibration only runs the network (`folding.folded_once`); else None.
        scale_in_use: the scale of the weight that the last call computed on, where it was rounded in evaluation; else None.
    """

    weight: Any  # a Parameter, or what a mask and a table make of one
    bias: Any
    config: Quantize
    bits: int
    bn: nn.Module | None
    act: nn.Module | None
    rounding: bool
    rounded_params = ("weight",)
    reach: torch.Tensor | None
    shift: torch.Tensor | None
    shifts: bool = False
    aside: bool = False
    reads: tuple[Any, ...]
    held: tuple[torch.Tensor, torch.Tensor | None] | None = None
    scale_in_use: torch.Tensor | None = None
    weight_scale_start: torch.Tensor
    weight_scale_growth: nn.Parameter
    fake_quant_enabled: torch.Tensor
    bn_frozen: torch.Tensor

    @classmethod
    def of(cls, layer: nn.Module, config: Quantize, bits: int) -> Fused:
        """Return a quantized layer that takes over the parameters of a float one.

        Example:
            >>> from torchopt.quantize.layers.float_layers import FusedLinear
            >>> layer = nn.Linear(4, 2)
            >>> quantized = FusedLinear.of(layer, Quantize(), 8)
            >>> quantized.weight is layer.weight
            True
        """
        quantized = cls.__new__(cls)
        quantized.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
        quantized._start(config, bits)
        return quantized

    def _start(self, config: Quantize, bits: int) -> None:
        self.config, self.bits, self.rounding, self.reads = config, bits, True, ()
        self._modules.update(bn=None, act=None)
        device = self.weight.device
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8, device=device))
        self.register_buffer("bn_frozen", torch.zeros(1, dtype=torch.uint8, device=device))
        self.register_buffer(ONE_SCALE, torch.zeros(1, dtype=torch.uint8, device=device))
        self.frozen = False
        chosen = not config.learn_scale and (bits <= LOW_BITS or config.rounding != "nearest")
        self.register_buffer(
            "reach", torch.ones(self.weight.shape[self.out_axis], dtype=torch.float32, device=device) if chosen else None
        )
        channels = self.weight.shape[1] * self.groups if self.out_axis else len(self.weight)
        self.register_buffer("shift", torch.zeros(channels, dtype=torch.float32, device=device) if config.corrects_bias else None)
        if config.learn_scale:
            start = lsq_start(self.weight, self.qmax, self.out_axis if config.per_channel else None)
            self.register_buffer("weight_scale_start", start)
            self.weight_scale_growth = nn.Parameter(torch.zeros_like(start))

    @property
    def qmax(self) -> int:
        """The largest integer of the weight grid."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def out_axis(self) -> int:
        """The axis of the output channels."""
        return 1 if isinstance(self, _ConvTransposeNd) else 0

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in the output."""
        return 1 if hasattr(self, "kernel_size") else -1

    @property
    def weight_scale(self) -> torch.Tensor:
        """The scale of the weight where it is trained: (channels,), or () when per tensor."""
        return grown(self.weight_scale_start, self.weight_scale_growth)

    @torch.no_grad()
    def restart_scale(self) -> None:
        """Let a scale that is trained start anew, from the weight as it is."""
        if self.config.learn_scale:
            axis = self.out_axis if self.config.per_channel else None
            self.weight_scale_start.copy_(lsq_start(self.weight, self.qmax, axis))
            self.weight_scale_growth.zero_()

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round the weight, or use it as it is."""
        self.fake_quant_enabled.fill_(enabled)
        self.rounding = enabled

    @torch.no_grad()
    def set_shift(self, shift: torch.Tensor | None) -> None:
        """Add `shift`, float32 (channels,), from now on; 0, or None, adds nothing."""
        if self.shift is not None and shift is not None:
            self.shift.copy_(shift)
        self.shifts = self.shift is not None and bool(self.shift.any())

    def scale(self, w: torch.Tensor) -> torch.Tensor:
        """Return the scale of the weight's grid before batch norm: shape (channels,), or () when per tensor."""
        if self.config.learn_scale:
            return self.weight_scale.clamp(min=SMALLEST_SCALE)
        shared = not self.config.per_channel or one_scale(self, "weight")
        scale = weight_scale(w, self.qmax, None if shared else self.out_axis)
        if self.reach is None:
            return scale
        return scale * (self.reach[0] if shared else self.reach)

    def fake_quantized(self, w: torch.Tensor) -> torch.Tensor:
        """Return the weight on its grid, as training uses it."""
        scale = self.scale(w)
        wide = along(scale, w.dim(), self.out_axis)
        if self.config.learn_scale:
            return lsq(w, wide, self.qmax)
        return cast(torch.Tensor, Snap.apply(w, wide, self.qmax, self.bits <= LOW_BITS))

    def folded(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return weight, bias and scale with batch norm folded in: ŵ = s'·q bit for bit.

        Returns:
            `(ŵ, b', s')`; s' has shape (channels,), or () when per tensor without batch norm.
        """
        scale, bias = self.scale(w), self.bias
        final = scale
        sign: torch.Tensor | float = 1.0
        if self.bn is not None:
            factor, shift = batch_norm_affine(self.bn)  # type: ignore[arg-type]
            bias = shift if bias is None else bias * factor + shift
            final = (scale * factor).abs().clamp(min=SMALLEST_SCALE)
            sign = along(torch.where(factor < 0, -1.0, 1.0).to(w.dtype), w.dim(), self.out_axis)
        if self.shifts:
            assert self.shift is not None
            bias = self.shift if bias is None else bias + self.shift
        wider = self._wider(bias, final)
        scale, final = scale * wider, final * wider
        q = Codes.apply(w, along(scale, w.dim(), self.out_axis), self.qmax) * sign
        q = q + 0.0  # integers know no -0.0, and the file must give back the same bits
        return q * along(final, w.dim(), self.out_axis), self._in_steps(bias, final), final

    def _steps(self, bias: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | None:
        """The smallest s_x·s_w of every entry of the bias, or of all; None where no integer kernel adds it."""
        if bias is None or not self.reads or not all(grid.ready and grid.rounding for grid in self.reads):
            return None
        smallest = torch.stack([grid.scale.detach()[0] for grid in self.reads]).amin()
        return products(smallest, scale.detach(), len(bias))

    def _wider(self, bias: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | float:
        """How many times wider the grid of the weight must be, for the bias to fit into 32 bits.

        Where the input is always 0, or batch norm multiplies by almost 0, the bias is all there is, and a coarse weight loses nothing.
        """
        step = self._steps(bias, scale)
        if bias is None or step is None:
            return 1.0
        times = (bias.detach().abs() / (step * MOST_BIAS)).clamp(min=1.0)
        times = times.reshape(-1, len(scale)).amax(0) if scale.dim() else times.amax()
        return times if bool((times > 1).any()) else 1.0

    def _in_steps(self, bias: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | None:
        """The bias as integer kernels add it: a multiple of s_x·s_w; as it is where each call has another (`kernels.layer_value`)."""
        step = self._steps(bias, scale) if len(self.reads) == 1 else None
        return bias if bias is None or step is None else torch.round(bias / step) * step

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer itself, on given weights."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """Return act(bn(layer(x))); x as the float layer takes it."""
        if args:
            raise ModelError(f"{type(self).__name__}: takes one input, got {1 + len(args)}; leave the layer out of quantization")
        self.scale_in_use = None
        if self.held is not None:
            y = self.compute(x, *self.held)
        elif self.training or not self.rounding or not self.bn_is_fixed:
            w = covered(self, "weight")
            y = self.compute(x, self.fake_quantized(w) if self.rounding else w, self.bias)
            y = y if self.bn is None else self.bn(y)
            if self.shifts and self.rounding:
                assert self.shift is not None
                y = y + along(self.shift, y.dim(), self.channel_axis)
        else:
            y = self.compute(x, *self.in_use())
        return y if self.act is None else self.act(y)

    def in_use(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias as evaluation uses them: batch norm folded in, the weight on its grid while it is rounded."""
        if self.rounding:
            weight, bias, scale = self.folded(covered(self, "weight"))
            self.scale_in_use = scale.detach()
            return weight, bias
        w = covered(self, "weight")
        if self.bn is None:
            return w, self.bias
        factor, shift = batch_norm_affine(self.bn)  # type: ignore[arg-type]
        bias = shift if self.bias is None else self.bias * factor + shift
        return w * along(factor, w.dim(), self.out_axis), bias

    @property
    def bn_is_fixed(self) -> bool:
        """True where batch norm uses its running statistics."""
        return self.bn is None or not self.bn.training

    def bake(self) -> nn.Module:
        """Return the plain layer with folded weights on their grid."""
        weight, bias, scale = self.folded(self.weight.detach())
        plain = self.plain()
        plain.weight = nn.Parameter(weight.detach().clone())  # type: ignore[assignment]
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().clone())  # type: ignore[assignment]
        set_grid(plain, "weight", scale, self.bits, None if scale.dim() == 0 else self.out_axis)
        return plain

    def plain(self) -> nn.Module:
        """Return the float layer that this one was made of, with its attributes and without anything of ours."""
        base = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn."))
        plain: nn.Module = base.__new__(base)  # type: ignore[call-overload]
        ours = {"config", "bits", "rounding", "frozen", "reads", "scale_in_use", "shifts", "aside", SHARES}
        plain.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in self.__dict__.items() if k not in ours})
        plain.__dict__.update(_buffers={}, _modules={}, _parameters=dict.fromkeys(("weight", "bias")))
        return plain

    def freeze_bn(self) -> None:
        """Use batch norm's running statistics from now on, in training too."""
        self.bn_frozen.fill_(1)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Fused:
        """Set the mode; a frozen batch norm stays in evaluation. Flags are those of the buffers, which a copy may have written."""
        super().train(mode)
        if not self.aside:
            self.rounding = bool(self.fake_quant_enabled)
        self.frozen = bool(self.bn_frozen)
        if self.frozen and self.bn is not None:
            self.bn.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        settled(self, state_dict, prefix)
        if self.config.learn_scale:
            since_start(state_dict, prefix, "weight_scale", "weight_scale_start", "weight_scale_growth", SMALLEST_SCALE)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.rounding, self.frozen = bool(self.fake_quant_enabled), bool(self.bn_frozen)
        self.set_shift(self.shift)
        self.train(self.training)
