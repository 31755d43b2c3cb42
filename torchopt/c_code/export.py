"""Export to C: the ONNX file that `export` would write, without padded channels and unpacked, as one header and one C99 file.

    torch.onnx.export → passes → ONNX Runtime's own integer graph → steps → arena → text

Nothing is written before all of it is known: both files get their names at the end.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from torch import nn

from torchopt.c_code.emit import Text, written
from torchopt.c_code.finished import Finished, finished
from torchopt.c_code.lower import Lowering
from torchopt.c_code.operators import OPERATORS
from torchopt.c_code.program import KEYWORDS, Program
from torchopt.errors import ConfigError, FileError, ModelError, TargetError
from torchopt.export.result import ExportResult
from torchopt.io.files import check_place, write_text

CODE = 4096  # bytes of machine code at most: the networks of `scripts/bench device` take 1.4 to 2.7 kB on Cortex-M4


@dataclass(frozen=True, kw_only=True)
class CExport(ExportResult):
    """What was written: `path` is the .c file, `size_bytes` the length of its text; the header has its name with .h.

    Attributes:
        flash_bytes: of constants; code comes to it, 1 to 4 kB.
        ram_bytes: of the arena, the network's only static memory.
        layers: bytes of constants of each step, by its name.
        steps: how many calls one inference makes.
    """

    flash_bytes: int
    ram_bytes: int
    layers: dict[str, int]
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.path} and {self.path.with_suffix('.h').name}: {self.flash_bytes:,} bytes of constants for flash, "
            f"{self.ram_bytes:,} bytes of RAM, {self.steps} steps"
        )


def export_c(
    model: nn.Module | str | os.PathLike[str],
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    target: str = "ort-x86",
    flash: int | None = None,
    ram: int | None = None,
) -> CExport:
    """Write a model as C99 without heap: `path` and the header beside it.

    Args:
        model: a plain model, such as `torchopt.finalize` returns; or an ONNX file, packed or not.
        example_inputs: the positional arguments of one forward call; not read where `model` is a file.
        path: the .c file to write.
        target: the runtime whose arithmetic the model was made for.
        flash: bytes that constants and code (4 kB at most) may take; more is refused.
        ram: bytes that the arena may take; more is refused.

    Raises:
        ConfigError: the file's name is no C identifier.
        ModelError: an operator, a type or a free size that C code is not written for.
        TargetError: it takes more flash or RAM than given.
        FileError: a file cannot be read or written.

    Example:
        >>> import torch
        >>> place = Path(tempfile.mkdtemp()) / "net.c"
        >>> export_c(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.zeros(1, 4),), place).steps
        2
    """
    source = Path(path)
    name = source_name(source)
    check_place(source)
    check_place(source.with_suffix(".h"))
    where = name if isinstance(model, nn.Module) else str(model)
    content = as_onnx(model, example_inputs, target) if isinstance(model, nn.Module) else read_file(model)
    found, program, text = lowered(content, name, where)
    layers = _sizes(program)
    _check_limit("flash", text.constant_bytes + CODE, flash, layers)
    _check_limit("ram", text.arena.size, ram, _memory(program))
    write_text(source.with_suffix(".h"), text.header)
    write_text(source, text.source)
    return CExport(
        path=source,
        target=target,
        opset=next((o.version for o in found.opsets if not o.domain), 0),
        size_bytes=source.stat().st_size,
        dense_size_bytes=source.stat().st_size,
        passes=(),
        packing=None,
        note="C code",
        flash_bytes=text.constant_bytes,
        ram_bytes=text.arena.size,
        layers=layers,
        steps=len(program.steps),
    )


def source_name(path: Path) -> str:
    """Return the name that functions and files share.

    Raises:
        ConfigError: it is no C identifier.
    """
    name = path.stem
    if path.suffix != ".c":
        raise ConfigError(f"{path}: is no C file's name; one that ends in .c is needed")
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in KEYWORDS:
        raise ConfigError(
            f"{path}: functions are called after the file, and {name!r} is no C identifier; letters, digits and _ are needed, such as net.c"
        )
    return name


def as_onnx(model: nn.Module, example_inputs: tuple[Any, ...], target: str = "ort-x86") -> bytes:
    """Return the ONNX file of a model, dense and without channels that only x86 wants."""
    from torchopt.export.call import call_of
    from torchopt.export.export import export_onnx  # it calls this file for paths that end in .c

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.onnx"
        export_onnx(model, call_of(model, example_inputs), place, target=target, pack=False, widen=False)
        return place.read_bytes()


def lowered(content: bytes, name: str, where: str) -> tuple[Finished, Program, Text]:
    """Return the graph, the steps and the text of an ONNX file's bytes."""
    found = finished(content, where)
    program = Lowering(found, where, OPERATORS).run()
    comment = f"one network in C99, written by torchopt from the graph of ONNX Runtime {onnxruntime.__version__}."
    return found, program, written(program, name, comment)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return an ONNX file's bytes, with the tensors that lie beside it.

    Raises:
        FileError: it is missing or damaged.
    """
    from torchopt.onnx_file.read import read
    from torchopt.onnx_file.serialize import serialized

    model = read(path)
    try:
        return serialized(model, str(path), shapes=False)
    except ModelError as error:
        raise FileError(str(error)) from error


def _sizes(program: Program) -> dict[str, int]:
    """Bytes of the arrays of each step."""

    def own(fields: dict[str, Any]) -> int:
        return sum(own(v) if isinstance(v, dict) else getattr(v, "nbytes", 0) for v in fields.values() if v is not None)

    return {f"{number} {step.what}": own(step.fields) for number, step in enumerate(program.steps)}


def _memory(program: Program) -> dict[str, int]:
    """Bytes that each step reads, writes and works on."""
    found = {}
    for number, step in enumerate(program.steps):
        values = {id(v.root): v.root.size for v in [*step.inputs, step.output] if v.in_arena}
        found[f"{number} {step.what}"] = sum(values.values()) + step.scratch
    return found


def _check_limit(what: str, needed: int, limit: int | None, layers: dict[str, int]) -> None:
    if limit is None or needed <= limit:
        return
    largest = sorted(layers, key=lambda name: -layers[name])[:3]
    named = ", ".join(f"{name} ({layers[name]:,})" for name in largest)
    raise TargetError(
        f"{what}: the network takes {needed:,} bytes, {needed - limit:,} more than the {limit:,} given; the largest layers are {named}"
    )
