"""Groups that can only shrink together.

Code such as `reshape(batch, length, heads, width // heads)` runs only where the heads of an attention together are as wide as the
embedding: neither can shrink alone, both together can. The halves of a `chunk` must stay equally wide. Which groups those are is found
by trial: groups of equal width that fail alone are tied, all of them or those that lie near one another in the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from torchopt.channels.groups import Group, scope

MOST = 24  # trials a width: each is a proof
FEW = 4  # so many groups are also tried in pairs


def find_ties(bad: Sequence[Group], works: Callable[[list[Group]], bool]) -> list[list[Group]]:
    """Return which of the groups can be cut when they keep equally many features.

    Args:
        bad: groups that cannot be cut alone.
        works: tries a tie; a tie that works stays in force for later trials.
    """
    by_width: dict[int, list[Group]] = {}
    for group in bad:
        by_width.setdefault(len(group) * group.unit, []).append(group)
    found: list[list[Group]] = []
    for members in by_width.values():
        tied: set[int] = set()
        for tie in _candidates(members, tied):
            if works(tie):
                found.append(tie)
                tied |= {id(group) for group in tie}
    return found


def _candidates(members: Sequence[Group], tied: set[int]) -> Iterator[list[Group]]:
    """All together, then those within one module, from the innermost outwards; a few also in pairs. The tied ones are done."""
    tried: set[frozenset[int]] = set()
    if len(members) > 1:
        tried.add(frozenset(map(id, members)))
        yield list(members)
    paths = {id(group): scope(group).split(".") for group in members}
    for depth in range(max((len(path) for path in paths.values()), default=0), -1, -1):
        near: dict[tuple[str, ...], list[Group]] = {}
        for group in members:
            if len(paths[id(group)]) >= depth:
                near.setdefault(tuple(paths[id(group)][:depth]), []).append(group)
        for together in near.values():
            sizes = (len(together), *([2] if 2 < len(together) <= FEW else []))
            for size in sizes:
                for tie in combinations(together, size):
                    left = [group for group in tie if id(group) not in tied]
                    key = frozenset(map(id, left))
                    if len(left) > 1 and key not in tried and len(tried) < MOST and (size == len(together) or len(left) == size):
                        tried.add(key)
                        yield left
