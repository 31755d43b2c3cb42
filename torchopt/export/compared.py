"""What `export` wrote, run once before it gets its name, and compared with the model that it was given: all outputs, to the rounding.

1. outputs equal to 1e-4 of their scale   → proven, integers too: evaluation in torch rounds as the kernels do
2. a float file further apart             → an error that names the first layer that differs, unless the network itself moves that far
                                             when its numbers move by a millionth
3. an integer file further apart          → compared rounding by rounding (`rounding_by_rounding.py`), each from the same
                                             integers; an error names the first that is off by more than 1 step in 0.1 % of its values,
                                             or by any number in 1 %
4. an integer file that is right there, and gives other outputs when nobody looks at its roundings
                                          → an error that names the first rounding that ONNX Runtime merges into another
5. none of these                          → proven: what is left is the rounding of floats between the integers

Where this machine does not run the target's kernels as the target does, differences of integers are a warning with the figures.
The network is run in a copy and the random state is put back, so that nothing of the caller's moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from torchopt.errors import FileError, ModelError
from torchopt.export.call import Call
from torchopt.export.difference import CLOSE, all_close, apart, close, figures, scale_of
from torchopt.export.first_difference import differences
from torchopt.export.other_sizes import at_other_sizes
from torchopt.export.rounding_by_rounding import File, Forced, Step, disturbed
from torchopt.network.proof import undisturbed
from torchopt.quantize.layers.dynamic import DynamicLinear
from torchopt.quantize.layers.rounding import FixedQuantize

IN_BLOCKS = 0.05  # the same where ONNX Runtime rounds the input of products in blocks to 8 bits (`passes/block_weights.py`)
BEYOND, SHARE = 1.0, 1e-3  # steps, and the share of values that may be further apart
FLIPS = 1e-2  # the share of values that may be on the other side of half a step: what floats in between leave, measured, is 1e-3
FEW = 2  # values that may be so in a tensor of any size
NOISE = 1e-6  # relative: some float32 roundings
SENSITIVE = 10.0  # times what the network moves under that noise is no fault of the file


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is needed to compare a file with its model.

    Attributes:
        model: the model as it was exported: a copy, in evaluation mode, on the CPU.
        name: of the model's class.
        dense: the bytes of the file before packing.
        roundings: where activations are rounded in it.
        exact: this machine computes what the target does.
        close: how far outputs may be apart, as a fraction of their scale.
    """

    model: nn.Module
    name: str
    dense: bytes
    roundings: Mapping[str, list[list[str]]]
    exact: bool
    close: float = CLOSE

    def __call__(self, opened: onnxruntime.InferenceSession, call: Call, example_inputs: tuple[Any, ...]) -> None:
        """Compare on the example inputs, on another batch size where that may vary, and on other sizes of other free dimensions.

        Args:
            opened: the file.
            call: which dimensions are free.
            example_inputs: of one call of the model, as the file takes them.

        Raises:
            ModelError: the file computes something else, or does not run.
        """
        with undisturbed(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model's own code
            found = _compared(self, opened, example_inputs)
            batch = any(0 in free for free in call.free) and found is None
            other = _of_another_size(self.model, example_inputs) if batch else None
            if other is not None:
                found = _compared(self, opened, other)
            for sizes in at_other_sizes(self.model, call, example_inputs):
                found = found or _compared(self, opened, sizes)
        if found is None:
            return
        if found.certain:
            raise ModelError(f"export: {found.sentence}; {found.remedy}")
        warnings.warn(f"export: {found.sentence}; {found.remedy}", stacklevel=4)


@dataclass(frozen=True)
class Found:
    """A difference in words; one that is not certain is only warned of."""

    sentence: str
    remedy: str
    certain: bool = True


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _of_another_size(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The same inputs as two samples, or as three where they are two, floats moved by one place; None where the network takes no such."""
    sizes = {len(x) for x in _tensors(example_inputs) if x.dim()}
    if len(sizes) != 1 or not (size := sizes.pop()):
        return None
    count = 3 if size == 2 else 2

    def resized(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dim():
            return x
        moved = x.roll(1, -1) if x.is_floating_point() and x.dim() > 1 and bool(torch.isfinite(x).all()) else x
        return torch.cat([x, moved])[:count] if size > 1 else torch.cat([x, moved])

    inputs = tree_map(resized, example_inputs)
    try:
        _outputs(model, inputs)
    except Exception:  # whatever the model's code raises: inputs that have no batch in front
        return None
    return inputs  # type: ignore[no-any-return]


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Sequence[Any]) -> list[np.ndarray]:
    return [y.detach().cpu().numpy() for y in _tensors(model(*inputs))]


def _compared(proof: Proof, opened: onnxruntime.InferenceSession, inputs: tuple[Any, ...]) -> Found | None:
    """What differs, or None."""
    try:
        ours = _outputs(proof.model, inputs)
    except Exception as error:  # whatever the model's code raises
        return Found(
            f"{proof.name} could be exported, but does not take the example inputs ({type(error).__name__}: {str(error)[:200]}), so the "
            "file cannot be compared with it",
            "give the inputs of one call in evaluation mode",
        )
    fed = {spec.name: x.detach().numpy() for spec, x in zip(opened.get_inputs(), _tensors(inputs), strict=False)}
    shapes = ", ".join(str(list(x.shape)) for x in fed.values())
    try:
        theirs = list(map(np.asarray, opened.run(None, fed)))
    except Exception as error:  # the runtime's exceptions share no class
        reason = str(error).strip().splitlines()[0][:300]
        return Found(f"ONNX Runtime does not run the file on inputs of {shapes}: {reason}", FIXED)
    wrong = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a.shape != b.shape), None)
    if len(ours) != len(theirs):
        return Found(f"the file gives {len(theirs)} outputs, {proof.name} {len(ours)}", "return tensors alone, each once")
    if wrong is not None:
        return Found(
            f"output {wrong} of the file has the shape {list(theirs[wrong].shape)}, that of {proof.name} {list(ours[wrong].shape)}, "
            f"on inputs of {shapes}",
            FIXED,
        )
    if all_close(ours, theirs, proof.close):
        return None
    if not all_close(ours, _outputs(proof.model, inputs)):
        return Found(
            f"{proof.name} draws random numbers in evaluation, so its file cannot be compared with it",
            "compare it yourself, or take the noise as an input",
            certain=False,
        )
    if any(isinstance(module, FixedQuantize | DynamicLinear) for module in proof.model.modules()):
        return _integers(proof, inputs, fed, ours, theirs)
    return _floats(proof, inputs, fed, ours, theirs)


FIXED = "where the network fixes its batch size, export it with dynamic_batch=False"
REMEDY = "leave that layer out of the rules, or write what follows it by other operators, and tell us"


def _floats(
    proof: Proof, inputs: tuple[Any, ...], fed: Mapping[str, np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]
) -> Found | None:
    """A float file that is further apart than float sums are."""
    moved = _under_noise(proof.model, inputs)
    far = [(i, apart(a, b).max()) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not close(a, b, proof.close)]
    far = [(i, d) for i, d in far if d > SENSITIVE * max(float(apart(ours[i], other[i]).max()) for other in moved)]
    if not far:
        return None
    i, distance = far[0]
    return Found(
        f"output {i} of the file is up to {distance:.3g} apart from that of {proof.name}, at a scale of {scale_of(ours[i]):.3g}; "
        f"{_first_layer(proof, inputs, fed)}",
        "write what stands there by other operators, and tell us",
    )


def _first_layer(proof: Proof, inputs: tuple[Any, ...], fed: Mapping[str, np.ndarray]) -> str:
    graph = ir.from_proto(onnx.ModelProto.FromString(proof.dense))
    try:
        layers = differences(proof.model, graph, inputs, {}, lambda opened: fed, "export")
    except FileError:
        layers = []
    first = next((layer.layer for layer in layers if not layer.relative <= CLOSE), None)
    if first is not None:
        return f"the first layer that differs is {first}, by what it computes or by what stands before it"
    return f"no layer differs, so it is what follows {layers[-1].layer}" if layers else "no layer was found by its weight"


@torch.no_grad()
def _under_noise(model: nn.Module, inputs: tuple[Any, ...]) -> list[list[np.ndarray]]:
    """The outputs when inputs and weights move by some roundings, twice."""
    found, noise = [], torch.Generator().manual_seed(0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        try:
            for name, parameter in model.named_parameters():
                parameter.copy_(disturbed(weights[name], noise, NOISE))
            moved = tree_map(lambda x: disturbed(x, noise, NOISE) if isinstance(x, torch.Tensor) else x, inputs)
            found.append(_outputs(model, moved))
        finally:
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    return found


def _integers(
    proof: Proof, inputs: tuple[Any, ...], fed: Mapping[str, np.ndarray], ours: list[np.ndarray], theirs: list[np.ndarray]
) -> Found | None:
    """An integer file that is further apart than float sums are: which of its roundings is not what torch makes of the same integers?"""
    forced = Forced(proof.model, proof.dense, proof.roundings, inputs, fed)
    steps, results = forced.steps()
    missed = forced.missed
    noise = torch.Generator().manual_seed(0)
    wrong = [i for i, step in enumerate(steps) if _is_wrong(step)]
    last = [i for i, (a, b) in enumerate(zip(results, forced.outputs, strict=True)) if not close(a, b)]
    if wrong or last:  # what floats in between make of a millionth is theirs to make
        moved, others = forced.steps(noise, NOISE)
        wrong = [i for i in wrong if _share(steps[i].apart()) > SENSITIVE * _share(_moved(steps[i], moved[i]))]
        last = [i for i in last if apart(results[i], forced.outputs[i]).max() > SENSITIVE * apart(results[i], others[i]).max()]
    if wrong or last:
        place = forced.place(steps[wrong[0]].name) if wrong else f"output {last[0]}, after the last rounding"
        what = f"the first result that differs from the same integers is {place}{_of_step(steps, wrong)}"
    elif _are_merged(forced, theirs):
        place = forced.merged(lambda outputs: not all_close(forced.outputs, outputs))
        what = f"ONNX Runtime merges the rounding of {place} into another, and computes something else"
    else:
        return None
    return Found(
        f"{figures(ours, theirs)}; {what}",
        REMEDY if proof.exact and not missed else "check its accuracy on the device",
        certain=proof.exact and not missed,
    )


def _are_merged(forced: Forced, theirs: list[np.ndarray]) -> bool:
    """Case 4: roundings that are no outputs are computed otherwise; beyond what a millionth does."""
    if all_close(forced.outputs, theirs):
        return False
    noise = torch.Generator().manual_seed(0)
    fed = {name: disturbed(torch.from_numpy(x), noise, NOISE).numpy() for name, x in forced.file.fed.items()}
    moved = File(forced.file.proto.SerializeToString(), forced.file.values, fed).run(forced.file.shown)
    others = [moved[name] for name in forced.file.own]
    return any(
        not close(a, b) and apart(a, b).max() > SENSITIVE * apart(a, c).max()
        for a, b, c in zip(forced.outputs, theirs, others, strict=True)
    )


def _is_wrong(step: Step) -> bool:
    distance = step.apart()
    count = distance.size
    return bool((distance > BEYOND).sum() > SHARE * count) or bool((distance > 0).sum() > max(FLIPS * count, FEW))


def _share(distance: np.ndarray) -> float:
    return float((distance > 0).mean()) if distance.size else 0.0


def _moved(step: Step, other: Step) -> np.ndarray:
    return np.abs(np.rint(step.ours) - np.rint(other.ours))


def _of_step(steps: list[Step], wrong: list[int]) -> str:
    if not wrong:
        return ""
    distance = steps[wrong[0]].apart()
    return f": {_share(distance):.1%} of its values, by up to {distance.max():.0f} steps"
