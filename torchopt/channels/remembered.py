"""Whole numbers that a network's own code remembers: widths, numbers of heads, sizes of a split, a configuration's fields.

    self.num_heads, self.h, self.c, self.split = (32, 32), self.config.hidden_size

Forward code reads them under any name. They are found by value: a number that says how long an axis of the weights was, or how many
channels a group had, in the smallest module around it where one was so long. What it should say now is what became of those axes. A
number that several axes explain, which became different lengths, cannot be told from the weights; whether forward needs it changed
is decided by the proof (`check.py`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from torchopt.channels.groups import LAYERS, Group, out_dim
from torchopt.channels.layers.attention import HeadAttention

SIZED = (nn.Transformer, nn.Unflatten)  # of torch, and yet with sizes that no weight of their own tells
GEOMETRY = {
    "dilation", "groups", "in_channels", "in_features", "kernel_size", "num_embeddings", "num_features", "num_layers", "out_channels",
    "out_features", "output_padding", "padding", "padding_idx", "stride", "_reversed_padding_repeated_twice", "embedding_dim",
    "normalized_shape", "num_channels", "num_groups", "num_parameters", "input_size", "hidden_size", "proj_size",
}  # fmt: skip
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU, nn.EmbeddingBag)
WORDS = {
    "c", "ch", "chan", "channel", "channels", "chs", "dim", "dims", "embed", "feat", "features", "feats", "filters", "head", "heads",
    "hidden",
    "groups", "inner", "intermediate", "nf", "nhead", "nheads", "nx", "planes", "units", "width", "widths", "model", "ffn",
}  # fmt: skip
OTHER_WORDS = {
    "kernel",
    "patch",
    "image",
    "img",
    "window",
    "seq",
    "length",
    "vocab",
    "classes",
    "batch",
    "layers",
    "position",
    "epoch",
}
MOST = 16  # a tuple or list with more entries is no list of sizes
Path = tuple[str | int, ...]  # attribute, and what follows in a sequence, a mapping or an object
Lengths = Mapping[int, set[int]]  # an old length → what axes of it have become


@dataclass(frozen=True, kw_only=True)
class Number:
    """A whole number that some module remembers.

    Attributes:
        module: the module's dotted path.
        path: where it stands: attribute, and index, key or attribute of what that holds.
        owner: class of the module, or of the object that holds it.
        value: the number.
    """

    module: str
    path: Path
    owner: str
    value: int

    @property
    def kind(self) -> tuple[object, ...]:
        """Numbers of one kind mean the same in each instance of their class."""
        return self.owner, *self.path

    @property
    def name(self) -> str:
        """As Python code would write it, from the model."""
        places = [f"[{p!r}]" if isinstance(p, int) else f".{p}" for p in self.path]
        return f"{self.module}{''.join(places)}".lstrip(".")

    @property
    def words(self) -> set[str]:
        """The words of its name."""
        return {word for part in self.path if isinstance(part, str) for word in re.split(r"[_\d]+", part.lower())}

    @property
    def telling(self) -> bool:
        """True where the name says that it is about channels, whether forward reads it or not."""
        return bool(self.words & WORDS) and not self.words & OTHER_WORDS

    @property
    def near(self) -> bool:
        """True for a module's own number that may be about its channels: in a configuration, many have the same value by chance."""
        return not any(isinstance(part, str) for part in self.path[1:]) and not self.words & OTHER_WORDS


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What a remembered number should say now.

    Attributes:
        number: as it is.
        options: what axes of that length have become, without the length itself.
        sure: all of them became one other length.
    """

    number: Number
    options: tuple[int, ...]
    sure: bool


def numbers(model: nn.Module) -> Iterator[Number]:
    """List the whole numbers that the modules of `model` remember; those of torch's own layers are kept by their pruners.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.heads, self.sizes, self.layer = 4, (8, 8), nn.Linear(16, 16)
        >>> [(n.name, n.value) for n in numbers(Block())]
        [('heads', 4), ('sizes[0]', 8), ('sizes[1]', 8)]
    """
    known: set[int] = set()
    for name, module in model.named_modules():
        own = type(module).__module__.startswith(("torch.nn.", "torch.ao."))
        if isinstance(module, HeadAttention | nn.MultiheadAttention) or (own and not isinstance(module, SIZED)):
            continue
        for attribute, value in vars(module).items():
            if not (isinstance(module, LAYERS + NORMS) and attribute in GEOMETRY):
                for path, number, owner in _in(value, (attribute,), type(module).__name__, known):
                    yield Number(module=name, path=path, owner=owner, value=number)


def _in(value: Any, path: Path, owner: str, known: set[int]) -> Iterator[tuple[Path, int, str]]:
    """Numbers in an attribute: itself, in a short sequence, or one level down in a mapping or a plain object."""
    if type(value) is int:
        yield path, value, owner
    elif isinstance(value, list | tuple) and len(value) <= MOST and all(type(v) is int for v in value):
        yield from (((*path, i), v, owner) for i, v in enumerate(value))
    elif len(path) == 1 and not isinstance(value, nn.Module | torch.Tensor | type) and id(value) not in known:
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        plain = isinstance(fields, dict) and not path[0].startswith("_") and not callable(value)  # type: ignore[union-attr]
        if plain and not type(value).__module__.startswith("torch."):
            known.add(id(value))
            for key, part in fields.items():  # type: ignore[union-attr]
                if isinstance(key, str) and not key.startswith("_"):
                    yield from _in(part, (*path, key), owner if isinstance(value, dict) else type(value).__name__, known)


def put(model: nn.Module, module: str, path: Sequence[str | int], value: int) -> bool:
    """Let a remembered number say something else, in place; return False where there is no such number."""
    holder: Any = model.get_submodule(module)
    *way, last = path
    trail: list[tuple[Any, str | int]] = []
    for part in way:
        trail.append((holder, part))
        holder = _get(holder, part)
    if type(_get(holder, last)) is not int:
        return False
    while isinstance(holder, tuple) and isinstance(last, int):
        value = (*holder[:last], value, *holder[last + 1 :])  # type: ignore[assignment]
        holder, last = trail.pop()
    if isinstance(holder, list | dict):
        holder[last] = value  # type: ignore[index, call-overload]
    else:
        setattr(holder, str(last), value)
    return True


def _get(holder: Any, part: str | int) -> Any:
    if isinstance(holder, dict):
        return holder.get(part)
    if isinstance(part, int):
        return holder[part] if isinstance(holder, list | tuple) and part < len(holder) else None
    return getattr(holder, part, None)


def renewals(whole: nn.Module, small: nn.Module, groups: Sequence[Group], gone: Sequence[np.ndarray]) -> list[Renewal]:
    """Return the remembered numbers that axes of the weights explain, where any of these axes became shorter."""
    around = _lengths(whole, small, groups, gone)
    found = []
    for number in numbers(whole):
        became = _explained(around, number)
        options = tuple(sorted(became - {number.value}))
        if options:
            found.append(Renewal(number=number, options=options, sure=len(became) == 1))
    return found


def _explained(around: Mapping[str, Lengths], number: Number) -> set[int]:
    """What became of the axes as long as the number, in the smallest module around it that has any."""
    configured = len(number.path) > 1 and not isinstance(number.path[1], int)  # it speaks of the whole network
    side = "in:" if "in" in number.words else "out:" if "out" in number.words else ""
    place = "" if configured else number.module
    while True:
        for prefix in dict.fromkeys((side, "")):
            if became := around.get(prefix + place, {}).get(number.value):
                return became
        if not place:
            return set()
        place = place.rpartition(".")[0]


def _lengths(whole: nn.Module, small: nn.Module, groups: Sequence[Group], gone: Sequence[np.ndarray]) -> Mapping[str, Lengths]:
    """For each module, what became of the lengths of all axes in it and below it; after "in:" and "out:", of those of that side."""
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))

    def note(owner: str, old: int, new: int, side: str = "") -> None:
        parts = owner.split(".") if owner else []
        for end in range(len(parts) + 1):
            for prefix in dict.fromkeys(("", side)):
                found[prefix + ".".join(parts[:end])][old].add(new)

    modules = dict(whole.named_modules())
    after = dict([*small.named_parameters(), *small.named_buffers()])
    for name, tensor in [*whole.named_parameters(), *whole.named_buffers()]:
        owner = name.rpartition(".")[0]
        layer = isinstance(modules[owner], LAYERS) and tensor.dim() > 1
        for dim, (old, new) in enumerate(zip(tensor.shape, after[name].shape, strict=True)):
            if old > 1:
                note(owner, old, new, ("out:" if dim == out_dim(modules[owner]) else "in:") if layer else "")
    for group, chosen in zip(groups, gone, strict=True):
        left = int((~chosen).sum())
        for owner in {name.rpartition(".")[0] for name, _ in group.axes}:
            note(owner, len(group) * group.unit, left * group.unit)
            if group.unit > 1:
                note(owner, len(group), left)
                note(owner, group.unit, group.unit)
    return found
