"""What a packed file remembers of its dense form beside the numbers, so that unpacking gives it back as it was.

A tensor's own documentation and metadata go to the call that decodes it, and so do name, documentation and metadata of a Constant node,
in whose place the call stands. Of initializers the order is kept, as one entry of the graph's metadata. Nothing is written where there
is nothing to remember, and a file without these entries is unpacked too: its tensors become initializers, the last ones.
"""

from __future__ import annotations

import onnx_ir as ir

from torchopt.onnx_file.view import Constant

OURS = "torchopt."  # before the key of everything here
NODE, NAME, DOC, OF_TENSOR = f"{OURS}node", f"{OURS}name", f"{OURS}doc", f"{OURS}tensor."
ORDER, VERSION, ADDED = f"{OURS}order", f"{OURS}ir_version", f"{OURS}opset"


def remember(call: ir.Node, constant: Constant) -> None:
    """Write on the call that decodes a constant what unpacking needs to restore it."""
    tensor, node, more = constant.tensor, constant.value.producer(), call.metadata_props
    assert tensor is not None
    if tensor.doc_string:
        more[DOC] = tensor.doc_string
    more.update({f"{OF_TENSOR}{key}": value for key, value in tensor.metadata_props.items()})
    if constant.origin == "constant" and node is not None:
        more[NODE] = "Constant"
        if tensor.name:
            more[NAME] = tensor.name
        call.name, call.doc_string = node.name, node.doc_string
        more.update(node.metadata_props)
    output, value = call.outputs[0], constant.value
    output.doc_string, output.shape, output.type = value.doc_string, value.shape, value.type
    output.metadata_props.update(value.metadata_props)


def remember_order(graph: ir.Graph, before: list[str], calls: list[ir.Node]) -> None:
    """Write down where in a graph's list of initializers those stood that calls now decode.

    Args:
        graph: the graph.
        before: the names of its initializers as they were.
        calls: those that decode former initializers, in the order of the graph's nodes.
    """
    places = {name: place for place, name in enumerate(before)}
    if graph.metadata_props.pop(ORDER, None) is None and calls:  # of a file that was packed in part, no order is known
        graph.metadata_props[ORDER] = " ".join(str(places[str(call.outputs[0].name)]) for call in calls)


def recalled(call: ir.Node, dense: ir.LazyTensor) -> ir.Node | None:
    """Give a decoded tensor its documentation and metadata back; return the Constant node that it stood in, or None."""
    more = call.metadata_props
    dense.doc_string = more.get(DOC)
    dense.metadata_props.update({k.removeprefix(OF_TENSOR): v for k, v in more.items() if k.startswith(OF_TENSOR)})
    if NODE not in more:
        return None
    dense.name = more.get(NAME, "")
    node = ir.Node("", "Constant", [], [ir.AttrTensor("value", dense)], name=call.name)
    node.doc_string = call.doc_string
    node.metadata_props.update({k: v for k, v in more.items() if not k.startswith(OURS)})
    return node


def ordered(graph: ir.Graph, restored: list[ir.Value]) -> None:
    """Put the restored initializers of a graph back among the others, each at its place if that was written down."""
    places = [int(place) for place in graph.metadata_props.pop(ORDER, "").split() if place.isdecimal()]
    values = [value for value in graph.initializers.values() if not any(value is r for r in restored)]
    if len(places) == len(restored):
        for place, value in sorted(zip(places, restored, strict=True), key=lambda pair: pair[0]):
            values.insert(place, value)
    else:
        values += restored
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)
