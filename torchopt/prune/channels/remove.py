"""Channels really removed: a network that is smaller, and runs by the same code.

The channels are found once (`trace.py`, `groups.py`); then any number of smaller networks can be cut out of the same whole one, to any
ratio. Every cut is proved (`check.py`) before it is handed out. What a proof refuses stays whole, and is remembered for the report
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from torchopt.errors import ModelError, RuleError, nearest
from torchopt.prune.channels.attention import release
from torchopt.prune.channels.check import Proof
from torchopt.prune.channels.cut import cut, removed_indices, rename
from torchopt.prune.channels.groups import Axis, Group, find_groups
from torchopt.prune.channels.identity import Ids, real
from torchopt.prune.channels.rank import check_importance, choose, scores
from torchopt.prune.channels.trace import follow
from torchopt.prune.channels.whole import ignored_modules, try_inputs, working_copy
from torchopt.weights import Skipped

NOTE = "torchopt_kept_whole"


class Channels:
    """The widths of a network that can shrink.

    Args:
        model: any network; it is not touched. For importance "taylor" with gradients in its parameters' `.grad`.
        example_inputs: the positional arguments of one forward call.
        importance: how channels are ranked ("magnitude", "taylor", "lamp", "fpgm", "bn_scale", "random").
        ignore: globs of modules whose output channels all stay; those that reach the network's outputs always do.

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

    def __init__(
        self, model: nn.Module, example_inputs: tuple[Any, ...], *, importance: str = "magnitude", ignore: Sequence[str] = ()
    ) -> None:
        check_importance(importance)
        self.training, self.inputs = model.training, example_inputs
        self.original = getattr(model, "_orig_mod", model)  # of torch.compile
        self.model = working_copy(self.original)
        ignored = ignored_modules(self.original, ignore)
        try_inputs(self.model, example_inputs)
        self.seen = follow(self.model, example_inputs)
        found, self.kept, self.labels = find_groups(self.model, self.seen, ignored)
        ranked = [(group, scores(self.model, group, importance)) for group in found]
        self.proof, self.ties = Proof(self.model, example_inputs), list[list[Group]]()
        self.groups = [group for group, rank in ranked if rank is not None]
        self.ranks = [rank for _, rank in ranked if rank is not None]
        for group in (group for group, rank in ranked if rank is None):
            self._keep(group, f"nothing in its group can be ranked by importance={importance!r}")
        self._refuse_if_nothing()

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

        while True:
            gone = pick(self.ties)
            problem, place = self._problem(list(range(len(gone))), gone)
            if not problem:
                return self._finished(gone, renamed=place == 1)
            self._exclude(gone, pick)

    def _check_names(self, ratios: Mapping[str, float]) -> None:
        layers = [layer for group in self.groups for layer in group.layers]
        for name in ratios:
            if name not in layers and name not in [skip.name for skip in self.kept]:
                raise RuleError(f"shrink: ratios names {name!r}, no layer whose channels can go{nearest(name, layers)}")

    def _problem(self, which: list[int], gone: Sequence[np.ndarray]) -> tuple[str, int]:
        """What is wrong when these groups are cut, and which way of cutting is right; see `Proof.problem`."""
        groups, chosen = [self.groups[i] for i in which], [gone[i] for i in which]
        removed, statistics = self._consequences(groups, chosen)
        plain = partial(cut, removed=removed)

        def renamed(whole: nn.Module) -> nn.Module | None:
            small = plain(whole)
            return small if rename(small, whole, groups, chosen) else None

        return self.proof.problem(removed, statistics, [plain, renamed]) if removed else ("", 0)

    def _consequences(
        self, groups: Sequence[Group], gone: Sequence[np.ndarray]
    ) -> tuple[dict[Axis, np.ndarray], list[dict[int, np.ndarray]]]:
        """What goes from each axis of the weights, and from what each statistic sees."""
        labels = np.concatenate([group.labels[chosen] for group, chosen in zip(groups, gone, strict=True)] + [np.array([-1])])

        def goes(ids: Ids) -> np.ndarray:
            return np.flatnonzero(np.isin(self.labels[np.maximum(ids, 0)], labels) & (ids > 0))

        statistics = [{axis: goes(ids) for axis, ids in call.items()} for call in self.seen.statistics]
        bare = {
            (f"{name}.", dim): goes(ids) for name, axes in self.seen.bare.items() for dim, ids in enumerate(axes) if real(ids)
        }
        return removed_indices(groups, gone) | {axis: indices for axis, indices in bare.items() if len(indices)}, statistics

    def _finished(self, gone: Sequence[np.ndarray], *, renamed: bool) -> nn.Module:
        small = cut(self.model, self._consequences(self.groups, gone)[0])
        if renamed:
            rename(small, self.model, self.groups, gone)
        release(small, self.original)
        small.__dict__[NOTE] = list(self.kept)
        return small.train(self.training)

    def _exclude(self, gone: Sequence[np.ndarray], pick: Callable[[Sequence[Sequence[Group]]], list[np.ndarray]]) -> None:
        """Find the groups that cannot be cut so: those of equal width are tied to one another, or else kept whole from now on.

        Code such as `reshape(batch, length, heads, width // heads)` runs only where the heads of an attention together are as wide
        as the embedding: neither can shrink alone, both together can.
        """
        good, bad = self._sorted(gone)
        by_width: dict[int, list[int]] = {}
        for i in bad:
            by_width.setdefault(len(self.groups[i]) * self.groups[i].unit, []).append(i)
        for members in by_width.values():
            tie = [self.groups[i] for i in members]
            if len(tie) > 1 and tie not in self.ties and not self._problem([*good, *members], pick([*self.ties, tie]))[0]:
                self.ties.append(tie)
                good += members
        for i in sorted(set(bad) - set(good)):
            self._keep(self.groups[i], bad[i])
        stays = [i for i in range(len(self.groups)) if i not in bad or i in good]
        self.groups, self.ranks = [self.groups[i] for i in stays], [self.ranks[i] for i in stays]
        self.ties = [tie for tie in self.ties if all(group in self.groups for group in tie)]
        self._refuse_if_nothing()

    def _sorted(self, gone: Sequence[np.ndarray]) -> tuple[list[int], dict[int, str]]:
        """The groups that can be cut so, and what is wrong with each of the others.

        Groups of one structure stand or fall together as a rule, so they are tried together first, then one by one; after two
        that fail, the others of their kind are taken to fail too.
        """
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, group in enumerate(self.groups):
            if gone[i].any():
                alike.setdefault(group.structure, []).append(i)
        good: list[int] = []
        bad: dict[int, str] = {}
        for members in sorted(alike.values(), key=lambda members: len(self.groups[members[0]].axes)):
            if len(members) > 1 and not self._problem(good + members, gone)[0]:
                good += members
                continue
            failures: list[str] = []
            for i in members:
                problem = failures[-1] if len(failures) > 1 else self._problem([*good, i], gone)[0]
                if problem:
                    bad[i] = problem
                    failures.append(problem)
                else:
                    good.append(i)
        return good, bad

    def _keep(self, group: Group, reason: str) -> None:
        self.kept += [Skipped(name=layer, technique="shrink", reason=f"keeps its channels: {reason}") for layer in group.layers]

    def _refuse_if_nothing(self) -> None:
        if self.groups:
            return
        why = (
            f"{self.kept[0].name} {self.kept[0].reason}"
            if self.kept
            else "all of them reach its inputs, outputs or ignored layers"
        )
        raise ModelError(
            f"shrink: no channel of {type(self.model).__name__} can be removed; {why}; "
            "a hidden layer between others, with sizes taken from its input, can shrink"
        )


def remove_channels(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
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


def skipped_of(model: nn.Module) -> list[Skipped]:
    """Return what was kept whole in a shrunken `model`, and why; nothing for another network.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2))
        >>> skipped_of(remove_channels(net, (torch.zeros(1, 4),), 0.5))
        []
    """
    return list(model.__dict__.get(NOTE, ()))
