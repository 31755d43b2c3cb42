"""The one piece of state that is no mask, table or range: how many optimizer steps were taken, and under which rules.

`prepare` hangs it on the model as the submodule `torchopt_state`, so that it travels in the `state_dict`: a resumed run goes on
at the right step of every schedule, and a checkpoint that was made under other rules is refused by name instead of half loading.
The counter has a seal beside it: an average of two models' counters breaks it, and is noticed. A module may hold several prepared
networks (a generator and its critic); averaged copies of one (`torch.optim.swa_utils.AveragedModel`) do not count as another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from torchopt.copies import Origin
from torchopt.errors import StateError
from torchopt.seal import seal
from torchopt.weights import Skipped

ATTRIBUTE = "torchopt_state"


class State(nn.Module):
    """Step counter and rules of a prepared model.

    Args:
        rules: the rules that the model was prepared with.
        names: the weights that they act on.
        target: the deployment target that quantization aims at.
        example_inputs: shapes and dtypes of the inputs that the model was traced with, or None.
        found: the zeros and shared values that an earlier round left, by weight.
        skipped: the weights left alone, and why.
        plan: the sizes of the network before quantization swapped its modules (`torchopt.prune.plan`).
        origin: the float network, for a proof at calibration; forgotten once anything has changed.
    """

    step: torch.Tensor
    seal: torch.Tensor
    fingerprint: torch.Tensor

    def __init__(
        self,
        rules: Sequence[Any],
        names: Sequence[str],
        target: str,
        example_inputs: list[tuple[list[int], str]] | None = None,
        found: Mapping[str, tuple[int, int]] | None = None,
        skipped: Sequence[Skipped] = (),
        plan: Mapping[str, Any] | None = None,
        origin: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.rules = tuple(rules)
        self.target = target
        self.example_inputs = example_inputs
        self.found = dict(found or {})
        self.skipped = list(skipped)
        self.plan = plan
        self.origin = Origin(origin)
        self.frozen: list[str] = []  # parameters that were frozen when the model was prepared: no mask or table stands on them
        self.ranks_agree = False
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seal", seal(self.step))
        self.register_buffer("fingerprint", _digest(repr((_chosen(self.rules), sorted(names), target))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`: a prepared `nn.Sequential` runs through all its submodules, and this is one of them."""
        return x

    def advance(self) -> int:
        """Count one optimizer step and return its number, 1 for the first."""
        self.step += 1
        self.origin.network = None
        self.seal.copy_(seal(self.step))
        return int(self.step)

    @property
    def intact(self) -> bool:
        """True while the counter is one that `advance` has left."""
        return torch.equal(self.seal, seal(self.step))

    def check_ranks(self) -> None:
        """Refuse to train when the processes of a distributed run were prepared with different rules.

        Raises:
            StateError: the ranks disagree.
        """
        if self.ranks_agree or not (dist.is_available() and dist.is_initialized()):
            return
        mine = bytes(self.fingerprint.tolist()).hex()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if len(set(everyone)) > 1:
            others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
            raise StateError(f"step: ranks {others} were prepared with other rules than rank 0; give every rank the same rules")
        self.ranks_agree = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        theirs = state_dict.get(prefix + "fingerprint")
        if theirs is not None and not torch.equal(theirs.cpu(), self.fingerprint.cpu()):
            raise StateError(
                "load_state_dict: the checkpoint was made under other rules, or for other weights, than this model was "
                "prepared with; prepare the model with the rules of the checkpoint"
            )
        self.origin.network = None
        counted = state_dict.get(prefix + "step")
        if counted is not None:
            state_dict.setdefault(prefix + "seal", seal(counted))  # files from before there were seals
        super()._load_from_state_dict(state_dict, prefix, *args)


def find_state(model: nn.Module) -> tuple[nn.Module, State] | None:
    """Return the prepared module inside `model` (which DDP, compile or an averaged model may wrap) and its state, or None."""
    for module in model.modules():
        state = module._modules.get(ATTRIBUTE)
        if isinstance(state, State):
            return module, state
    return None


def require_state(model: nn.Module, verb: str) -> tuple[nn.Module, State]:
    """Return the prepared module and its state.

    Raises:
        StateError: the model was not prepared.
    """
    found = find_state(model)
    if found is None:
        raise StateError(f"{verb}: this {type(model).__name__} was not prepared; call torchopt.prepare(model, rules) first")
    return found


def _chosen(value: Any) -> Any:
    """The fields that differ from their defaults: an option that a later version adds leaves older checkpoints readable.

    Example:
        >>> from torchopt import Cluster, Rule
        >>> _chosen(Rule("*", cluster=Cluster(n_clusters=4)))
        ('Rule', {'cluster': ('Cluster', {'n_clusters': 4})})
    """
    if isinstance(value, tuple | list):
        return [_chosen(one) for one in value]
    if not is_dataclass(value):
        return value
    given = {field.name: (getattr(value, field.name), field) for field in fields(value)}
    told = {name: _chosen(now) for name, (now, field) in given.items() if MISSING is field.default or now != field.default}
    return type(value).__name__, told


def _digest(text: str) -> torch.Tensor:
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()[:16]), dtype=torch.uint8)
