"""A Lightning callback that advances torchopt after optimizer steps, not batches, so that accumulation does not over-count."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
from torch import nn

from torchopt.compress import step
from torchopt.errors import StateError
from torchopt.state import find_state


class CompressionCallback(lightning.Callback):
    """Call `torchopt.step` on the prepared model inside a LightningModule after each optimizer step.

    The masks, tables, ranges and the step counter lie in the module's `state_dict`, so Lightning's own checkpoints resume them.

    Raises:
        StateError: at the start of training, when nothing in the module was prepared.

    Example:
        >>> callback = CompressionCallback()
        >>> isinstance(callback, lightning.Callback)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Check that there is something to advance, and where the run stands."""
        _require(pl_module)
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance once for each optimizer step that the batch brought; none while gradients accumulate."""
        for _ in range(trainer.global_step - self._seen):
            step(pl_module)
        self._seen = trainer.global_step


def _require(module: nn.Module) -> None:
    if find_state(module) is None:
        raise StateError(
            f"CompressionCallback: nothing inside this {type(module).__name__} was prepared; "
            "set self.model = torchopt.prepare(model, rules) in its __init__"
        )
