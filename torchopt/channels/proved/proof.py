"""Cuts that are proved: groups of channels are removed, tied or kept whole until the proof has nothing against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import numpy as np
from torch import nn

from torchopt.channels.arguments import Arguments
from torchopt.channels.cut import cut, removed_indices
from torchopt.channels.follow.identity import Ids, real
from torchopt.channels.follow.trace import Seen
from torchopt.channels.groups import Axis, Group
from torchopt.channels.layers.attention import release
from torchopt.channels.macs import count_macs
from torchopt.channels.note import take_note
from torchopt.channels.proved.check import Gone, Proof
from torchopt.channels.remembered import Renewal, renewals
from torchopt.channels.renew import Kinds, Renewals
from torchopt.channels.ties import find_ties
from torchopt.errors import ModelError, first_line
from torchopt.network.copies import copied
from torchopt.network.weights import Skipped

CANNOT = (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError)  # of a layer that no pruner knows
MOST_KINDS = 12


class Proved:
    """Groups of channels, and the cuts of them that the proof lets pass.

    Attributes:
        original: the network as it was given.
        model: a copy in evaluation mode.
        training: the mode that the result gets.
        inputs: the arguments of one forward call.
        macs: multiply-adds of that call.
        seen: what was followed.
        labels: the channel of each number.
        groups: the widths that can shrink.
        ranks: the scores of their channels.
        ties: groups that can only shrink together.
        kept: what stays whole, and why.
        proof: what every cut is compared with.
        learned: the remembered numbers that were renewed last.
    """

    original: nn.Module
    model: nn.Module
    training: bool
    inputs: Arguments
    macs: int
    seen: Seen
    labels: np.ndarray
    groups: list[Group]
    ranks: list[np.ndarray]
    ties: list[list[Group]]
    kept: list[Skipped]
    proof: Proof
    learned: Kinds

    def _while_proved(self, pick: Callable[[Sequence[Sequence[Group]]], list[np.ndarray]]) -> nn.Module:
        """Cut; groups whose cut is not proved are tied or kept whole, until it is."""
        while True:
            gone = pick(self.ties)
            if self.proof.masked is not None and not any(chosen.any() for chosen in gone):
                self._refuse_masked()
            problem, kinds = self._problem(list(range(len(gone))), gone)
            if not problem:
                return self._finished(gone, self._least(gone, kinds))
            self._exclude(gone, pick)

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

    def _exclude(
        self, gone: Sequence[np.ndarray], pick: Callable[[Sequence[Sequence[Group]]], list[np.ndarray]], *, tied: bool = True
    ) -> None:
        """Find the groups that cannot be cut so: they are tied to one another (`ties.py`), or else kept whole from now on."""
        good, bad = self._sorted(gone)

        def works(tie: list[Group]) -> bool:
            places = [i for i, group in enumerate(self.groups) if any(group is other for other in tie)]
            if tie in self.ties or self._problem([*good, *places], pick([*self.ties, tie]))[0]:
                return False
            self.ties.append(tie)
            good.extend(places)
            return True

        if tied:
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

    def _refuse_masked(self) -> NoReturn:
        raise ModelError(
            f"shrink: masked=True, and no masked channel can be removed; {self.kept[-1].name} {self.kept[-1].reason}; "
            "Prune(pattern='channel', scope='coupled') masks what is coupled with a channel, too"
        )

    def _refuse_if_nothing(self) -> None:
        if self.groups:
            return
        if self.proof.masked:
            self._refuse_masked()
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
    now, what = " or ".join(map(str, renewal.options)), "what was so wide" if renewal.sure else "some of what was so wide"
    return Skipped(
        name=renewal.number.name,
        technique="shrink",
        reason=f"still says {renewal.number.value}, and {what} is {now} now; the forward pass does not need it changed",
    )
