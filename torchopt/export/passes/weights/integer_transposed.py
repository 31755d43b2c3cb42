"""Transposed convolutions between integers, as convolutions: ONNX Runtime has an integer kernel for those only.

    y[s·q + r] = Σ_j x[q − j] · w[s·j + r]        s: stride, r = 0 … s − 1: the phase, j = 0 … K − 1, K = ⌈k / s⌉

Each phase is a convolution of the small input (Shi et al. 2016, arXiv:1609.05158), so that all of them are one convolution with sⁿ times
the output channels, whose results are put side by side and cropped to what padding leaves:

    DequantizeLinear → ConvTranspose(w) → QuantizeLinear   →   DequantizeLinear → Conv(w′) → QuantizeLinear → move integers

A kernel of s·K taps has no more products than the transposed form; a shorter one is filled up with zeros. The moves are written channels
last, as the integer convolutions before and after them work, so that ORT drops all transpositions but one, of whole pixels. In the file
the weight keeps its shape; ORT carries out the nodes that bring w′ about when it loads the file.

1. stride 1                                      → Conv alone, with the kernel turned round
2. any other stride, sizes known                 → the above
3. strides with dilation, unknown sizes, a result that is not rounded, and groups of few channels (bilinear upsampling is one of them), for
   which the integer kernel is slower     → left in float

Measured, 28×28 pixels, 128 → 128 channels, stride 2: 0.23 of float's time, 0.88 as integers around a float kernel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from torchopt.export.passes.constants import constant

NARROWEST = (
    16  # outputs of a group: with 8 the integer kernel takes 1.1 to 1.4 times as long as the float one, with 16 0.7 to 0.8
)


class IntegerTransposedPass(ir.passes.InPlacePass):
    """Cases 1 and 2 of the module's docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every transposed convolution of `model` whose weight is integers."""
        found = [node for node in model.graph if node.op_type == "ConvTranspose" and _has_integers(node)]
        for node in found:
            _rewrite(model.graph, node, Form(node))
        model.graph.sort()
        return ir.passes.PassResult(model, modified=bool(found))


class Form:
    """Sizes of a transposed convolution with n spatial dimensions; lists have an entry a dimension."""

    def __init__(self, node: ir.Node) -> None:
        x, weight = node.inputs[:2]
        assert x is not None and x.shape is not None and weight is not None and weight.shape is not None  # noqa: PT018
        self.size: list[Any] = list(x.shape)[2:]
        sizes: list[Any] = list(weight.shape)
        self.inputs, self.outputs, *self.kernel = sizes  # of all groups; of one group
        n = len(self.kernel)
        self.stride = _ints(node, "strides", [1] * n)
        self.dilation = _ints(node, "dilations", [1] * n)
        pads = _ints(node, "pads", [0] * (2 * n))
        self.before, self.after = pads[:n], pads[n:]
        self.extra = _ints(node, "output_padding", [0] * n)
        self.groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        self.taps = [math.ceil(k / s) for k, s in zip(self.kernel, self.stride)]
        self.phases = math.prod(self.stride)

    @property
    def reach(self) -> list[int]:
        """How far the last tap of a phase is from the first."""
        return [(k - 1) * d for k, d in zip(self.taps, self.dilation)]

    @property
    def is_written(self) -> bool:
        """True where this pass has a form for it."""
        if self.phases == 1:
            return all(p <= r for p, r in zip(self.before + self.after, self.reach * 2)) and not any(self.extra)
        sized = all(isinstance(size, int) for size in self.size) and max(self.dilation) == 1
        return sized and (self.groups == 1 or self.outputs >= NARROWEST)

    def result(self) -> list[int]:
        """The spatial sizes of the result."""
        sizes = zip(self.size, self.stride, self.kernel, self.before, self.after, self.extra)
        return [(n - 1) * s + k - b - a + e for n, s, k, b, a, e in sizes]

    def pads(self) -> list[int]:
        """The padding of the convolution: whole steps of the original one are cut here, not cropped afterwards."""
        if self.phases == 1:
            return [r - p for r, p in zip(self.reach * 2, self.before + self.after)]
        begins = [r - b // s for r, b, s in zip(self.reach, self.before, self.stride)]
        steps = [math.ceil((b % s + m) / s) for b, s, m in zip(self.before, self.stride, self.result())]
        ends = [m + r - n - b for m, r, n, b in zip(steps, self.reach, self.size, begins)]
        return begins + ends


def can_be_integer(node: ir.Node) -> bool:
    """True for a transposed convolution with known weight, for which there is an integer form, and whose result is rounded once."""
    x, weight = node.inputs[:2]
    shaped = all(v is not None and v.shape is not None for v in (x, weight))
    if not shaped or "output_shape" in node.attributes or not _is_padded_by_numbers(node) or _rounded(node) is None:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    form = Form(node)
    return (bias is None or bias.const_value is not None) and form.is_written and min(form.pads()) >= 0


def _is_padded_by_numbers(node: ir.Node) -> bool:
    return "auto_pad" not in node.attributes or node.attributes["auto_pad"].as_string() in ("", "NOTSET")


def _has_integers(node: ir.Node) -> bool:
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    return weight is not None and weight.op_type == "DequantizeLinear" and can_be_integer(node)


def _rounded(node: ir.Node) -> ir.Node | None:
    """The one QuantizeLinear that everybody reads the result of, past an activation."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or node.outputs[0].is_graph_output():
        return None
    user = users[0][0]
    if user.op_type in ("Relu", "Clip"):
        return _rounded(user)
    return user if user.op_type == "QuantizeLinear" and not user.outputs[0].is_graph_output() else None


def _rewrite(graph: ir.Graph, node: ir.Node, form: Form) -> None:
    old, rounded = node.outputs[0], _rounded(node)
    assert rounded is not None
    bias = node.inputs[2].const_value.numpy() if len(node.inputs) > 2 and node.inputs[2] is not None else None  # type: ignore[union-attr]
    operands = [node.inputs[0], _weight(graph, node, form)]
    if bias is not None:
        operands.append(constant(graph, f"{old.name}_bias", _a_phase(bias, form)))
    conv = ir.Node(
        "",
        "Conv",
        operands,
        [
            ir.AttrInt64("group", form.groups),
            ir.AttrInt64s("pads", form.pads()),
            ir.AttrInt64s("dilations", form.dilation),
        ],
    )
    result = conv.outputs[0]
    result.name, result.dtype = f"{old.name}_phases", ir.DataType.FLOAT
    graph.insert_before(node, conv)
    node.outputs[0].replace_all_uses_with(result)
    graph.remove(node, safe=True)
    if form.phases == 1:
        result.shape = old.shape
        return
    codes = rounded.outputs[0]
    users = list(codes.uses())
    apart = _beside(graph, rounded, codes, form)
    apart.shape, apart.type = codes.shape, codes.type
    codes.shape = None
    for user, index in users:
        user.replace_input_with(index, apart)


def _a_phase(vector: np.ndarray, form: Form) -> np.ndarray:
    """Repeat the values of a group's outputs for each phase."""
    grouped = vector.reshape(-1, 1, form.outputs)
    return np.broadcast_to(grouped, (form.groups, form.phases, form.outputs)).reshape(-1).astype(vector.dtype)


def _weight(graph: ir.Graph, node: ir.Node, form: Form) -> ir.Value:
    """(inputs, outputs of a group, *kernel) → (groups·phases·outputs, inputs of a group, *taps), turned round, integers until the end."""
    source = node.inputs[1].producer()  # type: ignore[union-attr]
    assert source is not None
    codes, scale = source.inputs[:2]
    n, name = len(form.kernel), f"{node.outputs[0].name}_weight"
    filling = [k * s - old for k, s, old in zip(form.taps, form.stride, form.kernel)]
    apart = [form.groups, form.inputs // form.groups, form.outputs, *(v for pair in zip(form.taps, form.stride) for v in pair)]
    taps, phases = range(3, 3 + 2 * n, 2), range(4, 4 + 2 * n, 2)
    backwards = [constant(graph, f"{name}_{key}", np.array(v, np.int64)) for key, v in _backwards(list(taps)).items()]
    steps: list[tuple[str, list[ir.Value], list[ir.Attr]]] = []
    if any(filling):
        steps.append(("Pad", [constant(graph, f"{name}_pads", np.array([0] * (n + 2) + [0, 0] + filling, np.int64))], []))
    steps += [
        ("Reshape", [constant(graph, f"{name}_apart", np.array(apart, np.int64))], []),
        ("Slice", backwards, []),
        ("Transpose", [], [ir.AttrInt64s("perm", [0, *phases, 2, 1, *taps])]),
        (
            "Reshape",
            [constant(graph, f"{name}_shape", np.array([-1, form.inputs // form.groups, *form.taps], np.int64))],
            [],
        ),
    ]
    assert codes is not None
    assert scale is not None
    value = _chain(graph, node, codes, steps, name)
    wide = scale.const_value.numpy()  # type: ignore[union-attr]
    attributes = [ir.AttrInt64("axis", 0)] if wide.size > 1 else []
    steps_of = constant(graph, f"{name}_scales", _a_phase(wide, form) if wide.size > 1 else wide)
    last = _node(graph, node, "DequantizeLinear", [value, steps_of], attributes, f"{name}_float")
    last.dtype = ir.DataType.FLOAT
    return last


def _backwards(axes: list[int]) -> dict[str, list[int]]:
    n = len(axes)
    return {"starts": [-1] * n, "ends": [-(2**31)] * n, "axes": axes, "steps": [-1] * n}


def _beside(graph: ir.Graph, rounded: ir.Node, codes: ir.Value, form: Form) -> ir.Value:
    """Put the phases side by side: (N, groups·phases·outputs, *q) → (N, groups·outputs, *s·q), cropped."""
    n, name, g = len(form.kernel), str(codes.name), form.groups
    pads = form.pads()
    small = [size + b + a - r for size, b, a, r in zip(form.size, pads[:n], pads[n:], form.reach)]
    places, phases = range(1, n + 1), range(n + 2, 2 * n + 2)
    interleaved = [axis for pair in zip(places, phases) for axis in pair]
    large = [q * s for q, s in zip(small, form.stride)]
    starts = [b % s for b, s in zip(form.before, form.stride)]
    ends = [b + m for b, m in zip(starts, form.result())]
    apart = [0, *small, g, *form.stride, form.outputs]
    steps: list[tuple[str, list[ir.Value], list[ir.Attr]]] = [
        ("Transpose", [], [ir.AttrInt64s("perm", [0, *range(2, n + 2), 1])]),
        ("Reshape", [constant(graph, f"{name}_apart", np.array(apart, np.int64))], []),
        ("Transpose", [], [ir.AttrInt64s("perm", [0, *interleaved, n + 1, 2 * n + 2])]),
        ("Reshape", [constant(graph, f"{name}_large", np.array([0, *large, g * form.outputs], np.int64))], []),
    ]
    if any(starts) or ends != large:
        bounds = {"starts": starts, "ends": ends, "axes": list(places)}
        steps.append(("Slice", [constant(graph, f"{name}_{k}", np.array(v, np.int64)) for k, v in bounds.items()], []))
    steps.append(("Transpose", [], [ir.AttrInt64s("perm", [0, n + 1, *places])]))
    return _chain(graph, rounded, codes, steps, name)  # sorted afterwards


def _chain(
    graph: ir.Graph, before: ir.Node, value: ir.Value, steps: list[tuple[str, list[ir.Value], list[ir.Attr]]], name: str
) -> ir.Value:
    """Insert one node after another and return what the last gives."""
    dtype = value.dtype
    for i, (kind, operands, attributes) in enumerate(steps):
        value = _node(graph, before, kind, [value, *operands], attributes, f"{name}_{i}")
        value.dtype = dtype  # type: ignore[assignment]
    return value


def _node(
    graph: ir.Graph, before: ir.Node, kind: str, operands: list[ir.Value], attributes: list[ir.Attr], name: str
) -> ir.Value:
    node = ir.Node("", kind, operands, attributes)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return [int(v) for v in node.attributes[name].as_ints()] if name in node.attributes else default
