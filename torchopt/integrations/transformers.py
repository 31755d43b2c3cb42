"""A Hugging Face `TrainerCallback` that advances torchopt's schedules after each optimizer step."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torchopt.compress import step
from torchopt.errors import StateError
from torchopt.state import find_state


class CompressionCallback(TrainerCallback):
    """Call `torchopt.step` on the model of a `transformers.Trainer` after each optimizer step.

    `Trainer` calls `on_step_end` once per optimizer step, also with gradient accumulation.

    Raises:
        StateError: at the start of training, when the model was not prepared.

    Example:
        >>> isinstance(CompressionCallback(), TrainerCallback)
        True
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Check that there is something to advance."""
        if model is None or find_state(model) is None:
            raise StateError("CompressionCallback: the model was not prepared; give Trainer model=torchopt.prepare(model, rules)")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Advance every schedule by one."""
        assert model is not None  # on_train_begin has seen it
        step(model)
