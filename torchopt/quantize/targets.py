"""What each runtime runs as integers: types of activations and weights, in one place.

x86 kernels of ONNX Runtime take uint8 activations and int8 weights. Without VNNI their 16-bit sums saturate, so weights keep to 7
bits. ARM kernels take int8 activations as well; NNAPI wants uint8. Weights are symmetric per output channel everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchopt.errors import ConfigError, nearest
from torchopt.quantize.config import Quantize


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Nanoseconds that operations on images take on one core: an element of the result, where nothing else is said.

    Attributes:
        input: rounding the network's input and turning its layout.
        entrance: rounding a float value inside the network and turning its layout.
        output, mac, tap: of an integer convolution: a result, a product, and gathering one pixel of a kernel larger than 1×1.
        depthwise, pixel: of an integer depthwise convolution: a product, and a position; so pays a product with one value a channel.
        hard_gate, soft_gate: Hardswish and SiLU on integers.
        product, sum, pool, unit: of integers with one value a channel; of two tensors; of an element read; sigmoids.
        float_mac, float_depthwise, float_stride: a product in float; and how many times as long depthwise ones take with a stride.
        float_gate, float_product, float_pool: SiLU, a product with one value a channel, pooling in float; a Hardswish is free.
    """

    input: float
    entrance: float
    output: float
    mac: float
    tap: float
    depthwise: float
    pixel: float
    hard_gate: float
    soft_gate: float
    product: float
    sum: float
    pool: float
    unit: float
    float_mac: float
    float_depthwise: float
    float_stride: float
    float_gate: float
    float_product: float
    float_pool: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime: the integers that its activations take, the most bits that its weights take, and its costs where they were measured."""

    name: str
    signed: bool
    most_weight_bits: int
    costs: Costs | None = None

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


X86 = Costs(  # medians over the nodes of MobileNetV3, EfficientNet-b0 and MobileNetV2, 224×224, ORT 1.32, AVX512-VNNI at 2.6 GHz
    input=0.8, entrance=0.48, output=0.13, mac=0.003, tap=1.4, depthwise=0.04, pixel=8.0, hard_gate=0.40, soft_gate=0.49,
    product=0.24, sum=0.18, pool=0.05, unit=0.25,
    float_mac=0.019, float_depthwise=0.032, float_stride=2.3, float_gate=0.35, float_product=0.75, float_pool=0.12,
)  # fmt: skip

TARGETS = {
    target.name: target
    for target in (
        Target(name="ort-x86", signed=False, most_weight_bits=8, costs=X86),
        Target(name="ort-x86-avx2", signed=False, most_weight_bits=7, costs=X86),
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
