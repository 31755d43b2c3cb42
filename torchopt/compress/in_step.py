"""A walk through any network in the order of its calls: each layer is seen once with what all samples give it, and may be changed there.

What layer l reads in the network whose earlier layers are changed already would take a pass a layer. Here all calls run at once, each in
a thread of its own, and stop before the layer; once it has been changed they go on. One thread runs at a time, so the order of all that
happens is fixed. The walk costs one forward pass, and holds what the passes hold.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stopped(BaseException):
    """Ends the passes of a walk that is left early; no `except Exception` of a network holds it up."""


class _Pass:
    """One call in its thread: it runs when told, up to the next layer that is asked for, and waits there."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.layer: nn.Module | None = None
        self.given: Tensor | None = None
        self.failed: BaseException | None = None
        self.over, self.ended = False, False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(model, call), daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Run to the next layer, or to the end.

        Raises:
            Exception: what the network raised.
        """
        self.layer = self.given = None
        self._go.release()
        self._back.acquire()
        if self.failed is not None and not isinstance(self.failed, Stopped):
            raise self.failed

    def stop(self) -> None:
        """End the thread where it stands."""
        if not self.over:
            self.ended = True
            self._go.release()
            self._thread.join()

    def wait(self, layer: nn.Module, given: Tensor) -> None:
        """In the thread: stand before a layer until told to go on."""
        self.layer, self.given = layer, given
        self._back.release()
        self._go.acquire()
        if self.ended:
            raise Stopped

    def _run(self, model: nn.Module, call: Call) -> None:
        _HERE.of = self
        self._go.acquire()
        try:
            if not self.ended:
                with torch.no_grad():
                    model(*call[0], **call[1])
        except BaseException as error:
            self.failed = error
        self.over = True
        self._back.release()


class _Here(threading.local):
    of: _Pass | None = None


_HERE = _Here()


def in_step(model: nn.Module, layers: Sequence[nn.Module], calls: Sequence[Call]) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Yield each of `layers` that is called, with its first input in every call that comes to it; what is changed then, counts from then.

    Args:
        model: in the mode that it is to run in.
        layers: to stop at, each once; where calls go different ways, those in front come first.
        calls: the arguments of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> for layer, (x,) in in_step(net, list(net), [((torch.ones(1, 1),), {})]):
        ...     print(x.tolist())
        ...     _ = nn.init.constant_(layer.weight, 3.0)
        [[1.0]]
        [[3.0]]
    """
    left = set(layers)

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        here, given = _HERE.of, args[0] if args else next(iter(kwargs.values()), None)
        if here is not None and module in left and isinstance(given, Tensor):
            here.wait(module, given)

    handles = [layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True) for layer in left]
    passes: list[_Pass] = []
    try:
        passes += [_Pass(model, call) for call in calls]
        for one in passes:
            one.advance()
        while waiting := [one for one in passes if not one.over]:
            layer = next(layer for layer in layers if any(one.layer is layer for one in waiting))  # others wait for those behind
            there = [one for one in waiting if one.layer is layer]
            yield layer, [one.given for one in there if one.given is not None]
            left.discard(layer)
            for one in there:
                one.advance()
    finally:
        for handle in handles:
            handle.remove()
        for one in passes:
            one.stop()
