"""Which tensors lie in one stream: those whose codes are alike, where one call for all of them takes less than a call each.

A tensor of few values has a table of its own, and its codes number the values by falling frequency, zero first; 8-bit integers of many
values share one table, 0, −1, 1, −2, 2 …, so that a tensor of a thousand weights needs none. Codes of one width, and of many zeros or
few, go end to end. Their stream is the smallest that may be: of plain bits as for a tensor by itself, or in Huffman codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from torchopt.codecs import CALL_BYTES, Encoding, encode
from torchopt.codecs.bits import histogram, translated, width
from torchopt.codecs.encode import distinct
from torchopt.codecs.joined import Joined, join
from torchopt.onnx_file.view import Constant
from torchopt.pack.choose import SMALL, bytes_apart, values_of
from torchopt.pack.decoders import decodable
from torchopt.pack.huffman_decoder import OLDEST
from torchopt.pack.joined_calls import function_bytes_of

OWN = 32  # values of a tensor up to which it has a table of its own
CUT_BYTES, TABLE_BYTES = 62, 16  # what a call that cuts, and a table of its own, take beside what is in them
SPARSE = 0.4  # zeros from which on a tensor goes with the sparse ones
STREAM_AT_MOST = 1 << 22  # bits in Huffman codes of one file: decoding takes some 90 bytes of memory for each
ZIGZAG = np.array([(-1) ** i * ((i + 1) // 2) for i in range(256)], np.int16).astype(np.int8)  # 0, −1, 1, −2, 2 … 127, −128


@dataclass(frozen=True, kw_only=True)
class Member:
    """A tensor in a group: its name, where its codes start, and its table."""

    name: str
    start: int
    table: np.ndarray = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors whose codes lie in one stream."""

    members: list[Member]
    form: Joined | Encoding
    count: int

    def bytes_of(self, member: Member, size: int) -> int:
        """A member's share of the stream, and its table."""
        return round(self.form.payload_bytes * size / self.count) + member.table.nbytes


def groups(weights: dict[str, Constant], graph: ir.Graph, opset: int, *, smallest: bool) -> Iterator[Group]:
    """Yield the groups that take less together.

    Args:
        weights: those that may be packed.
        graph: the main one; only what stands there lies together.
        opset: that decoders are written in.
        smallest: take in large tensors too, and Huffman codes.
    """
    kinds: dict[tuple[int, bool], list[str]] = {}
    for name, constant in weights.items():
        value = values_of(constant)
        if constant.scope.body is graph and (smallest or value.nbytes < SMALL) and (kind := _kind(value)) is not None:
            kinds.setdefault(kind, []).append(name)
    left, tried = STREAM_AT_MOST, list[tuple[int, dict[str, int], Group]]()
    for kind, names in sorted(kinds.items()):
        if len(names) < 2 and not smallest:
            continue
        codes, members = _end_to_end(names, weights, shared=kind[0] == 8)
        form = _form(codes, opset, left if smallest and opset >= OLDEST else 0)
        if form is None:
            continue
        tables = {m.table.tobytes(): m.table.nbytes + TABLE_BYTES for m in members}
        size = form.payload_bytes + CALL_BYTES + len(members) * CUT_BYTES + sum(tables.values())
        saved = bytes_apart({name: weights[name] for name in names}, opset) - size
        if saved > 0:
            left -= form.stream_bits if isinstance(form, Joined) else 0
            tried.append((saved, function_bytes_of(form, opset), Group(members=members, form=form, count=len(codes))))
    yield from _worth_their_functions(tried)


def _worth_their_functions(tried: list[tuple[int, dict[str, int], Group]]) -> list[Group]:
    """Those groups that, with the functions that they share, save most: from all of them on, whichever costs more than it saves goes."""

    def saved(kept: list[tuple[int, dict[str, int], Group]]) -> int:
        needed: dict[str, int] = {}
        for _, functions, _ in kept:
            needed |= functions
        return sum(own for own, _, _ in kept) - sum(needed.values())

    kept = tried
    while kept:
        without = [[other for other in kept if other is not one] for one in kept]
        best = max(without, key=saved)
        if saved(best) < saved(kept):
            break
        kept = best
    return [group for _, _, group in kept]


def _kind(value: np.ndarray) -> tuple[int, bool] | None:
    """(width of the codes, 8 for a shared table; whether many are zero), or None of a tensor that lies in no group."""
    if value.dtype.itemsize not in (1, 2, 4, 8) or value.size < 2:
        return None
    found = distinct(np.ascontiguousarray(value).reshape(-1).view(f"u{value.dtype.itemsize}"))
    if found is None or (len(found[0]) > OWN and value.dtype != np.int8):
        return None
    zeros = float(histogram(found[1])[0]) / value.size if found[0][0] == 0 else 0.0
    return 8 if len(found[0]) > OWN else max(2, width(len(found[0]) - 1)), zeros >= SPARSE


def _end_to_end(names: list[str], weights: dict[str, Constant], *, shared: bool) -> tuple[np.ndarray, list[Member]]:
    """The codes of all tensors, and where each one's are."""
    sizes = [math.prod(weights[name].tensor.shape.numpy()) for name in names]  # type: ignore[union-attr]
    codes, start, members = np.empty(sum(sizes), np.uint8), 0, []
    code_of = np.empty(256, np.uint8)
    code_of[ZIGZAG.view(np.uint8)] = np.arange(256)
    for name, size in zip(names, sizes, strict=True):
        value = np.ascontiguousarray(values_of(weights[name])).reshape(-1)
        if shared:
            translated(value.view(np.uint8), code_of, codes[start : start + size])
            table = ZIGZAG
        else:
            table, codes[start : start + size] = _own(value)
        members.append(Member(name=name, start=start, table=table))
        start += size
    if shared:
        used = ZIGZAG[: int(codes.max()) + 1]
        members = [Member(name=m.name, start=m.start, table=used) for m in members]
    return codes, members


def _own(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tensor's values by falling frequency, zero first, and its codes."""
    found = distinct(value.view(f"u{value.dtype.itemsize}"))
    assert found is not None
    counts = histogram(found[1])[: len(found[0])]
    counts[0] = value.size + 1 if found[0][0] == 0 else counts[0]
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(order), np.uint8)
    rank[order] = np.arange(len(order))
    return found[0][order].view(value.dtype), translated(found[1], rank)


def _form(codes: np.ndarray, opset: int, allowed: int) -> Joined | Encoding | None:
    """The smallest form of the codes; Huffman codes up to so many bits."""
    plain = encode(codes, lambda e: decodable(e, opset) and e.values != "channel")
    joined = join(codes) if allowed else None
    if joined is not None and joined.stream_bits <= allowed and (plain is None or joined.payload_bytes < plain.payload_bytes):
        return joined
    return plain
