"""Export: one torch module in, one small checked ONNX file out.

    torch.onnx.export → passes (one file each in `passes/`) → packing → onnx.checker → a session of ORT → proof → rename

Everything before this was decided in torch: an ONNX pass only writes the same numbers in another form. What was written is run once and
compared with the model (`compared.py`); only then the file gets its name.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
import onnx_ir as ir
import onnxruntime
from torch import nn

from torchopt.errors import ConfigError, ModelError, nearest
from torchopt.export.compared import IN_BLOCKS, Proof
from torchopt.export.difference import CLOSE
from torchopt.export.graph import as_exported, plain, to_onnx
from torchopt.export.passes import (
    BlockWeightsPass,
    DefaultAttributesPass,
    DynamicMatMulPass,
    GlobalPoolPass,
    HalfWeightsPass,
    HardSigmoidPass,
    IntegerTransposedPass,
    IntegerWeightsPass,
    KeepApartPass,
    KeepFloatPass,
    LateBiasPass,
    LateDequantizePass,
    OwnWeightsPass,
    PartialWindowsPass,
    RedundantActivationsPass,
    ShortNamesPass,
    StaticShapesPass,
    TidyPass,
    WideChannelsPass,
)
from torchopt.export.passes.weights.block_weights import rounds_its_input
from torchopt.export.processor import runs_exactly
from torchopt.export.result import ExportResult
from torchopt.export.rounding_by_rounding import Roundings
from torchopt.io.files import atomic_path
from torchopt.network.grid import grids
from torchopt.onnx_file.serialize import serialized
from torchopt.pack.in_place import pack_model, smaller
from torchopt.pack.proof import prove
from torchopt.process.ordinary import alone

OPSETS = {"ort-x86": 21, "ort-x86-avx2": 21, "ort-arm": 21, "ort-web": 21, "openvino": 21}
OLDEST, NEWEST = 17, 23
PACKS = 21  # the opset from which on "auto" packs: older ones are for runtimes in which folding was not measured
SIXTEEN_BITS = 21  # the opset whose QuantizeLinear gives 16-bit integers
WIDENS = ("ort-x86", "ort-x86-avx2")  # run some numbers of channels faster than others (measured)
PADS = 18  # the opset from which on Pad has one form
FOLDS_AT_LOAD = ("ort-x86", "ort-x86-avx2", "ort-arm", "ort-web")  # decode packed weights once (measured)


@alone()
def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    target: str = "ort-x86",
    dynamic_batch: bool = True,
    pack: bool | str = "auto",
    opset: int | None = None,
    fast_blocks: bool = False,
    flash: int | None = None,
    ram: int | None = None,
) -> ExportResult:
    """Write `model` as an ONNX file that stock ONNX Runtime runs; or, where `path` ends in .c, as C99 for microcontrollers.

    Args:
        model: a plain model, such as `torchopt.finalize` returns.
        example_inputs: the positional arguments of one forward call.
        path: the file to write; the old one stays until the new one is complete and checked.
        target: "ort-x86", "ort-x86-avx2", "ort-arm", "ort-web" or "openvino".
        dynamic_batch: let the batch dimension vary.
        pack: "auto" packs the weights where the target decodes them at load; True, False decide it; "smallest": see `torchopt.pack`.
        opset: version of the ONNX operator set, 17 to 23, for runtimes older than the target's own; "auto" packs from 21 on.
        fast_blocks: let ONNX Runtime round the inputs of 4-bit layers with `Quantize(block_size=…)` to 8 bits, block by block: 1.7 times as
            fast, and less accurate, by much where a few inputs are far larger than the others.

    The file is run once, on the example inputs and on another batch size where that may vary, and each output is compared with the
    model's; no file is left where they differ by more than rounding. Differences of integers are a warning where this machine does not
    compute what the target does. A model in half precision keeps float32 inputs and outputs; its weights are stored as float16.

    Raises:
        ConfigError: an unknown target, another value of `pack`, an opset out of range, or limits of C code for another file.
        TargetError: C code takes more flash or RAM than given.
        ModelError: the model cannot be exported, a weight is not finite, or the file computes something else than the model.
        FileError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> export(nn.Linear(3, 2), (torch.zeros(1, 3),), folder / "m.onnx").opset
        21
    """
    if os.fspath(path).endswith(".c"):
        from torchopt.c_code.export import export_c

        return export_c(model, example_inputs, path, target=target, flash=flash, ram=ram)
    if flash is not None or ram is not None:
        raise ConfigError(
            f"export: flash and ram are limits of C code, and {path} is an ONNX file; a path that ends in .c is needed"
        )
    return export_onnx(
        model, example_inputs, path, target=target, dynamic_batch=dynamic_batch, pack=pack, opset=opset, fast_blocks=fast_blocks
    )


def export_onnx(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    target: str,
    dynamic_batch: bool = True,
    pack: bool | str = "auto",
    opset: int | None = None,
    fast_blocks: bool = False,
    widen: bool = True,
) -> ExportResult:
    """Write an ONNX file, as `export` says; without `widen` no channels are added where the target would run more of them faster."""
    _check(target, pack, opset)
    version = opset or OPSETS[target]
    with _uncollected():
        graph = to_onnx(model, example_inputs, opset=version, dynamic_batch=dynamic_batch)
        reference = as_exported(model)
        places = Roundings(graph.graph, reference)
        _check_integers(graph, version)
        applied = _rewrite(graph, model, wide=widen and target in WIDENS and version >= PADS, fast_blocks=fast_blocks)
    names = places.values()
    graph = lowered(graph, version)
    dense = serialized(graph, "export", shapes=False)
    note = _dense_because(target, pack, version)
    report = None if note else pack_model(graph)
    graph, report = smaller(graph, report, dense, shapes=False) if report and pack == "smallest" else (graph, report)
    proof = Proof(
        model=reference,
        name=type(model).__name__,
        dense=dense,
        roundings=names,
        exact=runs_exactly(target),
        close=IN_BLOCKS if any(map(rounds_its_input, graph.graph)) else CLOSE,
    )
    size = write_checked(
        graph,
        path,
        dense=dense if report is not None and report.rows else None,
        compare=lambda opened: proof(opened, plain(example_inputs), dynamic_batch=dynamic_batch),
    )
    return ExportResult(
        path=Path(path),
        target=target,
        opset=version,
        size_bytes=size,
        dense_size_bytes=len(dense),
        passes=applied,
        packing=report,
        note=note,
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Look for no garbage meanwhile: torch's exporter makes a million small objects that live, and going through them takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rewrite(graph: ir.Model, model: nn.Module, *, wide: bool, fast_blocks: bool) -> tuple[str, ...]:
    """Run the passes in place and return the names of those that changed something."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # the exporter may choose any name of a shared one
    keep = frozenset(parameters)
    steps = (
        TidyPass(keep),
        StaticShapesPass(),
        PartialWindowsPass(),
        RedundantActivationsPass(),
        GlobalPoolPass(),
        HardSigmoidPass(),
        BlockWeightsPass(grids(model), fast_blocks),
        IntegerWeightsPass(grids(model)),
        IntegerTransposedPass(),
        DynamicMatMulPass(),
        LateDequantizePass(),
        LateBiasPass(),
        KeepFloatPass(),
        KeepApartPass(),
        *([WideChannelsPass()] if wide else []),
        HalfWeightsPass(),
        TidyPass(keep),
        OwnWeightsPass(),  # after the last tidying, which makes equal nodes one
        DefaultAttributesPass(),
        ShortNamesPass(frozenset(name for name, p in parameters.items() if p.dim() > 1)),
    )
    changed = [type(step).__name__.removesuffix("Pass") for step in steps if step(graph).modified]
    return tuple(dict.fromkeys(changed))


def lowered(graph: ir.Model, opset: int) -> ir.Model:
    """Return the graph in an older operator set, where it has a newer one.

    Raises:
        ModelError: an operator of the graph does not exist there.
    """
    if graph.opset_imports[""] <= opset:
        return graph
    try:
        old = onnx.version_converter.convert_version(ir.to_proto(graph), opset)
    except Exception as error:  # a RuntimeError or an onnx.onnx_cpp2py_export.ConvertError, by version
        raise ModelError(f"export: the graph cannot be written in opset {opset}: {str(error)[:200]}; use 21") from error
    old.ir_version = 8 if opset < 19 else old.ir_version
    return ir.from_proto(old)


def _check_integers(graph: ir.Model, opset: int) -> None:
    """Refuse 16-bit activations in an operator set that has none.

    Raises:
        ModelError: they are there.
    """
    wide = {ir.DataType.UINT16, ir.DataType.INT16}
    if opset < SIXTEEN_BITS and any(value.dtype in wide for value in graph.graph.initializers.values()):
        raise ModelError(f"export: activations of 16 bits need opset {SIXTEEN_BITS}, got {opset}; leave opset out")


def _dense_because(target: str, pack: bool | str, opset: int) -> str:
    """Why the file is written without packing; empty where it is packed."""
    if pack is False:
        return "pack=False"
    if pack == "auto" and opset < PACKS:
        return f"opset {opset} is for older runtimes, in which decoding at load was not measured; pack=True packs"
    if pack == "auto" and target not in FOLDS_AT_LOAD:
        return f"{target} does not read functions inside the model, which decode packed weights"
    return ""


def write_checked(
    graph: ir.Model,
    path: str | os.PathLike[str],
    *,
    dense: bytes | None = None,
    compare: Callable[[onnxruntime.InferenceSession], None] | None = None,
) -> int:
    """Check the graph, let ONNX Runtime load it, prove it, write it atomically, and return its size in bytes.

    Args:
        graph: the graph.
        path: the file.
        dense: the same file before packing, where it was packed: the weights that ONNX Runtime decodes are compared with it.
        compare: runs the file, and raises where it computes something else than the model.

    Raises:
        ModelError: the checker or the runtime refuses it, it does not decode to what it was, or `compare` refuses it.
        FileError: the file cannot be written.
    """
    data = serialized(graph, "export", shapes=False)  # every runtime infers them; in a small file they are a tenth
    try:
        onnx.checker.check_model(data)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        opened = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no class
        raise ModelError(f"export: the graph is refused by the checker or by ONNX Runtime: {str(error)[:300]}") from error
    if dense is not None:
        prove(dense, data, "export")
    if compare is not None:
        compare(opened)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def _check(target: str, pack: bool | str, opset: int | None) -> None:
    if target not in OPSETS:
        raise ConfigError(
            f"export: target={target!r} is unknown; one of {', '.join(OPSETS)} is needed{nearest(str(target), OPSETS)}"
        )
    if pack not in ("auto", "smallest", True, False):
        raise ConfigError(f"export: pack={pack!r}; 'auto', True or False is needed, or 'smallest'")
    if opset is not None and not OLDEST <= opset <= NEWEST:
        raise ConfigError(f"export: opset={opset}; {OLDEST} to {NEWEST} is needed")
