"""The backend cases of the `onnx` package, about two thousand small files, packed and unpacked: none crashes, none differs.

Each case runs as it is, and once more with every input but the first made an initializer, so that there is something to pack; size
limits are off, so that everything is packed. What ONNX Runtime does not open, it must not open packed either, and no file may raise
anything but one sentence. Where it opens the file, the packed and the unpacked one give the same bits, or the last bit where a
report says that operators with function bodies are written out earlier.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnx.backend.test.case import node as node_cases
from onnx.backend.test.loader import load_model_tests

import torchopt
from torchopt.export import decode_initializers, unpack
from torchopt.onnx_file.read import read
from torchopt.onnx_file.view import View
from torchopt.pack import pack, packable

RANDOM = {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Dropout"}
FREE = -(10**9)  # bytes that a call takes


def cases():
    """Yield (name, the model's bytes, the inputs of the first data set)."""
    for case in node_cases.collect_testcases(None):
        yield case.name, case.model.SerializeToString(), case.data_sets[0][0] if case.data_sets else []
    for kind in ("simple", "pytorch-operator", "pytorch-converted"):
        for case in load_model_tests(kind=kind):
            folder = Path(case.model_dir)
            files = sorted(folder.glob("test_data_set_0/input_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            yield case.name, (folder / "model.onnx").read_bytes(), [_array(path.read_bytes()) for path in files]


def _array(data):
    try:
        tensor = onnx.TensorProto.FromString(data)
        return numpy_helper.to_array(tensor) if tensor.data_type != TensorProto.UNDEFINED else None
    except Exception:  # a sequence or an optional
        return None


def filled(data, inputs):
    """The model with its inputs after the first made initializers, where they are tensors; None where there is none to make."""
    model = onnx.ModelProto.FromString(data)
    values = list(zip(list(model.graph.input), inputs, strict=False))[1:]
    made = [(v, x) for v, x in values if isinstance(x, np.ndarray) and v.type.HasField("tensor_type")]
    if not made or model.ir_version < 4:
        return None
    for value, array in made:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
        model.graph.input.remove(value)
    return model.SerializeToString()


def outputs(path, inputs):
    """What ONNX Runtime gives, or None where it does not open or run the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return session.run(None, {spec.name: inputs[spec.name] for spec in session.get_inputs() if spec.name in inputs})
    except Exception:  # the runtime's exceptions share no class
        return None


def same(a, b, last_bit=False):
    """Equal bits, within lists and dicts too; on request, all but the last of numbers around one."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, last_bit) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key], last_bit) for key in a)
    if last_bit and isinstance(a, np.ndarray) and a.dtype == np.float32:
        return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=2**-22, equal_nan=True)
    if isinstance(a, np.ndarray) and a.dtype != object:
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def normal(model):
    """The message as unpacking promises to give it back: numbers of tensors as bytes, no field that says its default."""
    graphs, nodes = [model.graph], []
    for graph in graphs:  # it grows
        nodes += graph.node
        for tensor in list(graph.initializer):
            as_bytes(tensor)
        graphs += [g for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    for node in [*nodes, *(n for f in model.functions for n in f.node)]:
        if not node.domain:
            node.ClearField("domain")
        for attribute in node.attribute:
            if attribute.HasField("t"):
                as_bytes(attribute.t)
    return model


def as_bytes(tensor):
    if tensor.data_type != TensorProto.STRING and not tensor.HasField("raw_data"):
        raw = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        for key in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(key)
        tensor.raw_data = raw


def check(name, data, inputs, folder):
    """Return what happened to one file, in a word."""
    source, packed, dense = (folder / f"{x}.onnx" for x in "abc")
    source.write_bytes(data)
    try:
        model = onnx.ModelProto.FromString(data)
        feed = {v.name: x for v, x in zip(model.graph.input, inputs, strict=False) if x is not None}
        report = pack(source, packed)
        unpack(packed, dense)
        torchopt.report(packed)
        decode_initializers(packed)
        View(read(packed))
    except torchopt.TorchoptError as error:
        return f"refused: {str(error).split(':', 1)[1][:100]}"
    if not report.rows and packed.read_bytes() != data:
        return "DIFFERS: nothing was packed, and the file is another"
    back = onnx.load(dense)
    converted = any(entry.version < 12 for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if report.rows and not converted and normal(back) != normal(model):
        return "DIFFERS: the unpacked file is another"
    if any(node.op_type in RANDOM for node in model.graph.node):
        return "random"
    before = outputs(source, feed)
    if before is None:
        return "not run by ONNX Runtime"
    for path in (packed, dense) if report.rows else ():
        after = outputs(path, feed)
        if after is None:
            return f"DIFFERS: ONNX Runtime does not run {path.name}"
        if not same(before, after, bool(report.inlined) and path is packed):
            return f"DIFFERS: the outputs of {path.name}"
    return "packed, equal" if report.rows else "nothing to pack, equal"


@pytest.fixture
def no_limits(monkeypatch):
    """Everything is packed, whatever it costs."""
    monkeypatch.setattr(packable, "SMALLEST", -1)
    monkeypatch.setattr(sys.modules["torchopt.codecs.encode"], "CALL_BYTES", FREE)
    monkeypatch.setattr(sys.modules["torchopt.pack.choose"], "CALL_BYTES", FREE)
    monkeypatch.setattr(sys.modules["torchopt.pack.choose"], "function_bytes", lambda encoding, opset: {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_backend_case_crashes_or_differs(tmp_path, no_limits):
    found, different = Counter(), []
    for name, data, inputs in cases():
        for form, changed in (("as it is", data), ("filled", filled(data, inputs))):
            if changed is None:
                continue
            try:
                result = check(name, changed, inputs, tmp_path)
            except Exception as error:  # any crash of ours is a finding
                result = f"DIFFERS: {type(error).__name__}: {str(error)[:200]}"
            found[result.split(":")[0]] += 1
            if result.startswith(("DIFFERS", "refused")):
                different.append(f"{name}, {form}: {result}")
    print(found)
    print("\n".join(different))
    assert found["packed, equal"] > 600
    assert [line for line in different if "DIFFERS" in line] == []
