"""From the prepared model to a plain one: batch norm folded, weights on their grid, ranges fixed, nothing of torch.ao left."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import fx, nn

from torchopt.errors import StateError
from torchopt.network.grid import set_grid
from torchopt.network.surgery import module_of, set_module
from torchopt.quantize.graph.dropout import Regularizer
from torchopt.quantize.graph.fuse import activation_of, ends_of
from torchopt.quantize.graph.naming import name_of_value
from torchopt.quantize.layers.activations import ActivationQuantizer
from torchopt.quantize.layers.bare_weights import LATER, Later, later, snapped, weights_later
from torchopt.quantize.layers.kernels import IntegerKernel, link_kernels
from torchopt.quantize.layers.modules import Fused
from torchopt.quantize.layers.recurrent import QuantizedRecurrent
from torchopt.quantize.layers.rounding import FixedQuantize
from torchopt.quantize.layers.weight_grid import SHARES
from torchopt.state.marks import unmark


def bake(model: nn.Module) -> nn.Module:
    """Return a plain model: ordinary layers whose weights lie on their grids, and `FixedQuantize` between them.

    Args:
        model: what `attach` returned, masks and tables already baked; it is consumed.

    Raises:
        StateError: an activation quantizer has not seen data, or its scale is not that of its range.
    """
    _check_calibrated(model)
    if isinstance(model, fx.GraphModule):
        _bake_activations(model)
    tied = Tied()
    for name, module in list(model.named_modules()):
        if isinstance(module, Fused | QuantizedRecurrent):
            plain = tied.again(module, module.bake())
            if not name:
                return plain
            set_module(model, name, plain)
        elif isinstance(module, ActivationQuantizer):
            set_module(model, name, FixedQuantize.of(module))
        elif (told := later(module)) is not None:
            _snap(module, name, told)
    if not isinstance(model, fx.GraphModule):
        return model
    model.graph.lint()
    model.recompile()
    model.graph._tracer_cls = None  # pickle would trace again by a class that wants to know the network
    quantized = fx.GraphModule(model, model.graph, "Quantized")
    link_kernels(quantized)
    return quantized.train(model.training)


class Tied:
    """Weights that several modules shared before they were baked, and share again."""

    def __init__(self) -> None:
        self.baked: dict[int, nn.Parameter] = {}

    def again(self, module: nn.Module, plain: nn.Module) -> nn.Module:
        """Give `plain` the Parameter of an earlier module that had the same one as `module`, where rounding left them equal."""
        shared, own = module._parameters.get("weight"), plain._parameters.get("weight")
        if shared is not None and own is not None:
            first = self.baked.setdefault(id(shared), own)
            if torch.equal(first, own):
                plain._parameters["weight"] = first
        return plain


def _check_calibrated(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Fused | QuantizedRecurrent):
            _check_precision(name, module)
        if not isinstance(module, ActivationQuantizer):
            continue
        low, high, scale = float(module.min_val), float(module.max_val), float(module.scale.detach())
        if math.isnan(low) or math.isnan(high) or not math.isfinite(scale) or not module.agrees:
            raise StateError(
                f"finalize: {name_of_value(model, name)} has the range [{low:.4g}, {high:.4g}] and the scale {scale:.4g}, which do not "
                "belong together; something has written over one of them: load the last good state, or calibrate again"
            )
        if not module.calibrated:
            raise StateError(
                f"finalize: {name_of_value(model, name)} has not seen any data, so no range is known; train the prepared model, or call "
                "torchopt.calibrate(model, batches) first"
            )
        module.settle()


def _check_precision(name: str, layer: nn.Module) -> None:
    other = next((p.dtype for p in layer.parameters(recurse=False) if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise StateError(
            f"finalize: {name} holds {other}: the prepared model was converted, and integer grids are float32; call model.float() first, "
            "and train under torch.autocast where half precision is wanted"
        )


def _bake_activations(model: fx.GraphModule) -> None:
    """Write the fused activations into the graph again, and drop those that the following rounding repeats."""
    for node in list(model.graph.nodes):
        module = module_of(model, node)
        if isinstance(module, Fused) and module.act is not None:
            if not _covered(model, node, module.act):
                with model.graph.inserting_after(node):  # functions: the network that a file is loaded into has no such module
                    ends = ends_of(module.act)
                    function = (torch.relu, (node,)) if ends == (0.0, float("inf")) else (F.hardtanh, (node, *ends))
                    applied = model.graph.call_function(*function)
                node.replace_all_uses_with(applied, delete_user_cb=lambda user, applied=applied: user is not applied)
        elif isinstance(module, Regularizer) or (
            (activation := activation_of(model, node)) is not None and _covered(model, node, activation)
        ):
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def _covered(model: fx.GraphModule, node: fx.Node, activation: nn.Module) -> bool:
    """True where every reader of a ReLU-like value rounds it to a grid that saturates by the activation's ends."""
    users = [module_of(model, u) for u in node.users]
    readers = [user for user in users if not isinstance(user, IntegerKernel)]
    return bool(readers) and all(isinstance(r, ActivationQuantizer) and _saturates(r, *ends_of(activation)) for r in readers)


def _saturates(quantizer: ActivationQuantizer, low: float, high: float) -> bool:
    """True where all from `high` up rounds to the largest integer, and all from `low` down to the smallest."""
    grid = FixedQuantize.of(quantizer)
    return grid.codes(low) == grid.qmin and grid.codes(high) == grid.qmax


@torch.no_grad()
def _snap(module: nn.Module, name: str, told: Later) -> None:
    """Round the weights of a module that no quantized layer stands for (recurrent cells, attention, custom ones)."""
    for weight in weights_later(module):
        value = weight.trainable
        if told.config.mode == "float16":
            rounded = value.half().float()
            if bool(rounded.isinf().any()):
                path = f"{name}.{weight.param}" if name else weight.param
                raise StateError(
                    f"finalize: {path} holds {float(value.abs().max()):.6g} after training, and float16 ends at 65504; leave it out of "
                    "mode='float16', or train with less of a learning rate"
                )
            value.copy_(rounded)
            continue
        on_grid, scale, axis = snapped(module, weight, value)
        value.copy_(on_grid)
        set_grid(module, weight.param, scale, told.bits, axis)
    unmark(module, LATER)
    unmark(module, SHARES)
