"""What to call a value of the graph in an error: the user knows the layers, not the quantizers between them."""

from __future__ import annotations

from torch import fx, nn


def name_of_value(model: nn.Module, quantizer: str) -> str:
    """Return what a quantizer rounds, in the user's terms.

    Args:
        model: what `attach` returned.
        quantizer: its path in the model.

    Example:
        >>> from torchopt import Quantize, Rule, prepare
        >>> import torch
        >>> ready = prepare(nn.Sequential(nn.Linear(2, 2)), [Rule("*", quantize=Quantize())], (torch.zeros(1, 2),))
        >>> name_of_value(ready, "quantizer_0")
        "the input 'input' (quantizer_0)"
    """
    called = model.graph.find_nodes(op="call_module", target=quantizer) if isinstance(model, fx.GraphModule) else ()
    source = called[0].args[0] if called else None
    if not isinstance(source, fx.Node):
        owner, _, end = quantizer.rpartition(".")
        return f"the {end} of {owner}" if owner and end in ("input", "output") else quantizer
    if source.op == "placeholder":
        return f"the input {str(source.target)!r} ({quantizer})"
    what = f"the output of {source.target}" if source.op == "call_module" else f"the result of {source.name}"
    return f"{what} ({quantizer})"
