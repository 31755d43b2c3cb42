"""One view of a stranger's model: weights and layers in Constant nodes, branches, bodies, functions, and files that ORT has optimized."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from test_pack_onnx import weight, write

from torchopt.onnx_file.read import read
from torchopt.onnx_file.view import View
from torchopt.pack import pack

HEAD = '<ir_version: 10, opset_import: ["": 21, "theirs": 1, "com.microsoft": 1]>'
NOTHING = "f () => (no) {no = Constant <value_floats = [0.0]> ()}"
FORMS = {
    "a Constant node": ("w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()  y = MatMul (x, w)", "", ("MatMul", "", "w")),
    "a branch": (
        "y = If (flag) <then_branch = t () => (p) {w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()  p = MatMul (x, w)}, "
        f"else_branch = {NOTHING}>",
        "",
        ("MatMul", "y/then_branch", "w"),
    ),
    "a body in a branch": (
        "y = If (flag) <then_branch = t () => (p) {n = Constant <value_int = 3> ()  p = Loop (n, , x) <body = b (int64 i, bool go, "
        "float[1, 2] s) => (still, more) <float[2, 2] w = {1, 2, 3, 4}> {still = Identity (go)  more = Gemm (s, w)}>}, "
        f"else_branch = {NOTHING}>",
        "",
        ("Gemm", "y/then_branch/p/body", "w"),
    ),
    "a function": (
        "y = theirs.F (x)",
        '<domain: "theirs", opset_import: ["": 21]> F (x) => (y) {w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()  y = MatMul (x, w)}',
        ("MatMul", "theirs::F", "w"),
    ),
    "an operand of a function of a function": (
        "w = Constant <value = int8[2, 2] {1, 2, 3, 4}> ()  y = theirs.F (x, w)",
        '<domain: "theirs", opset_import: ["": 21, "theirs": 1]> F (x, v) => (y) {y = theirs.G (x, v)}\n'
        '<domain: "theirs", opset_import: ["": 21]> G (x, u) => (y) {s = Constant <value = float {0.5}> ()  '
        "d = DequantizeLinear (u, s)  t = Transpose (d)  y = MatMul (x, t)}",
        ("MatMul", "theirs::G", "w"),
    ),
    "a runtime's own operator": (
        "w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()  y = com.microsoft.FusedMatMul (x, w)",
        "",
        ("FusedMatMul", "", "w"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_and_its_weight_are_seen_in(form):
    nodes, functions, found = FORMS[form]
    view = View(ir.from_onnx_text(f"{HEAD} g (float[1, 2] x, bool flag) => (y) {{{nodes}}}\n{functions}"))
    assert [(layer.node.op_type, layer.scope.name, layer.weights[0].name) for layer in view.layers] == [found]
    (layer,) = view.layers
    (w,) = layer.weights
    assert (w.tensor.size, w.replaceable, w.stored_bytes) == (4, False, 4 if form.startswith("an operand") else 16)
    assert w.readers == [(layer.node, 1)] or layer.node.inputs[1].producer().op_type == "Transpose"


def test_a_function_that_is_called_with_two_weights_has_one_layer_with_both():
    text = f"""{HEAD} g (float[1, 2] x) => (y) <float[2, 2] v = {{1, 2, 3, 4}}, float[2, 2] w = {{1, 2, 3, 4}}>
        {{h = theirs.F (x, v)  y = theirs.F (h, w)}}
        <domain: "theirs", opset_import: ["": 21]> F (x, w) => (y) {{y = MatMul (x, w)}}"""
    view = View(ir.from_onnx_text(text))
    assert [[w.name for w in layer.weights] for layer in view.layers] == [["v", "w"]]
    assert [[node.op_type for node, _ in constant.readers] for constant in view.constants] == [["MatMul"], ["MatMul"]]


def test_an_activation_that_is_scaled_is_no_weight():
    text = f"""{HEAD} g (float[1, 2] x) => (y) {{
        c = Constant <value = int8[2, 2] {{1, 2, 3, 4}}> ()  f = Cast <to = 1> (c)  m = Mul (f, x)  y = MatMul (x, m)}}"""
    assert View(ir.from_onnx_text(text)).layers == []


def test_packed_weights_are_constants_with_what_they_take_in_the_file(tmp_path):
    write(tmp_path / "a.onnx", weight(0.8, 16, np.int8))
    report = pack(tmp_path / "a.onnx", tmp_path / "b.onnx")
    view = View(read(tmp_path / "b.onnx"))
    assert [(c.name, c.origin) for c in view.constants] == [("s", "initializer"), ("w", "packed")]
    assert view.constants[1].stored_bytes == report.rows[0].packed_bytes
    assert [(layer.node.op_type, layer.weights[0].name) for layer in view.layers] == [("MatMul", "w")]


def test_the_layers_of_a_file_that_onnx_runtime_has_optimized(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 3, 3, 3), "b": (16, 16, 3, 3), "c": (16 * 4 * 4, 10)}
    constants = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [helper.make_node("Conv", ["x", "a"], ["p"]), helper.make_node("Relu", ["p"], ["q"])]
    nodes += [helper.make_node("Conv", ["q", "b"], ["r"]), helper.make_node("Relu", ["r"], ["s"])]
    nodes += [helper.make_node("Flatten", ["s"], ["t"]), helper.make_node("MatMul", ["t", "c"], ["y"])]
    x, y = (helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, 3, 8, 8]), ("y", [1, 10])))
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "a.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, str(tmp_path / "b.onnx")
    onnxruntime.InferenceSession(tmp_path / "a.onnx", options, providers=["CPUExecutionProvider"])
    layers = View(read(tmp_path / "b.onnx")).layers
    assert [layer.node.op_type for layer in layers] == [
        *(["Conv", "Conv"] if layers[0].node.domain else ["FusedConv"] * 2),
        "MatMul",
    ]
    assert [layer.weights[0].tensor.size for layer in layers][1:] == [16 * 16 * 9, 2560]
