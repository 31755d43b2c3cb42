"""Everything that torchopt takes from `torch.ao`, whose removal torch has announced; each with a replacement for a torch without it.

- `FakeQuantizeBase`, the interface of fake quantizers. The replacement has the same methods and the same entries of the state_dict.
- The operators `quantized_decomposed::(de)quantize_per_tensor`, which `torch.export` traces and other tools know by name.
- What an observer of a user's is. It is known by its interface, so that a class of `torch.ao`, one derived from it, and one that only
  looks like it are taken alike.

No other file imports `torch.ao` (tests/test_house.py). `scripts/test --without-torch-ao` runs the tests with `torch.ao` blocked.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

GRID = {"dtype", "quant_min", "quant_max", "scale", "zero_point"}  # arguments of observers that say which integers they are for
NAMESPACE = "quantized_decomposed"


class SameInterface(ABC, nn.Module):
    """The part of torch.ao's `FakeQuantizeBase` that fake quantizers build on."""

    fake_quant_enabled: torch.Tensor
    observer_enabled: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe and round."""

    @abstractmethod
    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the zero point."""

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round, or let pass."""
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        """Let pass."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Follow the data, or stop."""
        self.observer_enabled[0] = int(enabled)

    def disable_observer(self) -> None:
        """Stop following the data."""
        self.enable_observer(False)


def register(namespace: str = NAMESPACE) -> torch.library.Library:
    """Define the two operators as torch.ao does, and return what keeps them defined.

    Example:
        >>> kept = register("torchopt_doctest")
        >>> grid = torch.tensor(0.5), torch.tensor(3), 0, 255, torch.uint8
        >>> torch.ops.torchopt_doctest.quantize_per_tensor.tensor(torch.tensor([1.0, -1.0]), *grid)
        tensor([5, 1], dtype=torch.uint8)
    """
    library = torch.library.Library(namespace, "FRAGMENT")
    grid = "Tensor input, Tensor scale, Tensor zero_point, int quant_min, int quant_max, ScalarType dtype"
    library.define(f"quantize_per_tensor.tensor({grid}) -> Tensor")
    library.define(f"dequantize_per_tensor.tensor({grid}, *, ScalarType? out_dtype=None) -> Tensor")
    for key, quantize, dequantize in (
        ("CompositeExplicitAutograd", _quantize, _dequantize),
        (
            "Meta",
            lambda x, *grid: torch.empty_like(x, dtype=grid[-1]),
            lambda x, *grid, **_: torch.empty_like(x, dtype=torch.float32),
        ),
    ):
        library.impl("quantize_per_tensor.tensor", quantize, key)
        library.impl("dequantize_per_tensor.tensor", dequantize, key)
    return library


def _quantize(x: torch.Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.clamp(torch.round(x.float() * (1.0 / scale.item())) + zero_point.item(), quant_min, quant_max).to(dtype)


def _dequantize(
    x: torch.Tensor,
    scale: Any,
    zero_point: Any,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return (x.to(out_dtype or torch.float32) - zero_point.item()) * scale.item()


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the announcement of its removal is known
    try:
        import torch.ao.quantization.fx._decomposed  # registers the operators
        from torch.ao.quantization.fake_quantize import FakeQuantizeBase as Theirs
    except ImportError:
        Theirs = SameInterface  # type: ignore[assignment, misc]
        OPERATORS = register()

if TYPE_CHECKING:
    FakeQuantizeBase = SameInterface
else:
    FakeQuantizeBase = Theirs


def opened(made: Any) -> tuple[Any, dict[str, Any]]:
    """Return what `Observer.with_args(…)` or a `functools.partial` calls, and with which arguments.

    Example:
        >>> opened(functools.partial(dict, a=1))
        (<class 'dict'>, {'a': 1})
    """
    arguments: dict[str, Any] = {}
    while True:
        inner = made if isinstance(made, functools.partial) else vars(made).get("p") if hasattr(made, "__dict__") else None
        if not isinstance(inner, functools.partial) or inner.args:
            return made, arguments
        made, arguments = inner.func, inner.keywords | arguments


def is_observer(kind: Any) -> bool:
    """True for a class with the interface of torch.ao's observers: a module that is called with tensors, and chooses a grid.

    Example:
        >>> is_observer(nn.ReLU)
        False
    """
    return isinstance(kind, type) and issubclass(kind, nn.Module) and callable(getattr(kind, "calculate_qparams", None))


def integers(observer: Any) -> tuple[int, int] | None:
    """The smallest and the largest integer that an observer's scale and zero point are for; None where it does not say.

    Example:
        >>> from types import SimpleNamespace
        >>> integers(SimpleNamespace(dtype=torch.qint8))
        (-128, 127)
    """
    ends = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    if ends[0] is not None and ends[1] is not None:
        return int(ends[0]), int(ends[1])
    dtype = getattr(observer, "dtype", None)
    try:
        told = torch.iinfo(dtype)  # type: ignore[arg-type]
    except TypeError:
        return None
    return int(told.min), int(told.max)


def for_integers(arguments: Collection[str], quant_min: int, quant_max: int) -> dict[str, Any]:
    """Return the arguments that make torch.ao's observers choose for these integers; none where `arguments` say others.

    Example:
        >>> for_integers([], 0, 255)
        {'dtype': torch.quint8, 'quant_min': 0, 'quant_max': 255}
    """
    if GRID & set(arguments):
        return {}
    return {"dtype": torch.quint8 if quant_min >= 0 else torch.qint8, "quant_min": quant_min, "quant_max": quant_max}
