"""Observers of a user's own: any class with the interface of `torch.ao.quantization`'s.

Such an observer is called with each batch and then asked for a scale and a zero point. Both are turned into the range of values that
their integers stand for. The grid stays the one that the runtime wants; on as many integers it has the observer's own scale and zero point.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchopt.errors import ConfigError, FileError, StateError
from torchopt.io.importing import in_users_code, load_callable
from torchopt.quantize.observers.minmax import Observer
from torchopt.quantize.torch_ao import for_integers, integers, is_observer, opened

WHERE = "Quantize.observer"
TRIED = (2, 3, 4, 4)  # the shape of what a class is tried with, when it is given
NEEDED = "a class with forward(x) and calculate_qparams(), such as torch.ao.quantization.MinMaxObserver, is needed"


@dataclass(frozen=True, kw_only=True)
class ImportedObserver:
    """An observer's class by name, as recipes and files hold it.

    Attributes:
        import_: "package.module:Class"; the key in a recipe is `import`.
        arguments: what the class is called with; text such as "torch.qint8" is torch's type or scheme of that name.
    """

    import_: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def found(self) -> OwnObserver:
        """Import the class.

        Raises:
            ConfigError: it is not there.
        """
        module, _, name = self.import_.partition(":")
        kind = load_callable(f"{module}:{name.partition('.')[0]}", where=WHERE)
        for part in name.split(".")[1:]:  # a class inside a class
            kind = getattr(kind, part, None)  # type: ignore[assignment]
        return OwnObserver(kind=kind, arguments={key: _of_torch(value) for key, value in self.arguments.items()})


@dataclass(frozen=True, kw_only=True)
class OwnObserver:
    """A user's class and the arguments that it is called with.

    Example:
        >>> OwnObserver(kind=torch.nn.Softmax, arguments={"dim": 1})()
        Softmax(dim=1)
    """

    kind: Any
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, **more: Any) -> Any:
        """Return a new observer."""
        return self.kind(**self.arguments, **more)

    def named(self) -> dict[str, Any]:
        """Return what a recipe would hold.

        Raises:
            FileError: the class, or an argument, has no name that a file can hold.
        """
        kind = self.kind
        if "<" in kind.__qualname__:
            raise FileError(
                f"save: the observer {kind.__qualname__} is defined inside a function, where no file can name it; define the class at "
                "the top of a module"
            )
        told = {key: _plain(value, kind, key) for key, value in self.arguments.items()}
        return {"import": f"{kind.__module__}:{kind.__qualname__}"} | ({"arguments": told} if told else {})


def checked(given: Any) -> OwnObserver | type:
    """Return a user's observer in the form that `Quantize` keeps: its class, with arguments where it has some.

    Raises:
        ConfigError: it is none, or cannot choose one range for a whole activation.
    """
    found = given.found() if isinstance(given, ImportedObserver) else given
    if not isinstance(found, OwnObserver):
        kind, arguments = opened(found)
        found = OwnObserver(kind=kind, arguments=arguments)
    if not is_observer(found.kind):
        instead = "; give its class, since every activation gets an observer of its own" if is_observer(type(given)) else ""
        raise ConfigError(f"{WHERE}: got {given!r}; {NEEDED}{instead}")
    if not found.arguments:
        _try(found.kind)
        return found.kind  # type: ignore[no-any-return]
    _tried(found)
    return found


def refuse_unknown(rule: Any) -> None:
    """Refuse the rule of a saved model whose observer's module was not imported: reading a file imports nothing.

    Raises:
        StateError: it was not.
    """
    told = (rule.get("quantize") or {}).get("observer") if isinstance(rule, Mapping) else None
    module = str(told.get("import", "")).partition(":")[0] if isinstance(told, Mapping) else None
    if module is not None and module not in sys.modules:
        raise StateError(f"load: the file names the observer {told['import']}; import its module {module} before")  # type: ignore[index]


class Wrapped(Observer):
    """One of a user's observers, behind the interface of torchopt's.

    Args:
        own: the class.
        quant_min: the smallest integer of the grid that the range is for.
        quant_max: the largest.
    """

    whole = True  # sees each batch at once, and as it is

    def __init__(self, own: OwnObserver, quant_min: int, quant_max: int) -> None:
        super().__init__()
        self.own, self.quant_min, self.quant_max = own, quant_min, quant_max
        self.seen = self.spoiled = False
        self.inner = self._new()

    def _new(self) -> Any:
        """A new one; where it is made for fewer or more integers than the grid has, one for the grid's, if it takes them."""
        kind, arguments = self.own.kind, self.own.arguments
        with in_users_code(f"{WHERE}: {kind.__name__}", ConfigError, kind):
            made = kind(**arguments)
        ends = integers(made)
        if ends is not None and ends[1] - ends[0] != self.quant_max - self.quant_min:
            grid = for_integers(arguments, self.quant_min, self.quant_max)
            with contextlib.suppress(TypeError):
                made = self.own(**grid)
        return made

    def observe(self, x: torch.Tensor) -> None:
        """Show it a batch; one with NaN or infinity it does not see, and the range is NaN from then on."""
        self.spoiled = self.spoiled or not bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())
        if not self.spoiled:
            self.seen = True
            with in_users_code(f"{WHERE}: {self.own.kind.__name__}"):
                self.inner(x)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values that its smallest and its largest integer stand for.

        Raises:
            ConfigError: it gives anything but one scale and one zero point.
        """
        if self.spoiled or not self.seen:
            return torch.tensor(torch.nan, dtype=torch.float32), torch.tensor(torch.nan, dtype=torch.float32)
        name = self.own.kind.__name__
        with in_users_code(f"{WHERE}: {name}"):
            given = self.inner.calculate_qparams()
        ends = integers(self.inner)
        if ends is None:
            raise ConfigError(
                f"{WHERE}: {name} does not say which integers it is for; attributes quant_min and quant_max are needed"
            )
        if not (isinstance(given, tuple | list) and len(given) == 2):
            raise ConfigError(f"{WHERE}: {name} gave {given!r:.80}; calculate_qparams must return (scale, zero_point)")
        scale, zero_point = (torch.as_tensor(value).detach().double().cpu() for value in given)
        if scale.numel() != 1 or zero_point.numel() != 1:
            raise ConfigError(
                f"{WHERE}: {name} gives {scale.numel()} scales, and an activation has one for all channels; an observer per tensor is "
                "needed, such as torch.ao.quantization.MinMaxObserver (weights have one a channel by per_channel=True)"
            )
        if not float(scale) > 0:
            raise ConfigError(f"{WHERE}: {name} gave the scale {float(scale)}; a number above 0 is needed")
        low, high = ((end - zero_point.reshape(())) * scale.reshape(()) for end in ends)
        return low.float(), high.float()

    def reset(self) -> None:
        """Forget all batches: a new one takes its place, since the interface has no word for it."""
        device = next((t.device for t in (*self.inner.buffers(), *self.inner.parameters())), None)
        self.seen = self.spoiled = False
        self.inner = self._new().to(device)

    def get_extra_state(self) -> dict[str, bool]:
        """What the observer's own state does not tell."""
        return {"seen": self.seen, "spoiled": self.spoiled}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Take what a file holds."""
        self.seen, self.spoiled = state["seen"], state["spoiled"]


def _tried(own: OwnObserver) -> None:
    """Show an observer some numbers, so that what it lacks is said where it is given, and not after hours."""
    tried = Wrapped(own, 0, 255)
    tried.observe(torch.linspace(-1, 3, 96, dtype=torch.float32).reshape(TRIED))
    tried.range()


@functools.lru_cache(maxsize=64)
def _try(kind: type) -> None:
    _tried(OwnObserver(kind=kind))


def _of_torch(value: Any) -> Any:
    """The type or scheme that "torch.qint8" names; all else as it is."""
    named = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) and value.startswith("torch.") else None
    return named if isinstance(named, torch.dtype | torch.qscheme) else value


def _plain(value: Any, kind: type, key: str) -> Any:
    if isinstance(value, torch.dtype | torch.qscheme):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise FileError(
        f"save: the observer {kind.__name__} has {key}={value!r:.60}, which a file cannot hold; numbers, text and torch's types are "
        "needed, or a class that sets it"
    )


__all__ = ["ImportedObserver", "OwnObserver", "Wrapped", "checked", "refuse_unknown"]
