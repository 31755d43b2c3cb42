"""Scales that are trained with the weights (LSQ, Esser et al. 2020, arXiv:1902.08153), in a form that no step of an optimizer breaks.

    s = s₀ · exp(γ)        ∂L/∂γ := clamp(∂L/∂s / s, −1, 1)        s₀ where training starts, γ = 0 there

LSQ trains s itself. But a scale has the unit of what it rounds: with 16 bits, or inputs of a hundredth, s lies at 1e-5, and one step of
AdamW, 5e-4 whatever the gradient, goes past zero, where nothing brings it back. γ has no unit: s stays positive, a step of an optimizer is
a relative one, and weight decay pulls towards s₀. What stands for ∂L/∂γ makes a step of SGD on γ the relative step that it would be on s,
lr·∂L/∂s / s, and never more than the learning rate. LSQ's factor 1/√(N·Q) is in ∂L/∂s already.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.activations import SMALLEST_SCALE, ActivationQuantizer
from torchopt.quantize.layers.rounding import fake_quantize, in_memory_order, learned_fake_quantize
from torchopt.quantize.targets import Target


class Grow(torch.autograd.Function):
    """s = s₀ · exp(γ), with the bounded gradient of the file's equation."""

    @staticmethod
    def forward(ctx: Any, start: torch.Tensor, growth: torch.Tensor) -> torch.Tensor:
        """Return the scale."""
        scale = start * growth.exp()
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        """The gradient of γ alone: s₀ is no Parameter."""
        (scale,) = ctx.saved_tensors
        return None, (gradient / scale).clamp(-1.0, 1.0)


def grown(start: torch.Tensor, growth: torch.Tensor) -> torch.Tensor:
    """Return the scale that training has come to.

    Example:
        >>> grown(torch.tensor([0.5]), torch.zeros(1))
        tensor([0.5000])
    """
    return cast(torch.Tensor, Grow.apply(start, growth))


class LearnedQuantizer(ActivationQuantizer):
    """Rounds an activation to a grid whose scale is trained; it starts from calibration, or from the first batch of training.

    Its arguments are those of `ActivationQuantizer`.
    """

    start: torch.Tensor
    growth: nn.Parameter
    learn = True

    def _hold_scale(self) -> None:
        self.register_buffer("start", torch.ones(1, dtype=torch.float32))
        self.growth = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    @property
    def scale(self) -> torch.Tensor:  # type: ignore[override]
        """The step of the grid, of shape (1,)."""
        return grown(self.start, self.growth)

    @torch.no_grad()
    def _set_scale(self) -> None:
        scale, zero_point = self._of_range()
        self.start.copy_(scale.reshape(1))
        self.growth.zero_()
        self.zero_point.copy_(zero_point.reshape(1))

    def _follows(self) -> bool:
        return self.training and self.observing and not self.ready

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale.clamp(min=SMALLEST_SCALE)
        return learned_fake_quantize(x, scale, self.zero_point, self.quant_min, self.quant_max)

    def _follow(self, x: torch.Tensor) -> torch.Tensor:
        """The first batch, from whose ends training starts."""
        self.ready = True
        low, high = torch.aminmax(in_memory_order(x.detach()))
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        self._set_scale()
        if not self.rounding:
            return x
        return fake_quantize(x, self.scale.detach(), self.zero_point, self.quant_min, self.quant_max)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        since_start(state_dict, prefix, "scale", "start", "growth", SMALLEST_SCALE)
        super()._load_from_state_dict(state_dict, prefix, *args)


def since_start(state: dict[str, Any], prefix: str, old: str, start: str, growth: str, smallest: float) -> None:
    """Read a checkpoint of the time when the scale itself was the Parameter: training goes on from where it was.

    Example:
        >>> state = {"q.scale": torch.tensor([-0.5])}
        >>> since_start(state, "q.", "scale", "start", "growth", 1e-9)
        >>> state
        {'q.start': tensor([0.5000]), 'q.growth': tensor([0.])}
    """
    scale = state.pop(prefix + old, None)
    if scale is not None:
        state[prefix + start], state[prefix + growth] = scale.abs().clamp(min=smallest), torch.zeros_like(scale)


def activation_quantizer(config: Quantize, target: Target, fixed_range: tuple[float, float] | None = None) -> ActivationQuantizer:
    """Return the quantizer of an activation, as the configuration of its layer and the runtime want it."""
    qmin, qmax = target.activation_range(config.activation_bits)
    learned = config.learn_scale and fixed_range is None
    quantizer = (LearnedQuantizer if learned else ActivationQuantizer)(
        quant_min=qmin,
        quant_max=qmax,
        symmetric=False,
        observer=config.observer,
        fixed_range=fixed_range,
    )
    quantizer.milestones = config.milestones
    return quantizer
