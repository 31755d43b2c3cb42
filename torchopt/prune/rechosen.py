"""A mask chosen anew by scores from outside, with as many units as it has: for a solver that knows more than any score here.

What the weights that stay can take up shows only once others have gone. So a mask may be chosen in stages, each with its share of the
units that go in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.network.weights import Weight
from torchopt.prune.attach import in_axis
from torchopt.prune.mask import Mask, find_mask
from torchopt.prune.pattern import largest_of_groups, pool, spread
from torchopt.prune.select import Scores, keep_largest


def chooses(weight: Weight) -> bool:
    """True where the mask on a weight waits for such scores."""
    mask = find_mask(weight.module, weight.param)
    return mask is not None and mask.config.score == "hessian" and not mask.couplings


def rechosen(weight: Weight, scores: Tensor, share: float) -> Tensor:
    """Return the mask that keeps the largest scores, bool, in the pattern of the one on the weight.

    Args:
        weight: under a mask.
        scores: of the weight's shape; −∞ for what must go.
        share: of the units that the mask takes away, how many go now, 0 to 1.
    """
    mask = _mask(weight)
    now, config = mask.mask(weight.module), mask.config
    if config.pattern == "n:m":
        assert config.n is not None
        assert config.m is not None
        return largest_of_groups(
            scores, max(config.n, round(config.m - (config.m - config.n) * share)), config.m, in_axis(mask.out_axis)
        )
    scores = scores if config.pattern == "element" else scores.clamp(min=0)
    units = pool(scores.float() if scores.dtype != torch.float64 else scores, config, mask.out_axis).contiguous()
    there = pool(now.float(), config, mask.out_axis) > 0
    gone = round((there.numel() - int(there.sum())) * share)
    kept = keep_largest([Scores(name=weight.name, values=units)], max(1, units.numel() - gone))[0]
    return spread(kept, scores.shape, config, mask.out_axis)


def _mask(weight: Weight) -> Mask:
    mask = find_mask(weight.module, weight.param)
    assert mask is not None
    return mask
