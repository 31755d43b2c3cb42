"""Export: one torch module in, one small checked ONNX file out.

    torch.onnx.export → passes (tidy, integer weights, global pooling) → packing → onnx.checker → a session of ORT → rename

Everything before this was decided in torch: an ONNX pass only writes the same numbers in another form.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from torch import nn

from torchopt.errors import ConfigError, ModelError, nearest
from torchopt.export.graph import to_onnx
from torchopt.export.pack import PackReport, pack_model
from torchopt.export.passes import GlobalPoolPass, IntegerWeightsPass, TidyPass
from torchopt.files import atomic_path
from torchopt.grid import grids

OPSETS = {"ort-x86": 21, "ort-x86-avx2": 21, "ort-arm": 21, "ort-web": 21}
FOLDS_AT_LOAD = ("ort-x86", "ort-x86-avx2", "ort-arm")  # runtimes that decode packed weights once, not at each inference


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the file.
        target: the runtime it was written for.
        opset: version of the ONNX operator set.
        size_bytes: of the file as it lies on disk.
        dense_size_bytes: of the same file without packing.
        packing: what packing did to each tensor, or None.
        note: why the file is dense, where it is.
    """

    path: Path
    target: str
    opset: int
    size_bytes: int
    dense_size_bytes: int
    packing: PackReport | None
    note: str = ""

    def __str__(self) -> str:
        packed = f", {self.dense_size_bytes:,} before packing" if self.packing else f", dense: {self.note}"
        return f"{self.path}: {self.size_bytes:,} bytes{packed}; opset {self.opset}, for {self.target}"


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    target: str = "ort-x86",
    dynamic_batch: bool = True,
    pack: bool | str = "auto",
) -> ExportResult:
    """Write `model` as an ONNX file that stock ONNX Runtime runs.

    Args:
        model: a plain model, such as `torchopt.finalize` returns.
        example_inputs: the positional arguments of one forward call.
        path: the file to write; the old one stays until the new one is complete and checked.
        target: "ort-x86", "ort-x86-avx2", "ort-arm" or "ort-web".
        dynamic_batch: let the batch dimension vary.
        pack: "auto" packs the weights where the target decodes them once, at load; True or False decide it.

    Raises:
        ConfigError: an unknown target, or another value of `pack`.
        ModelError: the model cannot be exported, or a weight is not finite.
        FileError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> export(nn.Linear(3, 2), (torch.zeros(1, 3),), folder / "m.onnx").opset
        21
    """
    _check(target, pack)
    opset = OPSETS[target]
    graph = to_onnx(model, example_inputs, opset=opset, dynamic_batch=dynamic_batch)
    found = grids(model)
    keep = frozenset(name for name, _ in model.named_parameters())
    for step in (TidyPass(keep), GlobalPoolPass(), IntegerWeightsPass(found), TidyPass(keep)):
        step(graph)
    dense = len(ir.to_proto(graph).SerializeToString())
    wanted = target in FOLDS_AT_LOAD if pack == "auto" else pack
    report = pack_model(graph) if wanted else None
    size = write_checked(graph, path)
    note = "" if wanted else f"{target} would decode packed weights at each inference" if pack == "auto" else "pack=False"
    return ExportResult(
        path=Path(path), target=target, opset=opset, size_bytes=size, dense_size_bytes=dense, packing=report, note=note
    )


def write_checked(graph: ir.Model, path: str | os.PathLike[str]) -> int:
    """Check the graph, let ONNX Runtime load it, write it atomically, and return its size in bytes.

    Raises:
        ModelError: the checker or the runtime refuses it.
        FileError: the file cannot be written.
    """
    data = ir.to_proto(graph).SerializeToString()
    try:
        onnx.checker.check_model(data)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no class
        raise ModelError(f"export: the graph is refused by the checker or by ONNX Runtime: {str(error)[:300]}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def _check(target: str, pack: bool | str) -> None:
    if target not in OPSETS:
        raise ConfigError(
            f"export: target={target!r} is unknown; one of {', '.join(OPSETS)} is needed{nearest(str(target), OPSETS)}"
        )
    if pack not in ("auto", True, False):
        raise ConfigError(f"export: pack={pack!r}; 'auto', True or False is needed")
