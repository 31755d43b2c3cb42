"""Channels really removed: a network that is smaller, and runs by the same code.

The channels are found once (`trace.py`, `groups.py`); then any number of smaller networks can be cut out of the same whole one, to any
ratio. Every cut is proved (`check.py`) before it is handed out. What a proof refuses stays whole, and is remembered for the report
with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from torchopt.channels.arguments import Arguments, Examples
from torchopt.channels.follow.trace import follow
from torchopt.channels.groups import Group, find_groups
from torchopt.channels.macs import count_macs
from torchopt.channels.proved.check import Proof
from torchopt.channels.proved.proof import Proved
from torchopt.channels.proved.whole import ignored_modules, try_inputs, working_copy
from torchopt.channels.rank import check_importance, choose, dead, scores
from torchopt.channels.renew import Kinds
from torchopt.errors import ModelError, RuleError, nearest
from torchopt.process.random_state import random_state_kept


class Channels(Proved):
    """The widths of a network that can shrink.

    Args:
        model: any network; it is not touched. For importance "taylor" with gradients in its parameters' `.grad`.
        example_inputs: the positional arguments of one forward call, or a dict of arguments by name.
        importance: how channels are ranked ("magnitude", "taylor", "lamp", "fpgm", "bn_scale", "random").
        ignore: globs of modules whose output channels all stay; those that reach the network's outputs always do.
        seed: of importance "random".

    Raises:
        ConfigError: an unknown importance.
        RuleError: a glob in `ignore` matches nothing.
        DataError: the network does not take the example inputs.
        StateError: the network is prepared for training with masks, or "taylor" and there are no gradients.
        ModelError: no channel of the network can be removed.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> channels = Channels(net, (torch.zeros(1, 4),))
        >>> [(group.layers, len(group)) for group in channels.groups]
        [(('0',), 16)]
        >>> channels.without(0.5)[2].in_features
        8
    """

    @random_state_kept()
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Examples,
        *,
        importance: str = "magnitude",
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        check_importance(importance)
        self.training, self.inputs = model.training, Arguments.of(model, example_inputs)
        self.original = getattr(model, "_orig_mod", model)  # of torch.compile
        self.model = working_copy(self.original)
        ignored = ignored_modules(self.original, ignore)
        try_inputs(self.model, self.inputs)
        self.macs = count_macs(self.model, self.inputs)[0]
        self.seen = follow(self.model, self.inputs)
        found, self.kept, self.labels = find_groups(self.model, self.seen, ignored)
        ranked = [(group, scores(self.model, group, importance, seed)) for group in found]
        self.proof, self.ties, self.learned = Proof(self.model, self.inputs), list[list[Group]](), Kinds()
        self.groups = [group for group, rank in ranked if rank is not None]
        self.ranks = [rank for _, rank in ranked if rank is not None]
        for group in (group for group, rank in ranked if rank is None):
            self._keep(group, f"nothing in its group can be ranked by importance={importance!r}")
        self._refuse_if_nothing()

    @random_state_kept()
    def without(
        self,
        ratio: float,
        *,
        round_to: int = 8,
        global_ranking: bool = False,
        isomorphic: bool = False,
        ratios: Mapping[str, float] | None = None,
    ) -> nn.Module:
        """Return a smaller network, with about `ratio` of the features removed.

        Args:
            ratio: fraction to remove, in [0, 1), of each group of channels, or of all that are ranked together.
            round_to: widths stay multiples of this, and at least one multiple.
            global_ranking: rank the channels of all groups together.
            isomorphic: rank the channels of groups with the same structure together.
            ratios: other ratios for the groups that hold the outputs of these layers, by name.

        Raises:
            ModelError: no channel of the network can be removed.
        """
        self._check_names(ratios or {})

        def pick(ties: Sequence[Sequence[Group]]) -> list[np.ndarray]:
            return choose(
                self.groups,
                self.ranks,
                ratio,
                round_to=round_to,
                global_ranking=global_ranking,
                isomorphic=isomorphic,
                ratios=ratios or {},
                ties=ties,
            )

        return self._while_proved(pick)

    @random_state_kept()
    def masked(self) -> nn.Module:
        """Return the network without the channels that masks have set to zero, which computes what the network does.

        Raises:
            ModelError: no channel is masked, or those that are still carry something.
        """
        self.proof.masked = dict(self.model.named_parameters())
        if not any(dead(self.model, group).any() for group in self.groups):
            raise ModelError(
                "shrink: masked=True, and no weight of a width that can shrink is zero along a whole channel; prune with "
                "Prune(pattern='channel', scope='coupled') first"
            )
        return self._while_proved(lambda ties: [dead(self.model, group) for group in self.groups])

    @random_state_kept()
    def keep_exact(self) -> None:
        """Keep whole every group of channels that cannot be removed without a change when all that they lie on is zero."""
        self.proof.masked = {}

        def half(ties: Sequence[Sequence[Group]]) -> list[np.ndarray]:
            return [np.arange(len(group)) < len(group) // 2 for group in self.groups]

        while self._problem(list(range(len(self.groups))), half(()))[0]:
            self._exclude(half(()), half, tied=False)

    def by_layer(self, ratios: Mapping[str, float]) -> dict[str, float]:
        """Expand globs over layer names; of several that match a layer, the first decides.

        Raises:
            RuleError: a glob matches no layer.
        """
        shrinking = [layer for group in self.groups for layer in group.layers]
        names = list(dict.fromkeys([*shrinking, *(name for name, _ in self.original.named_modules())]))
        for glob in ratios:
            if not any(fnmatchcase(name, glob) for name in names):
                raise RuleError(f"shrink: ratio names {glob!r}, which matches no layer{nearest(glob, shrinking)}")
        chosen = {name: next((r for glob, r in ratios.items() if fnmatchcase(name, glob)), None) for name in shrinking}
        return {name: ratio for name, ratio in chosen.items() if ratio is not None}

    def _check_names(self, ratios: Mapping[str, float]) -> None:
        layers = [layer for group in self.groups for layer in group.layers]
        for name in ratios:
            if name not in layers and name not in [skip.name for skip in self.kept]:
                raise RuleError(f"shrink: ratios names {name!r}, no layer whose channels can go{nearest(name, layers)}")


def remove_channels(
    model: nn.Module,
    example_inputs: Examples,
    ratio: float,
    *,
    importance: str = "magnitude",
    ignore: Sequence[str] = (),
    round_to: int = 8,
    global_ranking: bool = False,
    isomorphic: bool = False,
    ratios: Mapping[str, float] | None = None,
) -> nn.Module:
    """Return a copy of `model` with about `ratio` of its features removed: `Channels` and `Channels.without` in one call."""
    channels = Channels(model, example_inputs, importance=importance, ignore=ignore)
    return channels.without(ratio, round_to=round_to, global_ranking=global_ranking, isomorphic=isomorphic, ratios=ratios)
