"""Export: one torch module in, one small checked ONNX file out.

    torch.onnx.export → passes (one file each in `passes/`) → packing → onnx.checker → a session of ORT → proof → rename

Everything before this was decided in torch: an ONNX pass only writes the same numbers in another form. What was written is run once and
compared with the model (`compared.py`); only then the file gets its name.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from torchopt.errors import ConfigError, ModelError, nearest
from torchopt.export.call import Call, call_of
from torchopt.export.compared import IN_BLOCKS, Proof
from torchopt.export.difference import CLOSE
from torchopt.export.graph import as_exported, gives_dataclasses, plain, to_onnx
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
from torchopt.export.writing import check_integers, lowered, write_checked
from torchopt.network.grid import grids
from torchopt.onnx_file.serialize import serialized
from torchopt.pack.in_place import pack_model, smaller
from torchopt.process.ordinary import alone

OPSETS = {"ort-x86": 21, "ort-x86-avx2": 21, "ort-arm": 21, "ort-web": 21, "openvino": 21}
OLDEST, NEWEST = 17, 23
PACKS = 21  # the opset from which on "auto" packs: older ones are for runtimes in which folding was not measured
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
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
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
        example_kwargs: the keyword arguments of that call.
        dynamic_shapes: free dimensions by argument and name, `{"x": {0: "batch", 2: "height"}}`, or in torch.export's form.
        input_names: of the file's inputs, in the order of the call's tensors; forward's argument names by default.
        output_names: of its outputs.

    The file is run once, on the example inputs and on other sizes where they may vary, and each output is compared with the model's;
    no file is left where they differ by more than rounding. Differences of integers are a warning where this machine does not compute
    what the target does. A model in half precision keeps float32 inputs and outputs; its weights are stored as float16.

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

        if example_kwargs or dynamic_shapes or input_names or output_names:
            raise ConfigError(
                f"export: {path} is C code, whose call is positional and of one size; leave example_kwargs, dynamic_shapes and names out"
            )
        return export_c(model, example_inputs, path, target=target, flash=flash, ram=ram)
    if flash is not None or ram is not None:
        raise ConfigError(
            f"export: flash and ram are limits of C code, and {path} is an ONNX file; a path that ends in .c is needed"
        )
    call = call_of(
        model,
        example_inputs,
        example_kwargs,
        dynamic_shapes=dynamic_shapes,
        dynamic_batch=dynamic_batch,
        input_names=input_names,
        output_names=output_names,
    )
    return export_onnx(model, call, path, target=target, pack=pack, opset=opset, fast_blocks=fast_blocks)


def export_onnx(
    model: nn.Module,
    call: Call,
    path: str | os.PathLike[str],
    *,
    target: str,
    pack: bool | str = "auto",
    opset: int | None = None,
    fast_blocks: bool = False,
    widen: bool = True,
) -> ExportResult:
    """Write an ONNX file, as `export` says; without `widen` no channels are added where the target would run more of them faster."""
    _check(target, pack, opset)
    version = opset or OPSETS[target]
    with _uncollected():
        graph, call = _exported(model, call, version)
        reference = as_exported(model, call)
        places = Roundings(graph.graph, reference)
        check_integers(graph, version)
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
        compare=lambda opened: proof(opened, call, plain(call.inputs)),
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


def _exported(model: nn.Module, call: Call, opset: int) -> tuple[ir.Model, Call]:
    """The graph, and the call that it is of: one with results in a row where the exporter takes them no other way."""
    try:
        return to_onnx(model, call, opset=opset), call
    except ModelError:
        if call.flat or not gives_dataclasses(as_exported(model, call), call):
            raise
    return to_onnx(model, call.in_a_row(), opset=opset), call.in_a_row()


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


def _dense_because(target: str, pack: bool | str, opset: int) -> str:
    """Why the file is written without packing; empty where it is packed."""
    if pack is False:
        return "pack=False"
    if pack == "auto" and opset < PACKS:
        return f"opset {opset} is for older runtimes, in which decoding at load was not measured; pack=True packs"
    if pack == "auto" and target not in FOLDS_AT_LOAD:
        return f"{target} does not read functions inside the model, which decode packed weights"
    return ""


def _check(target: str, pack: bool | str, opset: int | None) -> None:
    if target not in OPSETS:
        raise ConfigError(
            f"export: target={target!r} is unknown; one of {', '.join(OPSETS)} is needed{nearest(str(target), OPSETS)}"
        )
    if pack not in ("auto", "smallest", True, False):
        raise ConfigError(f"export: pack={pack!r}; 'auto', True or False is needed, or 'smallest'")
    if opset is not None and not OLDEST <= opset <= NEWEST:
        raise ConfigError(f"export: opset={opset}; {OLDEST} to {NEWEST} is needed")
