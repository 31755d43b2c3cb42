"""What a user chooses about quantization: one frozen dataclass whose fields are the recipe's keys.

static       activations and weights on integer grids; ranges of activations fixed after calibration or training
dynamic      weights on integer grids; ranges of activations computed at run time
weight_only  weights on integer grids, activations float
float16      weights rounded to half precision
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torchopt.errors import ConfigError, nearest
from torchopt.quantize.observers.own import ImportedObserver, checked

MODES = ("static", "dynamic", "weight_only", "float16")
OBSERVERS = ("auto", "minmax", "moving_average", "histogram", "percentile", "mse", "entropy")
ROUNDINGS = ("nearest", "least_squares", "adaptive")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """How the weights and the activations of a module become integers.

    Attributes:
        mode: "static", "dynamic", "weight_only" or "float16".
        weight_bits: 2 … 8; the grid is symmetric, −(2^(b−1)−1) … 2^(b−1)−1.
        activation_bits: 8 or 16.
        observer: how calibration chooses the range of an activation: "auto" (least error at the network's outputs), "minmax",
            "moving_average", "histogram", "percentile", "mse" or "entropy"; or a class of your own with the interface of
            `torch.ao.quantization`'s observers, bare or by `with_args`. Training follows the data by such a class, too.
        per_channel: one weight scale per output channel, else one per tensor.
        equalize: even out the ranges of the channels between layers before calibration (Nagel et al. 2019, arXiv:1906.04721); layers
            under tables of shared values are left out.
        bias_correction: remove the mean shift that rounding causes, at calibration; None does so where the rounding of weights learns
            from data too, and scales are not trained.
        rounding: of weights, at calibration: "nearest"; "least_squares": a rounding error is taken up by the weights after it (GPTQ,
            Frantar et al. 2023, arXiv:2210.17323), nearest where a table holds them or a scale is learned; "adaptive": learned per
            weight (AdaRound, Nagel et al. 2020, arXiv:2004.10568).
        learn_scale: train the scales with the weights (LSQ, Esser et al. 2020, arXiv:1902.08153).
        milestones: optimizer steps at which training starts to fake-quantize, freezes the observers, and freezes batch norm.
        block_size: input weights a scale, for 4-bit linear layers in "weight_only" mode; None is one scale per channel.
        fallback: "auto" leaves in float what integers make slower, measured by `prepare` in ONNX Runtime on this machine, and what makes
            the score too low where `one_shot` is given an `evaluate`; None keeps all.

    Raises:
        ConfigError: a field is out of its range.

    Example:
        >>> Quantize(weight_bits=4).qmax
        7
    """

    mode: str = "static"
    weight_bits: int = 8
    activation_bits: int = 8
    observer: str | ImportedObserver | Callable[..., Any] = "auto"
    per_channel: bool = True
    equalize: bool = True
    bias_correction: bool | None = None
    rounding: str = "least_squares"
    learn_scale: bool = False
    milestones: Sequence[int] | None = None
    block_size: int | None = None
    fallback: str | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        if isinstance(self.observer, str):
            _one_of("observer", self.observer, OBSERVERS)
        else:
            object.__setattr__(self, "observer", checked(self.observer))
        _one_of("rounding", self.rounding, ROUNDINGS)
        _check(
            "weight_bits", self.weight_bits, _is_int(self.weight_bits) and 2 <= self.weight_bits <= 8, "an integer from 2 to 8"
        )
        _check(
            "activation_bits", self.activation_bits, _is_int(self.activation_bits) and self.activation_bits in (8, 16), "8 or 16"
        )
        for name in ("per_channel", "equalize", "learn_scale"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "true or false")
        known = self.bias_correction is None or isinstance(self.bias_correction, bool)
        _check("bias_correction", self.bias_correction, known, "true, false or None")
        _check("fallback", self.fallback, self.fallback in (None, "auto"), "'auto' or None")
        _check_milestones(self.milestones)
        self._check_combination()

    def _check_combination(self) -> None:
        block = self.block_size
        fine = block is None or (_is_int(block) and block >= 16 and block & (block - 1) == 0)
        _check("block_size", block, fine, "a power of two of at least 16, or None")
        if block is not None:
            self._check_blocks(block)
        if self.mode == "dynamic" and self.activation_bits != 8:
            raise ConfigError("Quantize.activation_bits: 'dynamic' rounds to 8 bits; 8 is needed, or mode='static'")
        if self.mode in ("weight_only", "float16") and self.activation_bits != 8:
            raise ConfigError(
                f"Quantize.activation_bits: got {self.activation_bits} with mode={self.mode!r}, whose activations stay float; leave it "
                "out, or use mode='static'"
            )
        if self.mode != "static":
            for name, asked in (("bias_correction", True), ("rounding", "adaptive")):
                if getattr(self, name) == asked:
                    raise ConfigError(
                        f"Quantize.{name}: learns from calibration data, of which mode={self.mode!r} sees none; use mode='static'"
                    )
        if self.mode == "float16" and (self.learn_scale or self.rounding == "adaptive" or self.weight_bits != 8):
            raise ConfigError(
                "Quantize.mode: 'float16' has no scales and no bits; leave weight_bits, rounding and learn_scale out"
            )
        if self.learn_scale and self.rounding == "adaptive":
            raise ConfigError("Quantize.learn_scale: training moves what rounding='adaptive' fixed; choose one of the two")

    def _check_blocks(self, block: int) -> None:
        if self.mode != "weight_only" or self.weight_bits != 4:
            raise ConfigError(
                f"Quantize.block_size: {block} with mode={self.mode!r}, weight_bits={self.weight_bits}; a scale a block is for 4-bit "
                "weights and float activations: mode='weight_only', weight_bits=4"
            )
        if not self.per_channel or self.learn_scale:
            raise ConfigError(f"Quantize.block_size: {block} fixes a scale a block; leave per_channel and learn_scale out")

    @property
    def corrects_bias(self) -> bool:
        """True where calibration moves biases."""
        if self.bias_correction is not None:
            return self.bias_correction
        return self.mode == "static" and self.rounding != "nearest" and not self.learn_scale

    @property
    def qmax(self) -> int:
        """The largest integer of the weight grid: 127 for 8 bits."""
        return int(2 ** (self.weight_bits - 1) - 1)


def _check(name: str, value: Any, fine: bool, right: str) -> None:
    if not fine:
        raise ConfigError(f"Quantize.{name}: got {value!r}; {right} is needed")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"Quantize.{name}: got {value!r}; one of {', '.join(choices)} is needed{nearest(str(value), choices)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_milestones(value: Sequence[int] | None) -> None:
    if value is None:
        return
    fine = not isinstance(value, str) and len(value) == 3 and all(_is_int(v) and v >= 0 for v in value)
    if not fine or list(value) != sorted(value):
        raise ConfigError(
            f"Quantize.milestones: got {value!r}; three optimizer steps in rising order are needed: "
            "[fake-quantize, freeze observers, freeze batch norm]"
        )
