"""Recurrent layers on integer weight grids: every gate's weights are rounded in each call, activations stay float."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from torchopt.network.grid import set_grid
from torchopt.quantize.config import Quantize
from torchopt.quantize.layers.weight_grid import ONE_SCALE, SHARES, Snap, along, one_scale, settled, weight_scale


class QuantizedRecurrent(nn.Module):
    """Mixed in before `nn.LSTM`, `nn.GRU` and `nn.RNN`; weights keep their names."""

    config: Quantize
    bits: int
    rounding: bool = True
    aside: bool = False  # True while `rounding` is set for a while and not by the buffer
    fake_quant_enabled: torch.Tensor
    _flat_weights: list[Any]
    _flat_weight_refs: list[Any]
    _flat_weights_names: list[str]

    @classmethod
    def of(cls, layer: nn.Module, config: Quantize, bits: int) -> QuantizedRecurrent:
        """Return a quantized layer that takes over the parameters of a float one."""
        quantized = cls.__new__(cls)
        quantized.__dict__.update({k: v.copy() if isinstance(v, dict | list) else v for k, v in layer.__dict__.items()})
        quantized.__dict__.update(config=config, bits=bits)
        device = quantized._flat_weights[0].device
        quantized.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8, device=device))
        quantized.register_buffer(ONE_SCALE, torch.zeros(len(quantized.rounded_params), dtype=torch.uint8, device=device))
        return quantized

    @property
    def rounded_params(self) -> list[str]:
        """The names of the weights; biases stay float."""
        return [name for name in self._flat_weights_names if name.startswith("weight")]

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round the weights, or use them as they are."""
        self.fake_quant_enabled.fill_(enabled)
        self.rounding = enabled

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        settled(self, state_dict, prefix)
        state_dict.setdefault(f"{prefix}fake_quant_enabled", self.fake_quant_enabled.clone())  # earlier versions always rounded
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.rounding = bool(self.fake_quant_enabled)

    def scale(self, param: str) -> torch.Tensor:
        """Return the scale of one weight: (rows,), or () when per tensor."""
        axis = 0 if self.config.per_channel and not one_scale(self, param) else None
        return weight_scale(getattr(self, param), 2 ** (self.bits - 1) - 1, axis)

    def snapped(self, param: str) -> torch.Tensor:
        """Return one weight on its grid."""
        w, scale = getattr(self, param), self.scale(param)
        return (
            cast(torch.Tensor, Snap.apply(w, along(scale, w.dim(), 0), 2 ** (self.bits - 1) - 1, False)).contiguous() + 0.0
        )  # no -0.0: integers know none

    def forward(self, *args: Any) -> Any:
        """Run the layer on its rounded weights, or on its own while they are not rounded."""
        if not self.rounding:
            return super().forward(*args)
        floats, refs = self._flat_weights, self._flat_weight_refs
        names = self._flat_weights_names
        self._flat_weight_refs = [None] * len(names)  # else torch sees other weights than its own, and takes its own again
        self._flat_weights = [self.snapped(n) if n.startswith("weight") else w for n, w in zip(names, floats, strict=True)]
        try:
            return super().forward(*args)
        finally:
            self._flat_weights, self._flat_weight_refs = floats, refs

    def bake(self) -> nn.Module:
        """Return the plain layer with its weights on their grids."""
        base = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn.") and c is not nn.Module)
        plain: nn.Module = base.__new__(base)  # type: ignore[call-overload]
        plain.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k not in ("config", "bits", "rounding", "aside", SHARES)}
        )
        plain._buffers = {k: v for k, v in self._buffers.items() if k not in ("fake_quant_enabled", ONE_SCALE)}
        for param in self.rounded_params:
            scale, snapped = self.scale(param), self.snapped(param)
            setattr(plain, param, nn.Parameter(snapped.detach()))
            set_grid(plain, param, scale, self.bits, 0 if scale.dim() else None)
        return plain


class QuantizedLSTM(QuantizedRecurrent, nn.LSTM):
    """An LSTM on integer weight grids."""


class QuantizedGRU(QuantizedRecurrent, nn.GRU):
    """A GRU on integer weight grids."""


class QuantizedRNN(QuantizedRecurrent, nn.RNN):
    """A plain RNN on integer weight grids."""


RECURRENT: dict[type[nn.Module], type[QuantizedRecurrent]] = {
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
}
