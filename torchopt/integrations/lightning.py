"""A Lightning callback that advances torchopt after optimizer steps, not batches, so that accumulation does not over-count."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn

from torchopt.compress.verbs import advance, step
from torchopt.errors import StateError
from torchopt.state.counter import find_states


class CompressionCallback(lightning.Callback):
    """Call `torchopt.step` on the prepared networks inside a LightningModule after each optimizer step.

    Each network is advanced by the optimizers that hold its weights: a generator and its critic count their own steps. The masks, tables,
    ranges and the step counter lie in the module's `state_dict`, so Lightning's own checkpoints resume them.

    Raises:
        StateError: at the start of training, when nothing in the module was prepared.

    Example:
        >>> callback = CompressionCallback()
        >>> isinstance(callback, lightning.Callback)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[Any] = []
        self._counted = False  # by the trainer's count of steps, where its optimizers take no hooks
        self._seen = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check that there is something to advance, and listen to the optimizers."""
        _require(pl_module)
        self._release()
        self._seen = trainer.global_step
        listening = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, torch.optim.Optimizer)]
        self._counted = len(listening) < len(trainer.optimizers)
        if not self._counted:
            self._handles = [o.register_step_post_hook(lambda optimizer, *_: _advance(pl_module, optimizer)) for o in listening]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where no optimizer could be listened to: advance once for each step that the batch brought."""
        for _ in range(trainer.global_step - self._seen if self._counted else 0):
            step(pl_module)
        self._seen = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the optimizers alone again."""
        self._release()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Leave the optimizers alone again."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _advance(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Count a step of the networks whose weights this optimizer holds."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for prepared, state in find_states(module).values():
        if any(id(p) in held for p in prepared.parameters()):
            advance(prepared, state)


def _require(module: nn.Module) -> None:
    if not find_states(module):
        raise StateError(
            f"CompressionCallback: nothing inside this {type(module).__name__} was prepared; "
            "set self.model = torchopt.prepare(model, rules) in its __init__"
        )
