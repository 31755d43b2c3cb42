"""What an export says of the file that it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchopt.pack.report import PackReport


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the file.
        target: the runtime it was written for.
        opset: version of the ONNX operator set.
        size_bytes: of the file as it lies on disk.
        dense_size_bytes: of the same file without packing.
        passes: the graph passes that changed something, in order.
        packing: what packing did to each tensor, or None.
        note: why the file is dense, where it is.
    """

    path: Path
    target: str
    opset: int
    size_bytes: int
    dense_size_bytes: int
    passes: tuple[str, ...]
    packing: PackReport | None
    note: str = ""

    def __str__(self) -> str:
        packed = f", {self.dense_size_bytes:,} before packing" if self.packing else f", dense: {self.note}"
        return f"{self.path}: {self.size_bytes:,} bytes{packed}; opset {self.opset}, for {self.target}"
