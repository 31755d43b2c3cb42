"""Which weights live and die together: elements, blocks, n of every m, channels.

A weight of any rank is looked at as a matrix (output channels, everything else), W  # (out, in·kh·kw). The score of a unit is
pooled from its elements' scores, and the decision per unit is spread over its elements again. For "n:m" the groups run along
the input channels, which is how sparse kernels read them (Zhou et al., "Learning N:M fine-grained structured sparse neural
networks from scratch", 2021, arXiv 2102.04010); a last group that is not full keeps its n largest.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torchopt.prune.config import Prune


def pool(score: torch.Tensor, config: Prune, out_axis: int) -> torch.Tensor:
    """Return one score per unit.

    Args:
        score: a score per weight, of the weight's shape.
        config: pattern "element", "block" or "channel".
        out_axis: the axis of the output channels.

    Returns:
        "element": `score`; "channel": the mean score of each output channel, (out,); "block": AVG or MAX over each block of the
        matrix view, (ceil(out / h), ceil(rest / w)); a block cut off by the edge counts only the elements that exist.
    """
    if config.pattern == "element":
        return score
    matrix = _matrix(score, out_axis)
    if config.pattern == "channel":
        return matrix.mean(dim=1)
    return pool_blocks(matrix, (config.block_size[0], config.block_size[1]), config.block_pooling)


def pool_blocks(matrix: torch.Tensor, size: tuple[int, int], pooling: str) -> torch.Tensor:
    """Pool a matrix over blocks of `size`; those at the edge are smaller, and are averaged over what they have.

    Example:
        >>> pool_blocks(torch.tensor([[1.0, 3.0, 5.0]]), (1, 2), "AVG").tolist()
        [[2.0, 5.0]]
    """
    image = matrix[None, None]  # (1, 1, rows, columns)
    if pooling == "MAX":
        return F.max_pool2d(image, size, size, ceil_mode=True)[0, 0]
    return F.avg_pool2d(image, size, size, ceil_mode=True, count_include_pad=False)[0, 0]


def spread(units: torch.Tensor, shape: torch.Size, config: Prune, out_axis: int) -> torch.Tensor:
    """Return the mask of a weight, bool of `shape`, from the decisions per unit that `pool` numbered."""
    if config.pattern == "element":
        return units
    moved = _moved(shape, out_axis)
    rows, columns = moved[0], moved.numel() // moved[0]
    if config.pattern == "channel":
        matrix = units[:, None].expand(rows, columns)
    else:
        height, width = config.block_size
        matrix = units.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return matrix.reshape(moved).movedim(0, out_axis)


def largest_of_groups(score: torch.Tensor, n: int, m: int, in_axis: int) -> torch.Tensor:
    """Return the mask that keeps the `n` largest of every `m` neighbours along `in_axis`; of equal ones, the first.

    Example:
        >>> largest_of_groups(torch.tensor([[0.49, 0.66, 0.42]]), 1, 2, 1).tolist()
        [[False, True, True]]
    """
    rows = score.movedim(in_axis, -1)  # (..., in)
    missing = -rows.shape[-1] % m
    groups = F.pad(rows, (0, missing), value=-torch.inf).unflatten(-1, (-1, m))  # (..., groups, m)
    members = groups.unbind(-1)
    kept = torch.stack([_rank(members, i) < n for i in range(m)], dim=-1)
    return kept.flatten(-2)[..., : rows.shape[-1]].movedim(-1, in_axis)


def conforms(weight: torch.Tensor, n: int, m: int, in_axis: int = 1) -> bool:
    """True where no `m` neighbours along `in_axis` hold more than `n` weights that are not zero; a ragged last group counts too.

    Example:
        >>> conforms(torch.tensor([[1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 7.0]]), 2, 4)
        False
        >>> conforms(torch.tensor([[1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0]]), 2, 4)
        True
    """
    rows = (weight != 0).movedim(in_axis, -1)
    groups = F.pad(rows, (0, -rows.shape[-1] % m)).unflatten(-1, (-1, m))
    return bool((groups.sum(dim=-1) <= n).all())


def _rank(members: tuple[torch.Tensor, ...], i: int) -> torch.Tensor:
    """How many members of each group come before member `i`: larger ones, and equal ones with a lower index."""
    mine, count = members[i], torch.zeros(members[i].shape, dtype=torch.int32, device=members[i].device)
    for j, other in enumerate(members):
        if j != i:
            count += (other >= mine) if j < i else (other > mine)
    return count


def _matrix(values: torch.Tensor, out_axis: int) -> torch.Tensor:
    return values.movedim(out_axis, 0).flatten(1)


def _moved(shape: torch.Size, out_axis: int) -> torch.Size:
    """Return the shape with the output channels first."""
    return torch.Size([shape[out_axis], *(size for axis, size in enumerate(shape) if axis != out_axis)])
