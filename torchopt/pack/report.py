"""What packing did: a row for each tensor that got smaller, and which weights stay dense, and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One row of a `PackReport`: a tensor, its codec, and bytes before, after, and at the entropy bound."""

    name: str
    codec: str
    dense_bytes: int
    packed_bytes: int
    entropy_bytes: int


@dataclass(frozen=True, kw_only=True)
class LeftDense:
    """A tensor that stays as it is: its name, its bytes, and the reason."""

    name: str
    dense_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What packing did to each tensor that it looked at.

    Attributes:
        rows: the tensors that got smaller.
        left: the larger ones that did not.
        inlined: operators that ONNX Runtime writes out as functions, earlier in a packed file: outputs may differ in the last bit.
    """

    rows: list[PackedTensor] = field(default_factory=list)
    left: list[LeftDense] = field(default_factory=list)
    inlined: tuple[str, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the packed tensors before."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        """Bytes of them after, tables and positions included."""
        return sum(row.packed_bytes for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{r.name:<40} {r.codec:<16} {r.dense_bytes:>12,} → {r.packed_bytes:>10,}" for r in self.rows]
        lines.append(f"{'total':<57} {self.dense_bytes:>12,} → {self.packed_bytes:>10,}")
        for reason in dict.fromkeys(entry.reason for entry in self.left):
            sizes = [entry.dense_bytes for entry in self.left if entry.reason == reason]
            lines.append(f"left dense: {len(sizes)} of {sum(sizes):,} bytes: {reason}")
        if self.inlined:
            names = ", ".join(self.inlined)
            lines.append(
                f"{names}: ONNX Runtime writes it out as a function, earlier in a packed file: outputs may differ in the last bit"
            )
        return "\n".join(lines)
