"""Which remembered numbers are given new values: those by whose name it is plain, and those without which forward does not run.

The proof decides. Sets of kinds of numbers are tried, the most natural first; what the proof does not need, and no name tells, is left
as it was and named in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from torchopt.channels.remembered import Renewal, put

Kinds = frozenset[tuple[tuple[object, ...], int]]  # kinds of numbers, and which of their options: 0 the smallest, 1 the largest


@dataclass
class Renewals:
    """What may be renewed in one smaller network.

    Attributes:
        found: the numbers and what they could say.
        learned: a set of kinds that was right before; it is tried first.
    """

    found: Sequence[Renewal]
    learned: Kinds = field(default=frozenset())

    def kinds(self, *, telling: bool | None = None, sure: bool | None = None, option: int = 0) -> Kinds:
        """Return the kinds of these numbers."""
        return frozenset(
            (r.number.kind, option)
            for r in self.found
            if (telling is None or r.number.telling == telling) and (sure is None or r.sure == sure)
        )

    def trials(self) -> Iterator[Kinds]:
        """Sets of kinds, each once: the plain ones, all that are sure, then those that several axes explain; at last none."""
        plain, sure = self.kinds(telling=True, sure=True), self.kinds(sure=True)
        doubtful = self.kinds(telling=True, sure=False)
        known = {kind for kind, _ in plain | sure}
        fresh = lambda kinds: frozenset(k for k in kinds if k[0] not in known)  # noqa: E731 - of one kind, an instance may be sure
        learned = frozenset(k for k in self.learned if k[0] in {r.number.kind for r in self.found})
        tried: set[Kinds] = set()
        for kinds in (
            learned | plain,
            plain,
            sure,
            plain | fresh(doubtful),
            sure | fresh(doubtful),
            sure | fresh(self.kinds(sure=False)),
            sure | fresh(self.kinds(sure=False, option=1)),
            frozenset[tuple[tuple[object, ...], int]](),
        ):
            if kinds not in tried:
                tried.add(kinds)
                yield kinds

    def apply(self, model: nn.Module, kinds: Kinds) -> nn.Module:
        """Give the numbers of these kinds their new values, in place."""
        for renewal in self.found:
            for option in (0, 1):
                if (renewal.number.kind, option) in kinds:
                    put(model, renewal.number.module, renewal.number.path, renewal.options[-option])
        return model

    def stale(self, kinds: Kinds) -> list[Renewal]:
        """Return the numbers that keep an old value although the axes that they are about changed."""
        renewed = {kind for kind, _ in kinds}
        return [r for r in self.found if r.number.kind not in renewed and (r.number.telling or (r.sure and r.number.near))]
