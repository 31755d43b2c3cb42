"""Protocol buffers byte by byte: large tensors taken out of a message, and put back in, without ever holding them.

A message is a row of fields: a varint (8 · number + kind of value), then the value; a message within a message is its length and its
bytes (protobuf.dev, "Encoding"). protobuf's own parser copies every tensor into memory, and its serializer again. So `without_data`
writes the message anew with each large `raw_data` replaced by the place where it lies, in the form that ONNX has for data in other
files, and `with_data` is the inverse. Both look only into parts that can hold what they look for.

What protobuf's parser does with odd messages is done here too: of a field that stands twice the last one counts, messages that stand
twice are merged (those are copied as they are), unknown fields and groups are skipped and kept, and a number of the wrong kind is
an unknown field.
"""

from __future__ import annotations

import mmap
import secrets
from collections.abc import Iterator

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

HERE = f"\x00torchopt{secrets.token_hex(8)}"  # the location of data in the message itself, which no file can know; the offset says where
LARGE = 1024  # bytes; below, a tensor is no trouble
DEEPEST = 100  # messages within messages, as protobuf has it
VARINT, EIGHT_BYTES, BYTES, GROUP, GROUP_END, FOUR_BYTES = range(6)  # kinds of values
MODEL, TENSOR = ModelProto.DESCRIPTOR.full_name, TensorProto.DESCRIPTOR.full_name
_HOLDERS = (ModelProto, GraphProto, NodeProto, AttributeProto, FunctionProto)
_KNOWN = {holder.DESCRIPTOR.full_name for holder in (*_HOLDERS, TensorProto)}
INNER: dict[str, dict[int, str]] = {  # message → number of a field → message, for those that lead to tensors
    holder.DESCRIPTOR.full_name: {
        f.number: f.message_type.full_name
        for f in holder.DESCRIPTOR.fields
        if f.message_type and f.message_type.full_name in _KNOWN
    }
    for holder in _HOLDERS
}
ONCE: dict[str, set[int]] = {  # message → those of them that stand there once; protobuf merges two
    holder.DESCRIPTOR.full_name: {f.number for f in holder.DESCRIPTOR.fields if not hasattr(getattr(holder(), f.name), "append")}
    for holder in _HOLDERS
}
RAW_DATA, ELSEWHERE, LOCATION = (
    TensorProto.DESCRIPTOR.fields_by_name[name].number for name in ("raw_data", "external_data", "data_location")
)
Buffer = bytes | mmap.mmap


def without_data(data: Buffer) -> bytes:
    """Return the message of a model with every large `raw_data` replaced by its offset and length in `data`, under the location `HERE`.

    Raises:
        ValueError: `data` is no whole message.
    """
    return b"".join(_outlined(data, 0, len(data), MODEL, 0))


def with_data(message: bytes) -> tuple[list[bytes | int], int]:
    """Return (the pieces of a model's message in which tensors have the location `HERE`, how many bytes they are).

    A piece is bytes, or the number (the offset) of such a tensor, whose own bytes belong there.
    """
    return _filled(message, 0, len(message), MODEL)


def fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (number, kind, start of the field, start of its value, end) of each field of a message.

    Raises:
        ValueError: the fields do not fill the message exactly.
    """
    while start < end:
        number, kind, at, stop = _field(data, start, end)
        open_groups = [number] if kind == GROUP else []
        while open_groups:
            inner, inner_kind, _, stop = _field(data, stop, end)
            if inner_kind == GROUP:
                open_groups.append(inner)
            elif inner_kind == GROUP_END and open_groups.pop() != inner:
                raise ValueError(f"a group begins and another ends at byte {stop}")
        if kind == GROUP_END:
            raise ValueError(f"a group ends at byte {start}, and none begins")
        yield number, kind, start, at, stop
        start = stop


def _field(data: Buffer, start: int, end: int) -> tuple[int, int, int, int]:
    """(number, kind, start of the value, end) of the field that starts at a byte; of a group, the end of its first tag."""
    tag, at = _varint(data, start, end)
    number, kind = tag >> 3, tag & 7
    stop = at
    if kind == VARINT:
        _, stop = _varint(data, at, end)
    elif kind == BYTES:
        length, at = _varint(data, at, end)
        stop = at + length
    elif kind in (EIGHT_BYTES, FOUR_BYTES):
        stop = at + (8 if kind == EIGHT_BYTES else 4)
    elif kind not in (GROUP, GROUP_END):
        raise ValueError(f"a field of kind {kind} at byte {start}")
    if stop > end or number == 0:
        raise ValueError(f"it ends at byte {end} within a field, or is damaged before")
    return number, kind, at, stop


def head(number: int, length: int) -> bytes:
    """Return what stands before `length` bytes of a field."""
    return _as_varint(number << 3 | BYTES) + _as_varint(length)


def _outlined(data: Buffer, start: int, end: int, message: str, depth: int) -> Iterator[bytes]:
    if depth > DEEPEST:
        raise ValueError(f"messages lie in messages more than {DEEPEST} deep")
    if message == TENSOR:
        yield _tensor_outlined(data, start, end)
        return
    found = list(fields(data, start, end))
    inner, copied = INNER[message], start
    once = [number for number, kind, *_ in found if kind == BYTES and number in inner and number in ONCE[message]]
    merged = {number for number in once if once.count(number) > 1}
    for number, kind, first, at, stop in found:
        if kind == BYTES and stop - at > LARGE and number in inner and number not in merged:
            part = b"".join(_outlined(data, at, stop, inner[number], depth + 1))
            yield data[copied:first]
            yield head(number, len(part)) + part
            copied = stop
    yield data[copied:end]


def _tensor_outlined(data: Buffer, start: int, end: int) -> bytes:
    """A tensor's message without its large `raw_data`; as everyone reads it, also where it says two things about where its data lie."""
    found = list(fields(data, start, end))
    raw = [(at, stop) for number, kind, _, at, stop in found if number == RAW_DATA and kind == BYTES]
    if not raw or max(stop - at for at, stop in raw) <= LARGE:
        return data[start:end]
    locations = [_varint(data, at, stop)[0] for number, kind, _, at, stop in found if number == LOCATION and kind == VARINT]
    external = locations[-1:] == [TensorProto.EXTERNAL]  # then no one looks at `raw_data`
    dropped = {RAW_DATA} if external else {RAW_DATA, ELSEWHERE, LOCATION}
    kept = b"".join(data[first:stop] for number, _, first, _, stop in found if number not in dropped)
    return kept if external else kept + _elsewhere(raw[-1][0], raw[-1][1] - raw[-1][0])


def _elsewhere(offset: int, length: int) -> bytes:
    """The fields of a tensor whose data lie elsewhere."""
    tensor = TensorProto(data_location=TensorProto.EXTERNAL)
    for key, value in (("location", HERE), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor.SerializeToString()


def _filled(data: bytes, start: int, end: int, message: str) -> tuple[list[bytes | int], int]:
    """The pieces of a part of the message, and how many bytes they are in the end."""
    if message == TENSOR:
        return _tensor(TensorProto.FromString(data[start:end]))
    pieces: list[bytes | int] = []
    total, copied, inner, sought = 0, start, INNER[message], HERE.encode()
    for number, kind, first, at, stop in fields(data, start, end):
        if kind == BYTES and number in inner and data.find(sought, at, stop) >= 0:
            parts, length = _filled(data, at, stop, inner[number])
            before = data[copied:first] + head(number, length)
            pieces += [before, *parts]
            total, copied = total + len(before) + length, stop
    return [*pieces, data[copied:end]], total + end - copied


def _tensor(tensor: TensorProto) -> tuple[list[bytes | int], int]:
    where = {entry.key: entry.value for entry in tensor.external_data}
    if where.get("location") != HERE:
        whole = tensor.SerializeToString()
        return [whole], len(whole)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    length = int(where["length"])
    before = tensor.SerializeToString() + head(RAW_DATA, length)
    return [before, int(where["offset"])], len(before) + length


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """(the number that starts at a byte, where the next field starts)."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"it ends at byte {end} within a number, or is damaged before")


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
