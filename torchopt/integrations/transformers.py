"""A Hugging Face `TrainerCallback` that advances torchopt's schedules after each optimizer step."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torchopt.compress.verbs import step
from torchopt.errors import StateError
from torchopt.state.counter import find_state


class CompressionCallback(TrainerCallback):
    """Call `torchopt.step` on the model of a `transformers.Trainer` after each optimizer step.

    `Trainer` calls `on_optimizer_step` once per optimizer step, also with gradient accumulation, before it clears the gradients.

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
        _name_twins(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Advance every schedule by one, while the gradients are still there, which scores such as taylor add up."""
        assert model is not None  # on_train_begin has seen it
        step(model)


def _name_twins(model: nn.Module) -> None:
    """Tell a pretrained model which tensors of its state stand at several places: a table on a tied weight has names of its own.

    Its checkpoints hold each tensor once, and refuse those that they do not know to be tied.
    """
    if not isinstance(model, PreTrainedModel):
        return
    firsts: dict[int, str] = {}
    twins = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = firsts.setdefault(id(tensor), name)
        if first != name:
            twins[name] = first
    known: Any = model._tied_weights_keys or {}
    if twins:  # on this model, not on its class; a dict from transformers 5 on, a list before
        both: Any = {**known, **twins} if isinstance(known, dict) else [*known, *twins]
        model._tied_weights_keys = both
