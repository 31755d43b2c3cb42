"""What stands under `train:` in a recipe: how long, with which optimizer, and from whom to learn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from torchopt.data import Augment
from torchopt.errors import ConfigError


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (low <= value <= high and math.isfinite(value)):
        raise ConfigError(f"{name}: got {value}; a number between {low:g} and {high:g} is needed")


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Kingma and Ba (2014), arXiv 1412.6980."""

    kind: ClassVar[str] = "adam"

    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check("Adam.lr", self.lr, 0, 10)
        _check("Adam.weight_decay", self.weight_decay, 0, 10)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
        return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay: Loshchilov and Hutter (2017), arXiv 1711.05101."""

    kind: ClassVar[str] = "adamw"

    lr: float = 1e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        _check("AdamW.lr", self.lr, 0, 10)
        _check("AdamW.weight_decay", self.weight_decay, 0, 10)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum."""

    kind: ClassVar[str] = "sgd"

    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check("SGD.lr", self.lr, 0, 100)
        _check("SGD.momentum", self.momentum, 0, 1)
        _check("SGD.weight_decay", self.weight_decay, 0, 10)
        if self.nesterov and self.momentum == 0:
            raise ConfigError("SGD.nesterov: is true while SGD.momentum is 0; a momentum above 0 is needed")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer over `parameters`."""
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Learn also from a teacher's softened outputs: Hinton, Vinyals, Dean (2015), arXiv 1503.02531.

        loss = (1 - weight) · CE(student, label) + weight · T² · KL(softmax(teacher / T) ‖ softmax(student / T))

    Attributes:
        temperature: T, above 0.
        weight: share of the teacher's part, in [0, 1].
    """

    temperature: float = 4.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        _check("Distill.temperature", self.temperature, 0.1, 100)
        _check("Distill.weight", self.weight, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Train:
    """One stage of training.

    Attributes:
        epochs: passes over the training part, at least 1.
        batch_size: samples a step, over all processes together.
        optimizer: `Adam`, `AdamW` or `SGD`.
        schedule: "cosine" (from the optimizer's lr to 1 % of it) or "constant".
        warmup_steps: steps over which the learning rate rises from 0.
        label_smoothing: in [0, 1).
        distill: a `Distill`, True for its defaults, or False; the teacher is the float model of the run.
        precision: "float32", "bf16" (autocast), or "auto": bf16 where the device multiplies it in hardware of its own (GPUs from
            compute capability 8.0 on, processors with AMX or AVX512-BF16), float32 elsewhere, where bf16 would be slower, up to
            20 times.
        augment: random changes of the pictures, or None.
        clip_norm: largest norm of the gradient, or None.
        device: "cpu", "cuda", or "auto": cuda where there is one.
    """

    epochs: int
    batch_size: int = 64
    optimizer: Adam | AdamW | SGD = field(default_factory=Adam)
    schedule: str = "cosine"
    warmup_steps: int = 0
    label_smoothing: float = 0.0
    distill: bool | Distill = False
    precision: str = "float32"
    augment: Augment | None = None
    clip_norm: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"Train.{name}: got {getattr(self, name)}; at least {least} is needed")
        _check("Train.label_smoothing", self.label_smoothing, 0, 0.9)
        for name, choices in (
            ("schedule", ("cosine", "constant")),
            ("precision", ("float32", "bf16", "auto")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"Train.{name}: got {getattr(self, name)!r}; one of {', '.join(choices)} is needed")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError(f"Train.clip_norm: got {self.clip_norm}; a number above 0, or None")

    @property
    def distillation(self) -> Distill | None:
        """The `Distill` in force, or None."""
        return Distill() if self.distill is True else (self.distill or None)

    def autocasts(self, device: torch.device) -> bool:
        """True where training on `device` runs under bf16 autocast.

        Example:
            >>> Train(epochs=1, precision="bf16").autocasts(torch.device("cpu"))
            True
        """
        if self.precision != "auto":
            return self.precision == "bf16"
        if device.type == "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.8 does not say
        return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))

    def learning_rate(self, step: int, total: int) -> float:
        """Return the learning rate of step number `step` (0-based) of `total`.

        Example:
            >>> config = Train(epochs=1, optimizer=SGD(lr=0.1))
            >>> [round(config.learning_rate(s, 100), 4) for s in (0, 50, 100)]
            [0.1, 0.0505, 0.001]
        """
        peak = self.optimizer.lr
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return peak
        share = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
