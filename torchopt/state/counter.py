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
from torch.optim.swa_utils import AveragedModel

from torchopt.errors import StateError
from torchopt.network.copies import Origin
from torchopt.network.weights import Skipped
from torchopt.state.checksum import seal
from torchopt.state.optimizer_moved import Moved

ATTRIBUTE = "torchopt_state"


class State(nn.Module):
    """Step counter and rules of a prepared model.

    Args:
        rules: the rules that the model was prepared with.
        names: the weights that they act on.
        target: the deployment target that quantization aims at.
        example_inputs: what the model was traced with, or None: shape and dtype of a tensor, {"value": …} of anything else.
        found: the zeros and shared values that an earlier round left, by weight.
        skipped: the weights left alone, and why.
        plan: the sizes of the network before quantization swapped its modules (`torchopt.channels.plan`).
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
        example_inputs: Sequence[Any] | None = None,
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
        self.records: tuple[Any, ...] = ()  # what each layer was given by quantization (`torchopt.quantize.Record`)
        self.ranks_agree = False
        self.moved = Moved()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seal", seal(self.step))
        self.register_buffer("fingerprint", _digest(repr((_chosen(self.rules), sorted(names), target))))
        self.made_for = bytes(self.fingerprint.tolist())  # the buffer may be empty memory, until a state is loaded into it

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
        if theirs is not None and bytes(theirs.tolist()) != self.made_for:
            raise StateError(
                "load_state_dict: the checkpoint was made under other rules, or for other weights, than this model was "
                "prepared with; prepare the model with the rules of the checkpoint"
            )
        self.origin.network = None
        counted = state_dict.get(prefix + "step")
        if counted is not None:
            state_dict.setdefault(prefix + "seal", seal(counted))  # files from before there were seals
        super()._load_from_state_dict(state_dict, prefix, *args)


Found = tuple[nn.Module, State]
SHARDED = (
    "_local_tensor",
    "_handle",
    "ds_id",
)  # of Parameters of FSDP2 (and tensor parallelism), of FSDP1, of DeepSpeed's ZeRO-3


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Refuse weights of which each process holds a part: masks rank whole weights, and tables and grids stand on them.

    Raises:
        StateError: a weight is sharded.
    """
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter and any(hasattr(parameter, mark) for mark in SHARDED):
            raise StateError(
                f"{verb}: {name} is sharded over processes ({type(parameter).__name__}), and masks, tables and grids need whole weights; "
                "train the prepared model under DistributedDataParallel, and shard what finalize returns"
            )


def find_states(model: nn.Module) -> dict[str, Found]:
    """Return the prepared networks inside `model` (which DDP, compile or an averaged model may wrap) with their states, by path.

    The averaged copies of a network count where there is no other one.
    """
    found, averages = dict[str, Found](), []
    for path, module in model.named_modules():
        if isinstance(module, AveragedModel):
            averages.append(f"{path}." if path else "")
        state = module._modules.get(ATTRIBUTE)
        if isinstance(state, State):
            found[path] = module, state
    outside = {path: one for path, one in found.items() if not any(path.startswith(average) for average in averages)}
    return outside or found


def find_state(model: nn.Module) -> Found | None:
    """Return the prepared network inside `model` and its state, or None; the first where there are several."""
    return next(iter(find_states(model).values()), None)


def require_states(model: nn.Module, verb: str) -> list[Found]:
    """Return the prepared networks and their states, at least one.

    Raises:
        StateError: nothing was prepared, or its weights are sharded.
    """
    refuse_sharded(model, verb)
    found = list(find_states(model).values())
    if not found:
        raise StateError(f"{verb}: this {type(model).__name__} was not prepared; call torchopt.prepare(model, rules) first")
    return found


def require_state(model: nn.Module, verb: str) -> Found:
    """Return the prepared network and its state.

    Raises:
        StateError: nothing was prepared, or several networks were.
    """
    found = require_states(model, verb)
    if len(found) > 1:
        paths = list(find_states(model))
        raise StateError(
            f"{verb}: {len(found)} networks inside this {type(model).__name__} were prepared ({', '.join(paths[:4])}); "
            f"call {verb} on each, such as model.{paths[0]}"
        )
    return found[0]


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
