"""What each runtime runs as integers: types of activations and weights, in one place.

x86 kernels of ONNX Runtime take uint8 activations and int8 weights. Without VNNI their 16-bit sums saturate, so weights keep to 7
bits. ARM kernels take int8 activations as well; NNAPI wants uint8. Weights are symmetric per output channel everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchopt.errors import ConfigError, nearest
from torchopt.quantize.config import Quantize


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime: the integers that its activations take, and the most bits that its weights take."""

    name: str
    signed: bool
    most_weight_bits: int

    def activation_range(self, bits: int) -> tuple[int, int]:
        """Return (qmin, qmax) of activations of 8 or 16 bits.

        Example:
            >>> TARGETS["ort-x86"].activation_range(8)
            (0, 255)
        """
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.signed else (0, 2**bits - 1)

    def weight_bits(self, config: Quantize) -> int:
        """Return the bits of a weight grid: what is asked for, lowered to what the runtime takes."""
        return min(config.weight_bits, self.most_weight_bits)


TARGETS = {
    target.name: target
    for target in (
        Target(name="ort-x86", signed=False, most_weight_bits=8),
        Target(name="ort-x86-avx2", signed=False, most_weight_bits=7),
        Target(name="ort-arm", signed=False, most_weight_bits=8),
        Target(name="ort-web", signed=False, most_weight_bits=8),
        Target(name="openvino", signed=False, most_weight_bits=8),
    )
}


def target_named(name: str) -> Target:
    """Return the target of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TARGETS:
        raise ConfigError(f"target={name!r} is unknown; one of {', '.join(TARGETS)} is needed{nearest(str(name), TARGETS)}")
    return TARGETS[name]
