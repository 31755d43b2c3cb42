"""Two networks that must be one function: run on the same data from the same random state, and compared.

    max |y − y'|  ≤  1e-4 · max |y|        for each output; after a call in training mode, for each buffer too (running statistics)

Every rewriting of a network (tracing, fusing, scaling, removing channels) is proved so while the user's program runs, on the user's data.
Two orders of the same sums differ in the last bits, and a batch norm over two samples can make much of that. So where more than this
differs, the first network is run again with its weights changed by a millionth: what moves its own outputs as far is no fault.
Random state, buffers and modes are left as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from torchopt.errors import ModelError
from torchopt.network.surgery import evaluating
from torchopt.process.random_state import random_state_kept

Call = tuple[tuple[Any, ...], dict[str, Any]]
Under = Callable[[nn.Module], AbstractContextManager[None]]  # what a network is put into while it runs, such as rounding off

TOLERANCE = 1e-4  # of the output's scale
MILLIONTH = 1e-6  # by which weights are changed, to see how much of a difference is rounding
CHAOS = 0.3  # an output that a millionth moves by more proves nothing
FLIPPED = 1e-3  # of the entries of an integer output: ties fall to either side


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a call gave: its tensors and other values, and the buffers after it."""

    outputs: list[Any]
    buffers: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two networks differ: by which fraction of the output's scale, or by an error of the second one."""

    amount: float
    what: str

    def __str__(self) -> str:
        return self.what


@contextlib.contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Put back random states (torch's, NumPy's, Python's), buffers, and the mode of every module at the end.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with undisturbed(norm):
        ...     _ = norm.train()(torch.rand(4, 1))
        >>> norm.num_batches_tracked
        tensor(0)
    """
    buffers = {id(b): (b, b.detach().clone()) for model in models for b in model.buffers()}
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(random_state_kept(seed=0))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers.values():
                    if not _identical(buffer, before):
                        buffer.copy_(before)


def as_it_is(model: nn.Module) -> AbstractContextManager[None]:
    """Run a network in nothing."""
    return contextlib.nullcontext()


def run(model: nn.Module, call: Call, *, training: bool = False, under: Under = as_it_is) -> Run:
    """Call a network in one of its modes, from a given random state, and leave it as it was.

    Args:
        model: the network.
        call: its arguments, which are not changed either.
        training: the mode.
        under: what it runs in.

    Example:
        >>> layer = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
        >>> first = run(layer, ((torch.ones(8, 2),), {}), training=True)
        >>> difference(first, run(layer, ((torch.ones(8, 2),), {}), training=True))
        0.0
    """
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, call)
    with undisturbed(model), torch.no_grad():
        model.train(training)
        with under(model):
            outputs = list(flat(model(*args, **kwargs)))
        outputs = [y.clone() if isinstance(y, torch.Tensor) else y for y in outputs]
        return Run(outputs=outputs, buffers={name: b.detach().clone() for name, b in model.named_buffers()} if training else {})


def difference(one: Run, other: Run) -> float:
    """Return by which fraction of its scale the worst output of `other` differs from that of `one`; infinity where the shapes differ.

    Buffers count that both have, and nothing that is equal, NaN and infinity included.
    """
    if len(one.outputs) != len(other.outputs):
        return float("inf")
    pairs = list(zip(one.outputs, other.outputs, strict=True))
    pairs += [(value, other.buffers[name]) for name, value in one.buffers.items() if name in other.buffers]
    return max((_apart(a, b) for a, b in pairs), default=0.0)


def run_or_none(model: nn.Module, call: Call, *, training: bool = False, under: Under = as_it_is) -> Run | None:
    """Return what `run` does; None where the network does not take the call."""
    try:
        return run(model, call, training=training, under=under)
    except Exception:  # whatever the user's own code raises
        return None


def differs(
    one: nn.Module,
    other: nn.Module,
    call: Call,
    *,
    training: bool = False,
    both: Under = as_it_is,
    under: Under = as_it_is,
    wanted: Run | None = None,
) -> Difference | None:
    """Return how `other` differs from `one` on a call, or None where it does not, or where `one` does not take the call.

    Args:
        one: the network that is right.
        other: what was made of it.
        call: the arguments of both.
        training: the mode of both.
        both: what both run in.
        under: what `other` runs in beside.
        wanted: what `one` gave for this call in this mode; run here where it is None.

    Example:
        >>> a, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
        >>> b = nn.Linear(2, 2)
        >>> b.weight = a.weight
        >>> differs(a, b, ((x,), {})) is None, differs(a, a, ((x,), {})) is None
        (False, True)
    """
    wanted = run_or_none(one, call, training=training, under=both) if wanted is None else wanted
    if wanted is None:  # there is nothing to compare with
        return None
    try:
        given = run(other, call, training=training, under=_nested(both, under))
    except Exception as error:  # the rewritten network fails where the user's does not
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return Difference(amount=float("inf"), what=f"it fails: {reason:.200}")
    amount = difference(wanted, given)
    if amount <= TOLERANCE:
        return None
    moved = _moved(one, call, wanted, training=training, under=both)
    if amount <= moved <= CHAOS:
        return None
    if len(wanted.outputs) != len(given.outputs):
        return Difference(amount=amount, what=f"it gives {len(given.outputs)} values instead of {len(wanted.outputs)}")
    of_shape = (
        "its outputs have other shapes" if amount == float("inf") else f"its outputs differ by {_percent(amount)} of their scale"
    )
    return Difference(amount=amount, what=of_shape)


def first_difference(
    one: nn.Module, other: nn.Module, call: Call, *, training: bool = False, both: Under = as_it_is, under: Under = as_it_is
) -> str:
    """Return the path of the first module that both networks call, and that `other` gives other inputs; empty where there is none."""
    seen = [_inputs(one, call, training, both), _inputs(other, call, training, _nested(both, under))]
    for path, wanted in seen[0].items():
        if path and path in seen[1] and difference(*(Run(outputs=v, buffers={}) for v in (wanted, seen[1][path]))) > TOLERANCE:
            return path
    return ""


def flat(value: Any) -> Iterator[Any]:
    """Yield the tensors and other values of what a network returns: tuples, dicts, dataclasses."""
    if isinstance(value, Mapping):
        for one in value.values():
            yield from flat(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from flat(one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from flat(getattr(value, field.name))
    else:
        yield value


def _inputs(model: nn.Module, call: Call, training: bool, under: Under) -> dict[str, list[Any]]:
    """What each module is given at its first call, in the order of the calls."""
    found: dict[str, list[Any]] = {}
    handles = []
    for path, module in model.named_modules():

        def note(_: nn.Module, args: Any, path: str = path) -> None:
            found.setdefault(path, [x.clone() if isinstance(x, torch.Tensor) else x for x in flat(args)])

        handles.append(module.register_forward_pre_hook(note))
    try:
        with contextlib.suppress(Exception):  # what was called up to an error is known
            run(model, call, training=training, under=under)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _nested(outer: Under, inner: Under) -> Under:
    @contextlib.contextmanager
    def nested(model: nn.Module) -> Iterator[None]:
        with outer(model), inner(model):
            yield

    return nested


def _moved(model: nn.Module, call: Call, before: Run, *, training: bool, under: Under) -> float:
    """How far the outputs of a network go when its weights are changed by a millionth."""
    generator = torch.Generator().manual_seed(1)

    def other(p: torch.Tensor) -> torch.Tensor:
        return p.detach() * (1 + MILLIONTH * torch.randn(p.shape, generator=generator).to(p))

    changed = {n: other(p) if p.is_floating_point() else p for n, p in model.named_parameters()}
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, call)
    with undisturbed(model), torch.no_grad():
        model.train(training)
        try:
            with under(model):
                outputs = list(flat(torch.func.functional_call(model, changed, args, kwargs)))
        except (RuntimeError, ValueError, TypeError, ModelError):
            return 0.0
        return difference(before, Run(outputs=outputs, buffers={name: b.detach() for name, b in model.named_buffers()}))


def _apart(one: Any, other: Any) -> float:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return 0.0 if _equal(one, other) else float("inf")
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0:
        return 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    if not (one.is_floating_point() or one.is_complex()):
        wrong = 1 - float(same.float().mean())
        return wrong if wrong > FLIPPED else 0.0
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, 0.0, (one - other).abs().double())
    scale = torch.where(one.isfinite(), one.abs().double(), 0.0).max()
    return float((gap / scale).nan_to_num(nan=float("inf")).max()) if scale > 0 else float("inf")


def _equal(one: Any, other: Any) -> bool:
    """Equality of numbers and strings; other objects, which each call makes anew, are equal where they are of one class."""
    plain = (bool, int, float, complex, str, bytes)
    return one == other if isinstance(one, plain) and isinstance(other, plain) else type(one) is type(other)


def _identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _percent(amount: float) -> str:
    return f"{100 * amount:.2g} %"
