"""What does something in training alone, and dropout called as a function: both follow the mode of the traced network, as in the code.

A graph holds what `self.training` was when it was traced. So networks are traced in evaluation mode, whose branches are those that are
deployed, and a function that regularizes by `training=` and found it off becomes a module, which training turns on. One that is on in
evaluation too (Monte-Carlo dropout) is meant so, and stays.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

REGULARIZES = "training"  # what the forward of a module without weights asks for when it does something in training alone
MODULES: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


class Regularizer(nn.Module):
    """Dropout that the code calls as a function; the identity in evaluation, and no part of a finalized model."""

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Any) -> Any:
        """Drop at random in training; x as the dropout takes it."""
        return self.dropout(x) if self.training else x


def regularizes(module: nn.Module) -> bool:
    """True for a module without weights and parts whose forward asks whether it trains: the identity in evaluation.

    Example:
        >>> from torchvision.ops import StochasticDepth
        >>> regularizes(StochasticDepth(0.1, "row")), regularizes(nn.ReLU())
        (True, False)
    """
    bare = not module._parameters and not module._buffers and not module._modules
    code = getattr(type(module).forward, "__code__", None)
    return bare and code is not None and REGULARIZES in code.co_names


def as_modules(traced: fx.GraphModule) -> None:
    """Turn the dropout functions of a graph that was traced in evaluation mode into modules, in place."""
    for node in list(traced.graph.nodes):
        cls = MODULES.get(node.target) if node.op == "call_function" else None
        _, p, training = (*node.args, *(0.5, True)[len(node.args) - 1 :])[:3] if cls else (None, 0.5, True)
        if cls is None or node.kwargs.get("training", training) is not False:
            continue
        name = f"regularizer_{node.name}"
        traced.add_module(name, Regularizer(cls(node.kwargs.get("p", p))))
        with traced.graph.inserting_before(node):
            module = traced.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
        module.meta.update(node.meta)
        node.replace_all_uses_with(module)
        traced.graph.erase_node(node)
    traced.recompile()
