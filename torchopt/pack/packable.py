"""Which tensors of a model packing may put in another form: constants that only nodes read, in whatever scope they stand."""

from __future__ import annotations

import onnx_ir as ir

from torchopt.onnx_file.view import STANDARD, Constant, View
from torchopt.pack.report import LeftDense

TYPES = {
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE),  # for bfloat16, ORT has no Expand
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32),
}
SMALLEST = 256  # bytes of a tensor below which no encoding pays


def opset_of(model: ir.Model | ir.Function) -> int | None:
    """Return the version of ONNX's own operator set, under either of its names; None where it is not imported."""
    return next((model.opset_imports[domain] for domain in sorted(STANDARD) if domain in model.opset_imports), None)


def packable(view: View, opset: int) -> tuple[dict[str, Constant], list[LeftDense]]:
    """Return (the constants that may be packed, by name; the others, with the reason).

    What packing made before is in neither. Where two scopes use a name, the second is told apart by its scope.

    Args:
        view: of the model.
        opset: that decoders are written in.
    """
    found: dict[str, Constant] = {}
    left: list[LeftDense] = []
    twice = _named_twice(view)
    for constant in view.constants:
        if constant.tensor is None or constant.tensor.nbytes <= SMALLEST:
            continue
        reason = _reason(constant, opset)
        if (id(constant.scope), constant.name) in twice:
            reason = "of a name that is used again within or around its graph"  # which ORT takes of initializers only
        if reason is None:
            found[constant.name if constant.name not in found else f"{constant.scope.name}/{constant.name}"] = constant
        else:
            left.append(LeftDense(name=constant.name, dense_bytes=constant.tensor.nbytes, reason=reason))
    return found, left


def _named_twice(view: View) -> set[tuple[int, str]]:
    """(identity of a scope, name) of what is named as something in a scope around it, or within it, is."""
    names: dict[int, set[str]] = {}
    for scope in view.scopes:
        initializers = scope.body.initializers if isinstance(scope.body, ir.Graph) else ()
        outputs = (v.name for node in scope.body for v in node.outputs)
        names[id(scope)] = {str(name) for name in (*(v.name for v in scope.body.inputs), *initializers, *outputs) if name}
    found: set[tuple[int, str]] = set()
    for scope in view.scopes:
        outer = scope.outer
        while outer is not None:
            found.update((id(s), name) for name in names[id(scope)] & names[id(outer)] for s in (scope, outer))
            outer = outer.outer
    return found


def _reason(constant: Constant, opset: int) -> str | None:
    """Why a constant stays as it is, or None."""
    value, tensor, root = constant.value, constant.tensor, constant.scope.root
    assert tensor is not None
    if constant.replaceable:
        return "inputs of the model too, which a caller may replace"
    if any(value is output for output in constant.scope.body.outputs):
        return "outputs of the model too"
    if tensor.dtype not in TYPES:
        return f"of type {tensor.dtype.name.lower()}"
    node = value.producer()
    if not list(value.uses()):
        return "read by no node"
    if node is not None and "value" not in node.attributes:
        return "written out number by number in a node"
    if isinstance(root, ir.Function) and opset_of(root) != opset:
        return "in a function of another operator set"
    return None
