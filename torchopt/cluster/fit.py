"""Which values stand for a weight's: a table for each group of channels, by k-means, or exactly those that are there already.

Zero is among them where it is pinned, as entry 0, so that masked weights have a code. Masks are left out of the data: the other entries
stand for what remains. Where an earlier round has left few distinct values, they are the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torchopt.cluster.config import MOST_CLUSTERS, Cluster
from torchopt.cluster.tables.kmeans import kmeans
from torchopt.cluster.tables.points import Array
from torchopt.errors import RuleError


def tables(
    value: Tensor,
    mask: Tensor | None,
    config: Cluster,
    *,
    out_axis: int,
    pinned: bool,
    preserve: bool,
    importance: Tensor | None = None,
    room: int | None = None,
) -> Tensor | str:
    """Return a table for each group of channels (groups, k), of the weight's dtype, or say why the weight should have none.

    Args:
        value: the weight.
        mask: bool, of its shape; masked weights do not count.
        config: how many values, and how they are found.
        out_axis: the axis of the output channels, along which groups run.
        pinned: entry 0 of each group is 0.
        preserve: few distinct values are those of an earlier round, and stay.
        importance: masses of the weights, of their shape.
        room: entries that a table has already, which a new one must fit into; then a weight of few distinct values has a table too.

    Example:
        >>> weight = torch.tensor([[1.0, 1.0, 1.2, 3.0], [3.2, 3.0, 1.0, 1.2]])
        >>> config = Cluster(n_clusters=2)
        >>> tables(weight, None, config, out_axis=0, pinned=False, preserve=False)
        tensor([[1.0800, 3.0667]])
    """
    groups = _groups(value, config, out_axis)
    rows, kept = _rows(value, groups, out_axis), None if mask is None else _rows(mask, groups, out_axis).astype(bool)
    found = [np.unique(row if kept is None else row[kept[i]]) for i, row in enumerate(rows)]
    reason = _too_few(found, rows.shape[1], config, preserve)
    if reason and room is None:
        return reason
    masses = None if importance is None else _rows(importance, groups, out_axis)
    entries = []
    for i, distinct in enumerate(found):
        chosen = slice(None) if kept is None else kept[i]
        entries.append(_table(rows[i][chosen], distinct, config, pinned, None if masses is None else masses[i][chosen], room))
    return torch.from_numpy(_padded(entries)).to(value.dtype).to(value.device)


def _table(
    values: Array, distinct: Array, config: Cluster, pinned: bool, importance: Array | None, room: int | None = None
) -> Array:
    """The entries of one group, ascending, but a pinned 0 first."""
    own = distinct[distinct != 0] if pinned else distinct
    fit = room is None or len(own) + pinned <= room
    if fit and len(own) <= config.n_clusters and len(distinct) <= MOST_CLUSTERS - pinned:
        entries: Array = distinct.astype(np.float64)
    elif pinned and config.n_clusters == 2:
        raise RuleError("cluster: n_clusters=2 with zero kept leaves one other value for both signs; use n_clusters=3 or more")
    else:
        entries = kmeans(
            values,
            config.n_clusters,
            init=config.init,
            importance=importance,
            pin_zero=pinned,
            iterations=config.iterations,
            seed=config.seed,
        )
    return np.concatenate(([0.0], entries[entries != 0])) if pinned else entries


def _too_few(found: Sequence[Array], size: int, config: Cluster, preserve: bool) -> str | None:
    """Why the weights are left as they are: no more distinct values than clusters, unless an earlier round shared them."""
    most = max(len(distinct) for distinct in found)
    if most > config.n_clusters:
        return None
    if preserve and most >= 2 and 2 * most <= size:
        return None
    return f"{most} distinct values, no more than n_clusters={config.n_clusters}"


def _padded(tables: Sequence[Array]) -> Array:
    """Tables of unequal length as one array; the last entry is repeated."""
    most = max(map(len, tables))
    return np.stack([np.concatenate((t, np.full(most - len(t), t[-1]))) for t in tables])


def _groups(value: Tensor, config: Cluster, out_axis: int) -> int:
    if not config.per_channel:
        return 1
    channels = value.shape[out_axis]
    if channels % config.channels_per_table:
        raise RuleError(
            f"cluster: channels_per_table={config.channels_per_table} does not divide {channels} output channels; "
            "use a divisor of every layer's channels"
        )
    return channels // config.channels_per_table


def _rows(value: Tensor, groups: int, out_axis: int) -> Array:
    """A tensor as a (groups, n / groups) array, bfloat16 and half as float32."""
    value = value.detach().cpu()
    if groups > 1 and out_axis:
        value = value.movedim(out_axis, 0)
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    rows: Array = value.reshape(groups, -1).numpy()
    return rows
