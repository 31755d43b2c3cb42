"""Layers that round their own input, on a range fixed by calibration: static quantization where there is no graph to place it in.

    y = x̂ · ŵᵀ + b        x̂ on the 8-bit grid of the input        convolutions: ŷ as well

For a transformer this is all there is to gain: between its linear layers stand operations that ONNX Runtime runs in float (layer norm,
softmax, GELU), and its integer product takes 8-bit inputs and gives float results. Its integer convolution wants both ends on a grid.
Layers that read one tensor (query, key and value) share a quantizer, so that the tensor is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchopt.errors import ModelError
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.dynamic import called
from torchopt.quantize.layers.float_layers import FusedConv1d, FusedConv2d, FusedConv3d, FusedLinear, layer_class
from torchopt.quantize.layers.kernels import exporting, instead, layer_value
from torchopt.quantize.layers.learned import activation_quantizer
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.rounding import FixedQuantize
from torchopt.quantize.targets import Target


class Rounded(nn.Module):
    """Mixed in before a plain layer of a finalized model; `output` is None for linear layers."""

    input: nn.Module
    output: nn.Module | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer on rounded inputs; x as the layer takes it."""
        y: torch.Tensor = super().forward(self.input(x))  # type: ignore[misc]
        return y if self.output is None else as_kernel(self, y)

    def describe(self) -> list[list[int] | None]:
        """Return what the buffers do not hold: the ends of both grids."""
        return [end.describe() if isinstance(end, FixedQuantize) else None for end in (self.input, self.output)]

    @classmethod
    def of(cls, layer: nn.Module, ends: Iterable[nn.Module | None]) -> nn.Module:
        """Turn a plain layer into one that rounds its input, and its output where the second end is given, in place.

        Raises:
            ModelError: it is of another kind.

        Example:
            >>> half = FixedQuantize(torch.tensor(0.5), torch.tensor(0), 0, 255)
            >>> layer = Rounded.of(nn.Linear(1, 1), (half, None))
            >>> torch.equal(layer(torch.tensor([[0.6]])), layer(torch.tensor([[0.5]])))
            True
        """
        if type(layer) not in ROUNDED:
            raise ModelError(f"quantize: {type(layer).__name__} does not round its input; one of {_names()} is needed")
        layer.__class__ = ROUNDED[type(layer)]
        layer._modules.update(zip(("input", "output"), ends, strict=True))
        return called(layer)


def as_kernel(layer: Any, y: torch.Tensor) -> torch.Tensor:
    """Return the result of a layer with quantizers at both ends on its grid, rounded as the runtime's kernel does in evaluation."""
    rounded: torch.Tensor = layer.output(y)
    if layer.training or exporting():
        return rounded
    return instead(rounded, layer_value(layer, y.detach(), layer.input.affine(), layer.output.affine()))


class RoundedLinear(Rounded, nn.Linear):
    """A linear layer that rounds its input."""


class RoundedConv1d(Rounded, nn.Conv1d):
    """A 1-d convolution that rounds its input and its output."""


class RoundedConv2d(Rounded, nn.Conv2d):
    """A 2-d convolution that rounds its input and its output."""


class RoundedConv3d(Rounded, nn.Conv3d):
    """A 3-d convolution that rounds its input and its output."""


ROUNDED: dict[type[nn.Module], type[Rounded]] = {
    nn.Linear: RoundedLinear,
    nn.Conv1d: RoundedConv1d,
    nn.Conv2d: RoundedConv2d,
    nn.Conv3d: RoundedConv3d,
}


class FusedRounded(Fused):
    """Mixed in before a layer on an integer weight grid: it observes and rounds its input, and its output where it is a convolution."""

    input: ActivationQuantizer
    output: ActivationQuantizer | None

    def compute(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer on rounded inputs."""
        y: torch.Tensor = super().compute(self.input(x), weight, bias)
        return y if self.output is None else as_kernel(self, y)

    def plain(self) -> nn.Module:
        """Return the layer that a finalized model keeps."""
        return Rounded.of(super().plain(), [None if end is None else FixedQuantize.of(end) for end in (self.input, self.output)])


class FusedRoundedLinear(FusedRounded, FusedLinear):
    """A linear layer that trains on integer grids of its weight and its input."""


class FusedRoundedConv1d(FusedRounded, FusedConv1d):
    """A 1-d convolution that trains on integer grids of its weight, input and output."""


class FusedRoundedConv2d(FusedRounded, FusedConv2d):
    """A 2-d convolution that trains on integer grids of its weight, input and output."""


class FusedRoundedConv3d(FusedRounded, FusedConv3d):
    """A 3-d convolution that trains on integer grids of its weight, input and output."""


FUSED_ROUNDED: dict[type[nn.Module], type[FusedRounded]] = {
    nn.Linear: FusedRoundedLinear,
    nn.Conv1d: FusedRoundedConv1d,
    nn.Conv2d: FusedRoundedConv2d,
    nn.Conv3d: FusedRoundedConv3d,
}


def rounded_class(layer: nn.Module) -> type[FusedRounded] | None:
    """The class of quantized layer with grids of its own that `layer` would become, or None."""
    known = layer_class(layer)
    return FUSED_ROUNDED.get(known) if known else None


def rounded(layer: nn.Module, config: Quantize, bits: int, target: Target) -> FusedRounded | None:
    """Return the quantized layer that takes over `layer`'s parameters and rounds its input, or None where there is none of its class."""
    cls = rounded_class(layer)
    if cls is None:
        return None
    quantized: Any = cls.of(layer, config, bits)
    output = None if isinstance(layer, nn.Linear) else activation_quantizer(config, target)
    quantized._modules.update(input=activation_quantizer(config, target), output=output)
    quantized.reads = () if output is None else (quantized.input,)
    called(quantized)
    return quantized  # type: ignore[no-any-return]


@torch.no_grad()
def share_inputs(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Let layers that read one tensor round it by one quantizer; the model runs once, in evaluation mode."""
    first: dict[int, tuple[torch.Tensor, ActivationQuantizer]] = {}  # with the tensor, so that its id is not used again

    def share(layer: FusedRounded, args: tuple[torch.Tensor, ...]) -> None:
        layer._modules["input"] = first.setdefault(id(args[0]), (args[0], layer.input))[1]
        layer.reads = () if layer.output is None else (layer.input,)

    hooks = [m.register_forward_pre_hook(share) for m in model.modules() if isinstance(m, FusedRounded)]  # type: ignore[arg-type]
    training = model.training
    try:
        model.eval()(*example_inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _names() -> str:
    return ", ".join(cls.__name__ for cls in ROUNDED)
