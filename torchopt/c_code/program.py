"""A network as a list of steps, each of which is one call of a C function: what lies between the ONNX graph and the text.

A `Value` is a tensor that a step writes. Values of three and more dimensions that convolutions and pools read lie with their channels
last, which is how their products run through memory; all others lie as ONNX says. Two values may share one storage (a reshape moves
nothing): then they have the same `root`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SUFFIX = {"uint8": "u8", "int8": "s8", "float32": "f32", "int32": "s32"}
C_TYPE = {"uint8": "uint8_t", "int8": "int8_t", "float32": "float", "int32": "int32_t"}
KEYWORDS = {
    "auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern", "float", "for", "goto",
    "if", "inline", "int", "long", "main", "register", "restrict", "return", "short", "signed", "sizeof", "static", "struct", "switch",
    "typedef", "union", "unsigned", "void", "volatile", "while",
}  # fmt: skip


@dataclass(kw_only=True, eq=False)
class Value:
    """A tensor.

    Attributes:
        name: in the ONNX graph.
        shape: as ONNX says it, whatever the layout.
        dtype: numpy's name of it.
        channels_last: the dimension 1 lies last in memory.
        root: the value whose storage it shares; itself where it has its own.
        outside: the name of the parameter that the caller hands in; None inside the arena.
        constant: its elements, where they are known; then it lies in flash.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = False
    root: Value = None  # type: ignore[assignment]
    outside: str | None = None
    constant: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.root is None:
            self.root = self

    @property
    def in_arena(self) -> bool:
        """Whether it takes memory of the network's own."""
        return self.root.outside is None and self.root.constant is None

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.count * np.dtype(self.dtype).itemsize

    @property
    def pixels(self) -> int:
        """How many positions one channel has."""
        return math.prod(self.shape[2:])

    @property
    def layouts_agree(self) -> bool:
        """Whether both layouts are the same in memory."""
        return len(self.shape) < 3 or self.shape[1] == 1 or self.pixels == 1

    def in_memory(self, array: np.ndarray) -> np.ndarray:
        """Return an array of this value's shape in the order in which its elements lie."""
        return np.moveaxis(array, 1, -1) if self.channels_last else array

    def alias(self, name: str, shape: tuple[int, ...], *, channels_last: bool = False) -> Value:
        """Return the same storage under another name and shape."""
        return Value(name=name, shape=shape, dtype=self.dtype, channels_last=channels_last, root=self.root)


@dataclass(kw_only=True, eq=False)
class Step:
    """One call of a C function.

    Attributes:
        function: the template's name; the type of the elements is added to it.
        dtype: that type.
        what: operator and name in the ONNX graph, for people.
        inputs: what it reads.
        output: what it writes.
        fields: of its constant structure; arrays become constants of their own.
        scratch: bytes of working memory.
        overlap: by how many bytes the output must lie before an input, by its number, where both share memory.
    """

    function: str
    dtype: str
    what: str
    inputs: list[Value]
    output: Value
    fields: dict[str, Any]
    scratch: int = 0
    overlap: dict[int, int] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Program:
    """A whole network: its steps, and what the caller hands in and gets back."""

    inputs: list[Value]
    outputs: list[Value]
    steps: list[Step]


def identifier(text: str) -> str:
    """Return a name that C takes, like the given one.

    Example:
        >>> identifier("input.1"), identifier("3d"), identifier("int")
        ('input_1', '_3d', 'int_')
    """
    made = re.sub(r"\W", "_", text, flags=re.ASCII) or "_"
    made = "_" + made if made[0].isdigit() else made
    return made + "_" if made in KEYWORDS else made
