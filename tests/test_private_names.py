"""Private names of other libraries: all that are in use stand in docs/foundations.md, and are there in the libraries installed."""

import ast
import functools
import importlib
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.runtime.outputs import _array

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchopt"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
MODULES = [nn.Module(), nn.GRU(1, 1), nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.MultiheadAttention(1, 1)]
GRAPH = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
OPERATOR = torch.ops.aten.add.Tensor
OTHERS = [torch.zeros(1), torch.zeros(1).untyped_storage(), GRAPH, GRAPH.graph, OPERATOR, nn.Module().state_dict()]
LIBRARIES = [torch, torch._C, torch.ops.aten, parametrize, onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))]
OF_MODULES = {name for holder in [*MODULES, GRAPH] for name in dir(holder)}
THEIRS = OF_MODULES | {name for holder in [*OTHERS, *LIBRARIES] for name in dir(holder)}
# of transformers' models, of Parameters of FSDP2 and of FSDP1, of what torch.onnx.export returns
OF_OBJECTS = {"_tied_weights_keys", "_local_tensor", "_handle", "_capture_strategy"}
DOCUMENTED = {"_tensor_name"}  # by torch.nn.utils.prune, for subclasses


def is_private(name):
    return name == "onnxruntime_pybind11_state" or (name.startswith("_") and not name.startswith("__") and name != "_")


@functools.cache
def in_use():
    """The rooms that use each private name of another library's."""
    trees = {}
    for path, tree in TREES.items():
        trees.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(tree)
    ours = {name for tree in TREES.values() for node in ast.walk(tree) for name in defined(node)}
    found = {}
    for room, inside in trees.items():
        for tree in inside:
            for node in ast.walk(tree):
                for name in filter(is_private, named(node, ours)):
                    found.setdefault(name, set()).add(room)
    return {name: rooms for name, rooms in found.items() if name not in DOCUMENTED}


def defined(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    of_self = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return [node.attr] if of_self and isinstance(node.ctx, ast.Store) else []


def named(node, ours):
    """What a node names of another library's."""
    match node:
        case ast.ImportFrom(module=str(module), names=names) if not module.startswith("torchopt"):
            return [part for alias in names for part in f"{module}.{alias.name}".split(".")]
        case ast.Import(names=names):
            return [part for alias in names for part in alias.name.split(".")]
        case ast.Attribute(value=value, attr=attr):
            on_self = isinstance(value, ast.Name) and value.id in ("self", "cls")
            return [attr] if attr in OF_MODULES or (attr not in ours and not on_self) else []
        case ast.FunctionDef(name=name):
            return [name] if name in OF_MODULES else []
        case ast.Constant(value=str(text)):
            return [text] if text in OF_OBJECTS or (text in THEIRS and text not in ours) else []
    return []


def table():
    text = (ROOT / "docs" / "foundations.md").read_text(encoding="utf-8").split("## Private names")[1]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`(\w+)`", row[0]), set(row[1].strip().split(", ")), re.findall(r"`(\w+\.py)`", row[3])) for row in rows]


def test_the_table_holds_what_is_in_use():
    listed = {name: rooms for names, rooms, _ in table() for name in names}
    used = in_use()
    assert sorted(used.keys() - listed.keys()) == [], "in use, and not in docs/foundations.md"
    assert sorted(listed.keys() - used.keys()) == [], "in docs/foundations.md, and no more in use"
    gone = {name: sorted(listed[name] - rooms) for name, rooms in used.items() if not listed[name] <= rooms}
    assert gone == {}, "in docs/foundations.md for rooms that use it no more"


def test_each_row_names_a_test_that_is_there():
    assert [tests for _, _, tests in table() if not tests or not all((ROOT / "tests" / test).is_file() for test in tests)] == []


def test_the_libraries_have_them():
    """Imports are imported; attributes are looked for on what has them."""
    names = in_use().keys() - OF_OBJECTS
    seen = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("torchopt"):
                for alias in node.names:
                    whole = {*str(node.module).split("."), alias.name} & names
                    if whole:
                        seen |= whole
                        assert hasattr(importlib.import_module(str(node.module)), alias.name), f"{node.module}.{alias.name}"
    assert sorted(names - seen - THEIRS - set(dir(torch._C)) - {"_decomposed"}) == []


class Arriving(TorchDispatchMode):
    """Notes the names of operators as `torchopt.channels` sees them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = {*getattr(self, "names", ()), func._schema.name.split("::")[-1]}
        return func(*args, **(kwargs or {}))


def test_operators_arrive_by_the_names_that_are_known():
    x, ways = torch.randn(2, 4, 3), torch.eye(4, dtype=torch.bool)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with Arriving() as seen, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        x.softmax(1), x.log_softmax(1), x.double(), x @ torch.randn(3, 3), normed(x), nn.PReLU()(x)
        nn.EmbeddingBag(5, 3)(torch.zeros(2, 2, dtype=torch.int64))
        nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=ways)
    row = next(names for names, _, _ in table() if "_softmax" in names)
    assert sorted(set(row) - seen.names) == []


def test_an_output_in_bfloat16_is_read():
    """numpy has no such type, and ONNX Runtime's public way is numpy's."""
    cast = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (bfloat16[3] y) { y = Cast <to = 16> (x) }'
    )
    session = onnxruntime.InferenceSession(cast.SerializeToString(), providers=["CPUExecutionProvider"])
    x = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([1.0, -2.5, 0.0], np.float32))
    (y,) = session.run_with_ort_values(None, {"x": x})
    assert _array(y).tolist() == [1.0, -2.5, 0.0]
