"""Other people's post-training quantizers of ONNX files, each at its best on x86: ONNX Runtime's own, and NNCF.

Both get the file after ORT's pre-processing, which folds batch norm. ORT: QDQ, uint8 activations, int8 weights per channel. NNCF: one zero
point an activation, since its default, one a channel before depthwise convolutions, is refused by ORT or runs in float there.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxruntime import quantization as ort_quantization
from onnxscript import optimizer


class Batches(ort_quantization.CalibrationDataReader):
    """Calibration data for ORT's quantizer."""

    def __init__(self, name: str, batches: list[np.ndarray]) -> None:
        self.name, self.left = name, list(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None at the end."""
        return {self.name: self.left.pop(0)} if self.left else None


def preprocessed(source: Path) -> Path:
    """ORT's own preparation for quantizers: shapes inferred, batch norm folded."""
    target = source.with_name("prepared.onnx")
    ort_quantization.shape_inference.quant_pre_process(str(source), str(target))
    return target


def by_ort(prepared: Path, target: Path, batches: list[np.ndarray]) -> None:
    """Quantize with ORT's `quantize_static`."""
    ort_quantization.quantize_static(
        str(prepared),
        str(target),
        Batches(_input(onnx.load(prepared, load_external_data=False)), batches),
        quant_format=ort_quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort_quantization.QuantType.QUInt8,
        weight_type=ort_quantization.QuantType.QInt8,
    )


def by_nncf(prepared: Path, target: Path, batches: list[np.ndarray]) -> None:
    """Quantize with NNCF's post-training quantization.

    Raises:
        ImportError: NNCF is not installed.
        Exception: whatever it raises of a graph that it cannot read.
    """
    os.environ.setdefault("NNCF_CI", "1")  # no telemetry
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters

    logging.getLogger("nncf").setLevel(logging.ERROR)
    graph = _folded(onnx.load(prepared))
    one_zero_point = nncf.AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(per_channel=False)
    )
    data = nncf.Dataset([{_input(graph): batch} for batch in batches])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        onnx.save(nncf.quantize(graph, data, subset_size=len(batches), advanced_parameters=one_zero_point), target)


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Constants computed: NNCF stumbles over a Cast of an initializer."""
    graph = ir.from_proto(model)
    optimizer.fold_constants(graph, input_size_limit=2**40, output_size_limit=2**40)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    return ir.to_proto(graph)


def _input(model: onnx.ModelProto) -> str:
    return str(model.graph.input[0].name)
