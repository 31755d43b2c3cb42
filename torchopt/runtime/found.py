"""The layers of a file with the weight that names each: also those whose weight is computed, from constants or at each inference.

A standardized convolution computes its weight from a tensor by a mean, a difference and a quotient: the runtime does that at load, and it
is a layer as any other. A convolution whose weight comes from the input is one too, without a weight in the file.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import onnx_ir as ir

from torchopt.onnx_file.view import BOTH, REWRITES, STANDARD, Constant, View, weight_inputs

FORMS = REWRITES | {"Concat", "Split"}
ALWAYS = {"Conv", "ConvTranspose", "DeformConv"}  # layers whatever their weight is; a product of two activations is none


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """A layer and one of its weights.

    Attributes:
        name: the weight's name, with its scope; the node's where there is none.
        node: the layer.
        weight: the constant; None where each inference computes it.
        between: the types of the nodes between the constant and the layer.
    """

    name: str
    node: ir.Node
    weight: Constant | None
    between: frozenset[str] = frozenset()

    @property
    def decoded(self) -> bool:
        """Whether integers are cast and scaled before the layer reads them."""
        dtype = self.weight.dtype if self.weight is not None else None
        return dtype is not None and dtype.is_integer() and {"Cast", "Mul"} <= self.between

    @property
    def computed(self) -> bool:
        """Whether more than the weight's form is changed before the layer reads it."""
        return not self.between <= (FORMS | {"Mul"} if self.decoded else FORMS)


def layers(view: View) -> list[Found]:
    """Return the layers in the file's order, one for each weight."""
    plain = {id(layer.node): layer.weights for layer in view.layers}
    constants = {id(constant.value): constant for constant in view.constants}
    fixed = _fixed(view)
    found = []
    for scope, node in view.nodes:
        places = [i for i in weight_inputs(node) if i < len(node.inputs) and id(node.inputs[i]) in fixed]
        ways = (way for i in places if (way := _way(node, i, constants)) is not None)
        known = list(ways if node.op_type in BOTH else itertools.islice(ways, 1))
        if id(node) in plain:  # in a function, where the way ends at a parameter, too
            between = {id(way.weight): way.between for way in known}
            found += [Found(name=_name(w), node=node, weight=w, between=between.get(id(w), frozenset())) for w in plain[id(node)]]
            known = [way for way in known if all(way.weight is not w for w in plain[id(node)])] if node.op_type in BOTH else []
        found += known
        if not known and id(node) not in plain and node.op_type in ALWAYS and node.domain in STANDARD:
            name = node.name or str(node.outputs[0].name)
            found.append(Found(name=f"{scope.name}/{name}" if scope.name else name, node=node, weight=None))
    return found


def _name(weight: Constant) -> str:
    return f"{weight.scope.name}/{weight.name}" if weight.scope.name else weight.name


def _fixed(view: View) -> set[int]:
    """The identities of all values that constants alone decide; nodes come after what they read."""
    fixed = {id(constant.value) for constant in view.constants if not constant.replaceable}
    for _, node in view.nodes:
        alone = node.inputs and not any(_is_graph(attribute) for attribute in node.attributes.values())
        if alone and all(value is None or id(value) in fixed for value in node.inputs):
            fixed |= {id(value) for value in node.outputs}
    return fixed


def _way(node: ir.Node, index: int, constants: dict[int, Constant]) -> Found | None:
    """The largest constant that an input is computed from."""
    waiting, seen, between, sources = [node.inputs[index]], set[int](), set[str](), []
    for value in waiting:  # it grows
        if value is None or id(value) in seen:
            continue
        seen.add(id(value))
        producer, constant = value.producer(), constants.get(id(value))
        if constant is not None:
            sources.append(constant)
        elif producer is not None:
            between.add(producer.op_type)
            waiting += producer.inputs
    weight = max(sources, key=lambda constant: constant.stored_bytes, default=None)
    if weight is None:
        return None
    return Found(name=_name(weight), node=node, weight=weight, between=frozenset(between))


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
