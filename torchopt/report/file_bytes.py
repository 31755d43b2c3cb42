"""What the bytes of an ONNX file are: the weights' codes, tables and places, scales and biases, decoders, nodes, names.

Every byte is counted once. In a packed file the parts of the calls that decode are told apart by the place in which a call reads them;
other tensors are what their readers take them for: scales and zero points of (de)quantization, biases, weights.
"""

from __future__ import annotations

import os
from collections import Counter

import onnx

from torchopt.codecs.encoding import DOMAIN
from torchopt.errors import FileError

PARTS = ("codes", "places", "tables", "dense weights", "scales", "biases", "decoders", "calls", "nodes", "names", "headers")


def file_bytes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Return how many bytes of a file are what; they add up to its size. Tensors in a second file are not counted.

    "decoders" are functions of ours, "calls" the nodes that call them, "names" those of all nodes, values and tensors, "headers" whatever
    else the format needs.

    Raises:
        FileError: the file is missing or no ONNX file.

    Example:
        >>> import tempfile, torch, torchopt
        >>> target = tempfile.mkdtemp() + "/m.onnx"
        >>> result = torchopt.export(torch.nn.Linear(64, 64), (torch.zeros(1, 64),), target)
        >>> found = file_bytes(target)
        >>> sum(found.values()) == result.size_bytes, found["dense weights"], found["biases"]
        (True, 16384, 256)
    """
    try:
        model = onnx.load_model(os.fspath(path), load_external_data=False)
        size = os.path.getsize(path)
    except Exception as error:  # protobuf's and the system's
        raise FileError(f"{path}: is no whole ONNX file ({str(error)[:200]})") from error
    found = Counter(dict.fromkeys(PARTS, 0))
    kinds = _kinds(model.graph)
    for tensor in model.graph.initializer:
        data = len(tensor.raw_data) or max(
            0, tensor.ByteSize() - onnx.TensorProto(dims=tensor.dims, name=tensor.name).ByteSize() - 4
        )
        found[kinds.get(tensor.name, "dense weights")] += data
        found["names"] += len(tensor.name)
        found["headers"] -= len(tensor.name) + data
        found["headers"] += tensor.ByteSize()
    for node in model.graph.node:
        names = sum(len(n) for n in (*node.input, *node.output, node.name))
        found["names"] += names
        found["calls" if node.domain == DOMAIN else "nodes"] += node.ByteSize() - names
    found["decoders"] += sum(f.ByteSize() for f in model.functions if f.domain == DOMAIN)
    found["headers"] += size - sum(found.values())
    return dict(found)


def _kinds(graph: onnx.GraphProto) -> dict[str, str]:
    """What each initializer is, by name; what is in several places is what the last one says."""
    kinds: dict[str, str] = {}
    codes = {name for node in graph.node if node.domain == DOMAIN for name in node.output}
    for node in graph.node:
        if node.domain == DOMAIN:
            joined = any(name in codes for name in node.input)
            streams = [name for name in node.input if name not in codes]
            for place, name in enumerate(streams):
                last = place == len(streams) - 1 and not node.op_type.startswith("H")
                sparse = place > 0 or (node.op_type.startswith("H") and "g" in node.op_type and place < 4)
                kinds[name] = "tables" if last or joined else "places" if sparse and not _all_codes(node, place) else "codes"
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            kinds.update(dict.fromkeys([name for name in node.input[1:] if name], "scales"))
        elif node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            kinds[node.input[2]] = "biases"
        elif node.op_type == "Add":
            kinds.update(dict.fromkeys(node.input, "biases"))
    return kinds


def _all_codes(node: onnx.NodeProto, place: int) -> bool:
    """Whether a stream of a Huffman call is of codes: four tensors of the places come first, where there are any."""
    return node.op_type.startswith("H") and ("g" not in node.op_type or place >= 4)
