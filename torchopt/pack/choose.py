"""Which encoding each tensor of a model gets: the smallest; but small tensors share decoders, which take bytes too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from torchopt.codecs import CALL_BYTES, Encoding, encode, encodings
from torchopt.onnx_file.view import Constant
from torchopt.pack.decoders import decodable, function_bytes, function_name

SMALL = 1 << 18  # bytes of a tensor below which the cost of its decoder counts


@dataclass
class _Options:
    """Bytes of small tensors by the kind that they would be packed as, and of the kinds' functions."""

    dense: dict[str, int] = field(default_factory=dict)
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, name: str, value: np.ndarray, opset: int) -> None:
        """Take in a tensor; its encodings are not kept."""
        self.dense[name], self.found[name] = value.nbytes, {}
        for e in (e for e in encodings(value) if decodable(e, opset)):
            kind = function_name(e, opset)
            self.found[name][kind] = min(e.payload_bytes, self.found[name].get(kind, value.nbytes))
            self.sizes[kind] = function_bytes(e, opset)

    def worth(self, given: set[str]) -> tuple[set[str], int]:
        """(the kinds with which the tensors and their decoders take the fewest bytes, those bytes); some functions are there anyway."""

        def cost(kinds: set[str]) -> int:
            best = {
                n: min((size for kind, size in found.items() if kind in kinds), default=None) for n, found in self.found.items()
            }
            tensors = sum(self.dense[n] if size is None else size + CALL_BYTES for n, size in best.items())
            needed = {name: size for kind in kinds for name, size in self.sizes[kind].items() if name not in given}
            return tensors + sum(needed.values())

        fewer, more = set(self.sizes), set[str]()
        while droppable := sorted(fewer - given):
            least, kind = min((cost(fewer - {kind}), kind) for kind in droppable)
            if least >= cost(fewer):
                break
            fewer.remove(kind)
        while left := sorted(set(self.sizes) - more):
            least, kind = min((cost(more | {kind}), kind) for kind in left)
            if least >= cost(more):
                break
            more.add(kind)
        return min(((kinds, cost(kinds)) for kinds in (fewer, more)), key=lambda found: found[1])


def chosen(weights: dict[str, Constant], opset: int) -> Iterator[tuple[str, Encoding]]:
    """Yield the encoding of each weight that gets one.

    A large tensor takes its smallest. The small ones share decoders, which cost bytes too: starting from all kinds, the kind whose
    loss saves most is dropped, until none does; and starting from none, the kind that saves most is added. The better way counts.
    """
    given, options = set[str](), _Options()
    for name, value in weights.items():
        dense = values_of(value)
        if dense.nbytes < SMALL:
            options.add(name, dense, opset)
        elif (encoding := encode(dense, lambda e: decodable(e, opset))) is not None:
            given |= {*function_bytes(encoding, opset)}
            yield name, encoding
            del encoding
    kinds, _ = options.worth(given)
    for name, found in options.found.items():
        if any(kind in kinds for kind in found):
            encoding = encode(values_of(weights[name]), lambda e: decodable(e, opset) and function_name(e, opset) in kinds)
            assert encoding is not None
            yield name, encoding


def bytes_apart(weights: dict[str, Constant], opset: int) -> int:
    """Return the bytes of tensors that are packed by themselves, calls and functions included."""
    options = _Options()
    for name, value in weights.items():
        options.add(name, values_of(value), opset)
    return options.worth(set())[1]


def tensor_of(constant: Constant) -> ir.TensorProtocol:
    """Return the tensor of a constant that is not packed."""
    assert constant.tensor is not None
    return constant.tensor


def values_of(constant: Constant) -> np.ndarray:
    """Return its values."""
    return tensor_of(constant).numpy()
