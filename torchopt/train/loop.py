"""One plain training loop, blind to compression but for a callback after each optimizer step.

The loop is flat over steps; epoch and batch follow from the step's number, the batch's content from (seed, epoch, batch), the
learning rate from the step. So the whole state between two steps is (step, model, optimizer, torch's random state), and a run
that goes on from a saved state takes, on a CPU, bit for bit the same steps as one that was never interrupted.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from torchopt.data import Dataset, epoch_order, generator
from torchopt.errors import ConfigError, ModelError
from torchopt.io.progress import track
from torchopt.process.random_state import random_state_kept
from torchopt.train.across import across_ranks, mean_over_ranks
from torchopt.train.config import Distill, Train
from torchopt.train.evaluate import accuracy

SAVE_SECONDS = 30.0  # a killed run loses at most this much work beside the current step
State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the data brought: mean loss of its steps, accuracy on the test part."""

    epoch: int
    loss: float
    accuracy: float


@random_state_kept()
def train(
    model: nn.Module,
    data: Dataset,
    config: Train,
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    after_step: Callable[[nn.Module], object] | None = None,
    resume: State | None = None,
    save: Callable[[State], object] | None = None,
    save_seconds: float = SAVE_SECONDS,
    description: str = "training",
    progress: bool = True,
) -> list[Epoch]:
    """Train `model` in place.

    Args:
        model: maps inputs to logits.
        data: the samples.
        config: how to train.
        seed: decides initial random state, order and augmentation.
        teacher: the model to learn from, where `config.distill` asks for it.
        after_step: called with the model after each optimizer step (`torchopt.step`).
        resume: a state given to `save` by an earlier call with the same arguments; training goes on from there.
        save: called with the state after each epoch, and inside epochs when `save_seconds` have passed.
        save_seconds: seconds between saves inside an epoch.
        description: what the progress bar says.
        progress: show it.

    Returns:
        One `Epoch` for each, also those of before a resume.

    Raises:
        ConfigError: distillation without a teacher, or a batch that the processes cannot share equally.
        ModelError: the loss is not finite.

    Example:
        >>> from torchopt.data import Digits
        >>> from torchopt.train import Adam
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> train(net, Digits().load(), Train(epochs=3, optimizer=Adam(lr=0.01)))[-1].accuracy > 0.9
        True
    """
    device = device_of(config)
    model.to(device)
    teacher = _teacher(config, teacher, device)
    optimizer = config.optimizer.build(p for p in model.parameters() if p.requires_grad)
    torch.manual_seed(seed)
    history, losses, first = _restore(resume, model, optimizer)
    batches = _Batches(data, config, seed, device)
    total = batches.per_epoch * config.epochs
    saves = _Saves(save if batches.rank == 0 else None, save_seconds)
    with across_ranks(model) as forward:
        for number in track(range(first, total), description, enabled=progress and batches.rank == 0):
            _set_learning_rate(optimizer, config.learning_rate(number, total))
            losses.append(_one_step(forward, optimizer, *batches.at(number), config, teacher, number))
            if after_step is not None:
                after_step(model)
            epoch, left = divmod(number + 1, batches.per_epoch)
            if left == 0:
                score, loss = accuracy(model, data.test_batches()), mean_over_ranks(sum(losses) / len(losses))
                history.append(Epoch(epoch=epoch - 1, loss=loss, accuracy=score))
                losses = []
            if saves.due(ended=left == 0):
                saves.write(_state(number + 1, model, optimizer, history, losses))
    model.to("cpu")
    return history


class _Saves:
    """When to save: at the end of each epoch, and after so many seconds inside one; never without a `save`."""

    def __init__(self, save: Callable[[State], object] | None, seconds: float) -> None:
        self.save, self.seconds, self.last = save, seconds, time.monotonic()

    def due(self, *, ended: bool) -> bool:
        return self.save is not None and (ended or time.monotonic() - self.last > self.seconds)

    def write(self, state: State) -> None:
        if self.save is not None:
            self.save(state)
        self.last = time.monotonic()


class _Batches:
    """The training batches of this process: batch number n is a function of the seed and n alone."""

    def __init__(self, data: Dataset, config: Train, seed: int, device: torch.device) -> None:
        self.inputs, self.labels = data.train_inputs.to(device), data.train_labels.to(device)
        self.config, self.seed = config, seed
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if config.batch_size % self.ranks:
            raise ConfigError(f"Train.batch_size: {config.batch_size} is no multiple of the {self.ranks} processes that share it")
        self.epoch, self.order = 0, self._order(0)

    @property
    def per_epoch(self) -> int:
        return len(self.order)

    def at(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels of step `number`, counted from the start of the training."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self._order(epoch)
        chosen = self.order[index].to(self.inputs.device)
        inputs, labels = self.inputs[chosen], self.labels[chosen]
        if self.config.augment is not None:  # the whole batch's, so that a picture is the same however many ranks there are
            inputs = self.config.augment(inputs, generator(self.seed, epoch, index, 0))
        share = len(chosen) // self.ranks
        own = slice(self.rank * share, (self.rank + 1) * share)
        return inputs[own], labels[own]

    def _order(self, epoch: int) -> list[torch.Tensor]:
        return epoch_order(len(self.inputs), self.config.batch_size, seed=self.seed, epoch=epoch, ranks=self.ranks)


def _one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    config: Train,
    teacher: nn.Module | None,
    number: int,
) -> float:
    """Forward, backward, update; returns the loss."""
    model.train()
    optimizer.zero_grad()
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=config.autocasts(inputs.device)):
        logits = model(inputs)  # (N, classes)
        taught = _logits(teacher, inputs) if teacher is not None and config.distillation is not None else None
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    if taught is not None and config.distillation is not None:
        loss = (1 - config.distillation.weight) * loss + distillation_loss(logits.float(), taught.float(), config.distillation)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ModelError(f"train: the loss is {value} at step {number + 1}; a lower learning rate or clip_norm may help")
    loss.backward()  # type: ignore[no-untyped-call]
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return value


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, config: Distill) -> torch.Tensor:
    """Return weight · T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over the batch.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> float(distillation_loss(logits, logits, Distill()))
        0.0
    """
    t = config.temperature
    log_student, log_teacher = F.log_softmax(student / t, 1), F.log_softmax(teacher / t, 1)
    return config.weight * t**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def _logits(teacher: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return teacher(inputs)  # type: ignore[no-any-return]


def _teacher(config: Train, teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    if config.distillation is not None and teacher is None:
        raise ConfigError("Train.distill: asks for a teacher; none was given")
    return teacher.to(device).eval() if teacher is not None else None


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def device_of(config: Train) -> torch.device:
    """Return the device that a training runs on.

    Raises:
        ConfigError: it asks for CUDA, and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("Train.device: is 'cuda', but torch finds no such device; 'cpu' or 'auto' works here")
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def _state(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[Epoch], losses: list[float]) -> State:
    """Tensors and plain values only, so that `torch.load(weights_only=True)` reads it."""
    return {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "history": [asdict(e) for e in history],
        "losses": list(losses),
    }


def _restore(state: State | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Epoch], list[float], int]:
    if state is None:
        return [], [], 0
    model.load_state_dict(state["model"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return [Epoch(**e) for e in state["history"]], list(state["losses"]), int(state["step"])
