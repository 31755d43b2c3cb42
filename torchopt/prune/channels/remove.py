"""Channels really removed: a network that is smaller, and runs by the same code.

The channels are found once (`trace.py`, `groups.py`); then any number of smaller networks can be cut out of the same whole one, to any
ratio. Every cut is proved (`check.py`) before it is handed out. What a proof refuses stays whole, and is remembered for the report
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
from torch import nn

from torchopt.copies import copied
from torchopt.errors import ModelError, RuleError, first_line, nearest
from torchopt.prune.channels.arguments import Arguments, Examples
from torchopt.prune.channels.attention import release
from torchopt.prune.channels.check import Gone, Proof
from torchopt.prune.channels.cut import cut, removed_indices
from torchopt.prune.channels.groups import Axis, Group, find_groups
from torchopt.prune.channels.identity import Ids, real
from torchopt.prune.channels.macs import count_macs
from torchopt.prune.channels.note import take_note
from torchopt.prune.channels.rank import check_importance, choose, scores
from torchopt.prune.channels.remembered import Renewal, renewals
from torchopt.prune.channels.renew import Kinds, Renewals
from torchopt.prune.channels.ties import find_ties
from torchopt.prune.channels.trace import follow
from torchopt.prune.channels.whole import ignored_modules, try_inputs, working_copy
from torchopt.randomness import random_state_kept
from torchopt.weights import Skipped

CANNOT = (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError)  # of a layer that no pruner knows
MOST_KINDS = 12


class Channels:
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

        while True:
            gone = pick(self.ties)
            problem, kinds = self._problem(list(range(len(gone))), gone)
            if not problem:
                return self._finished(gone, self._least(gone, kinds))
            self._exclude(gone, pick)

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

    def _problem(self, which: list[int], gone: Sequence[np.ndarray], kinds: Sequence[Kinds] = ()) -> tuple[str, Kinds]:
        """What is wrong when these groups are cut, and which remembered numbers are renewed where nothing is; `kinds` limits the trials."""
        groups, chosen = [self.groups[i] for i in which], [gone[i] for i in which]
        removed, statistics, trained = self._consequences(groups, chosen)
        if not removed:
            return "", frozenset()
        try:
            small = cut(self.proof.whole, removed)
        except CANNOT as error:
            return f"a layer cannot be made smaller ({first_line(error)})", frozenset()
        found = Renewals(renewals(self.proof.whole, small, groups, chosen), self.learned)
        trials = [*(kinds or found.trials())]
        problem, place = self.proof.problem(
            removed, statistics, (partial(_renewed, small=small, found=found, kinds=k) for k in trials), trained
        )
        return problem, frozenset() if problem else trials[place]

    def _least(self, gone: Sequence[np.ndarray], kinds: Kinds) -> Kinds:
        """Of the renewed numbers, those that forward needs or whose names tell; others may have the same value by chance."""
        removed_all = list(range(len(gone)))
        small = cut(self.model, self._consequences(self.groups, gone)[0])
        found = Renewals(renewals(self.model, small, self.groups, gone))
        telling = {kind for kind, _ in found.kinds(telling=True)}
        for one in sorted((k for k in kinds if k[0] not in telling), key=repr)[:MOST_KINDS]:
            if not self._problem(removed_all, gone, [kinds - {one}])[0]:
                kinds = kinds - {one}
        there = {kind for kind, _ in kinds}
        for one in sorted((k for k in found.kinds(telling=True, sure=True) if k[0] not in there), key=repr)[:MOST_KINDS]:
            if not self._problem(removed_all, gone, [kinds | {one}])[0]:
                kinds = kinds | {one}
        self.learned = kinds
        return kinds

    def _consequences(
        self, groups: Sequence[Group], gone: Sequence[np.ndarray]
    ) -> tuple[dict[Axis, np.ndarray], list[Gone], list[Gone]]:
        """What goes from each axis of the weights, and from what each statistic sees, in evaluation and in training."""
        labels = np.concatenate([group.labels[chosen] for group, chosen in zip(groups, gone, strict=True)] + [np.array([-1])])

        def goes(ids: Ids) -> np.ndarray:
            return np.flatnonzero(np.isin(self.labels[np.maximum(ids, 0)], labels) & (ids > 0))

        statistics, trained = (
            [{axis: goes(ids) for axis, ids in call.items()} for call in calls]
            for calls in (self.seen.statistics, self.seen.trained)
        )
        bare = {
            (f"{name}.", dim): goes(ids) for name, axes in self.seen.bare.items() for dim, ids in enumerate(axes) if real(ids)
        }
        removed = removed_indices(groups, gone) | {axis: indices for axis, indices in bare.items() if len(indices)}
        return removed, [*statistics], [*trained]

    def _finished(self, gone: Sequence[np.ndarray], kinds: Kinds) -> nn.Module:
        small = cut(self.model, self._consequences(self.groups, gone)[0])
        found = Renewals(renewals(self.model, small, self.groups, gone))
        found.apply(small, kinds)
        release(small, self.original)
        macs = self.macs, count_macs(small, self.inputs)[0]
        take_note(small, self.original, macs, [*self.kept, *map(_stale, found.stale(kinds))])
        return small.train(self.training)

    def _exclude(self, gone: Sequence[np.ndarray], pick: Callable[[Sequence[Sequence[Group]]], list[np.ndarray]]) -> None:
        """Find the groups that cannot be cut so: they are tied to one another (`ties.py`), or else kept whole from now on."""
        good, bad = self._sorted(gone)

        def works(tie: list[Group]) -> bool:
            places = [i for i, group in enumerate(self.groups) if any(group is other for other in tie)]
            if tie in self.ties or self._problem([*good, *places], pick([*self.ties, tie]))[0]:
                return False
            self.ties.append(tie)
            good.extend(places)
            return True

        find_ties([self.groups[i] for i in bad], works)
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


def _renewed(whole: nn.Module, small: nn.Module, found: Renewals, kinds: Kinds) -> nn.Module:
    return found.apply(copied(small), kinds)


def _stale(renewal: Renewal) -> Skipped:
    now = " or ".join(map(str, renewal.options))
    return Skipped(
        name=renewal.number.name,
        technique="shrink",
        reason=f"still says {renewal.number.value}, and what was so wide is {now} now; the forward pass does not need it changed",
    )


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
