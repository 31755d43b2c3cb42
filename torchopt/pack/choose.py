"""Which encoding each tensor of a model gets: the smallest; but small tensors share decoders, which take bytes too."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from torchopt.codecs import CALL_BYTES, Encoding, encode, encodings
from torchopt.onnx_file.view import Constant
from torchopt.pack.decoders import decodable, function_bytes, function_name

SMALL = 1 << 18  # bytes of a tensor below which the cost of its decoder counts


def chosen(weights: dict[str, Constant], opset: int) -> Iterator[tuple[str, Encoding]]:
    """Yield the encoding of each weight that gets one.

    A large tensor takes its smallest. The small ones share decoders, which cost bytes too: starting from all kinds, the kind whose
    loss saves most is dropped, until none does.
    """
    given: set[str] = set()
    options: dict[
        str, dict[str, int]
    ] = {}  # bytes of a small tensor by the kind that it would be packed as; one is made in the end
    sizes: dict[str, dict[str, int]] = {}
    for name, value in weights.items():
        dense = values_of(value)
        if dense.nbytes < SMALL:
            options[name] = {}
            for e in (e for e in encodings(dense) if decodable(e, opset)):
                kind = function_name(e, opset)
                options[name][kind] = min(e.payload_bytes, options[name].get(kind, dense.nbytes))
                sizes[kind] = function_bytes(e, opset)
        elif (encoding := encode(dense, lambda e: decodable(e, opset))) is not None:
            given |= {*function_bytes(encoding, opset)}
            yield name, encoding
            del encoding
    kinds = _worth_their_decoders(options, sizes, given, {n: tensor_of(weights[n]).nbytes for n in options})
    for name in options:
        if any(kind in kinds for kind in options[name]):
            encoding = encode(values_of(weights[name]), lambda e: decodable(e, opset) and function_name(e, opset) in kinds)
            assert encoding is not None
            yield name, encoding


def _worth_their_decoders(
    options: dict[str, dict[str, int]], sizes: dict[str, dict[str, int]], given: set[str], dense: dict[str, int]
) -> set[str]:
    """The kinds of encodings with which the small tensors and their decoders take the fewest bytes."""

    def cost(kinds: set[str]) -> int:
        best = {n: min((size for kind, size in found.items() if kind in kinds), default=None) for n, found in options.items()}
        tensors = sum(dense[n] if size is None else size + CALL_BYTES for n, size in best.items())
        needed = {name: size for kind in kinds for name, size in sizes[kind].items() if name not in given}
        return tensors + sum(needed.values())

    kinds = set(sizes)
    while droppable := sorted(kinds - given):
        least, kind = min((cost(kinds - {kind}), kind) for kind in droppable)
        if least >= cost(kinds):
            break
        kinds.remove(kind)
    return kinds


def tensor_of(constant: Constant) -> ir.TensorProtocol:
    """Return the tensor of a constant that is not packed."""
    assert constant.tensor is not None
    return constant.tensor


def values_of(constant: Constant) -> np.ndarray:
    """Return its values."""
    return tensor_of(constant).numpy()
