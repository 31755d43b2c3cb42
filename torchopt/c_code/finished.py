"""The integer graph that ONNX Runtime makes of a file, with the shape of every value: what C code is written from.

ONNX Runtime itself fuses DequantizeLinear → operator → QuantizeLinear to integer kernels, folds constants, and decodes packed weights.
So its own optimized graph says exactly which integers it computes, and no second reading of the same rules can differ from it. Shapes
are those of one run on zeros; the graph is kept with all its values as outputs, for comparing each of them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from torchopt.errors import FileError, ModelError

FUSIONS = [  # of float operators: written apart they have simpler forms, and none of them makes integers
    "BiasGeluFusion", "ConvActivationFusion", "ConvAddActivationFusion", "FastGeluFusion", "GemmActivationFusion", "QuickGeluFusion",
]  # fmt: skip
TYPES: dict[int, Any] = {
    int(onnx.TensorProto.FLOAT): np.float32,
    int(onnx.TensorProto.UINT8): np.uint8,
    int(onnx.TensorProto.INT8): np.int8,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """An optimized graph.

    Attributes:
        graph: its nodes, inputs and outputs.
        opsets: the versions of its operators.
        constants: the initializers, and what nodes make of them alone, by name.
        values: a zero-filled array of the shape and type of each value that a node gives.
        everything: a session that returns every value.
        names: of those values, in the session's order.
        session: the file as ONNX Runtime runs it.
    """

    graph: onnx.GraphProto
    opsets: list[onnx.OperatorSetIdProto]
    constants: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    everything: onnxruntime.InferenceSession
    names: list[str]
    session: onnxruntime.InferenceSession


def finished(data: bytes, where: str) -> Finished:
    """Let ONNX Runtime optimize a model for one sample at a time.

    Args:
        data: an ONNX file's bytes.
        where: its name, for messages.

    Raises:
        FileError: it is no ONNX file, or ONNX Runtime refuses it.
        ModelError: an input's size is free, or of a type that C code does not take.
    """
    model = _with_one_sample(data, where)
    level = onnxruntime.GraphOptimizationLevel
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "optimized.onnx")
        _session(model.SerializeToString(), where, level.ORT_ENABLE_EXTENDED, path)
        optimized = onnx.load(path)
    opened = _session(model.SerializeToString(), where, level.ORT_ENABLE_ALL)
    graph = optimized.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept = {value.name for value in graph.output}
    names = [name for node in graph.node for name in node.output if name]
    probe = onnx.ModelProto()
    probe.CopyFrom(optimized)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in kept)
    everything = _session(probe.SerializeToString(), where, level.ORT_DISABLE_ALL)
    names = [value.name for value in everything.get_outputs()]
    zeros: dict[str, np.ndarray] = {i.name: np.zeros(i.shape, TYPES[_type(model, i.name)]) for i in everything.get_inputs()}
    arrays = dict(zip(names, everything.run(None, zeros), strict=True))
    for node in graph.node:
        if all(not name or name in constants for name in node.input):
            constants.update({name: arrays[name] for name in node.output if name})
    return Finished(
        graph=graph,
        opsets=list(optimized.opset_import),
        constants=constants,
        values=zeros | arrays,
        everything=everything,
        names=names,
        session=opened,
    )


def _with_one_sample(data: bytes, where: str) -> onnx.ModelProto:
    """The model with its free batch size fixed at 1."""
    try:
        model = onnx.load_from_string(data)
    except Exception as error:  # of protobuf's classes
        raise FileError(f"{where}: is no ONNX file ({str(error)[:100]}); give one") from error
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if value.name in constants:
            continue
        if tensor.elem_type not in TYPES:
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise ModelError(f"{where}: the input {value.name!r} is {kind}; C code takes FLOAT, UINT8 and INT8")
        for number, size in enumerate(tensor.shape.dim):
            if size.dim_value > 0:
                continue
            if number:
                free = size.dim_param or "?"
                raise ModelError(
                    f"{where}: size {number} of the input {value.name!r} is free ({free!r}), and C code has fixed sizes; "
                    "export from example inputs of the size that the device has, without dynamic shapes"
                )
            size.dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return model


def _type(model: onnx.ModelProto, name: str) -> int:
    return next(int(value.type.tensor_type.elem_type) for value in model.graph.input if value.name == name)


def _session(
    data: bytes, where: str, level: onnxruntime.GraphOptimizationLevel, path: str | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if path is not None:
        options.optimized_model_filepath = path
    try:
        return onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=None if path is None else FUSIONS
        )
    except Exception as error:  # the runtime's exceptions share no class
        reason = " ".join(str(error).split())[:300]
        raise FileError(f"{where}: ONNX Runtime {onnxruntime.__version__} refuses it: {reason}") from error
