"""A graph as the bytes of one ONNX file."""

from __future__ import annotations

import onnx_ir as ir

from torchopt.errors import ModelError

LIMIT = 2**31 - 1  # bytes of one message of protocol buffers


def serialized(model: ir.Model, where: str, *, shapes: bool = True) -> bytes:
    """Return the bytes of the file, with all tensors in it.

    Args:
        model: the graph.
        where: what the error names.
        shapes: write the shapes of the values between nodes, as far as they are known.

    Raises:
        ModelError: they are more than protobuf's 2 GB.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > LIMIT:
        raise ModelError(f"{where}: its weights take {size / 1e9:.2f} GB, and one ONNX file holds 2 GB at most; split the model")
    try:
        proto = ir.to_proto(model)
        stored = {tensor.name for tensor in proto.graph.initializer}  # whose types and shapes onnx-ir writes a second time
        kept = [info for info in proto.graph.value_info if shapes and info.name not in stored]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
        return bytes(proto.SerializeToString())
    except Exception as error:  # google.protobuf.message.EncodeError or a ValueError, by version
        raise ModelError(f"{where}: cannot be written as one ONNX file: {str(error)[:200]}") from error
