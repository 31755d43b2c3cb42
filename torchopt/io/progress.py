"""Progress bars on stderr through rich: shown on a terminal, silent elsewhere, so that pipes and logs stay clean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torchopt.io.importing import unnoticed

with unnoticed():  # styles are numbered by Python's random numbers
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, enabled: bool = True, total: int | None = None) -> Iterator[Item]:
    """Iterate over `items` with a progress bar on stderr.

    Args:
        items: anything iterable; its length is used for the bar when it has one.
        description: what is being done, in a few words.
        enabled: False iterates silently.
        total: the number of items, when `items` has no length.

    Example:
        >>> list(track([1, 2, 3], "counting"))
        [1, 2, 3]
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield from items
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(items, total=total if total is not None else length(items), description=description)


def length(items: Iterable[object]) -> int | None:
    """Return `len(items)` where it has one, else None."""
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None
