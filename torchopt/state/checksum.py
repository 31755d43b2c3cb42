"""A number that goes with whole numbers as they were written, and not with what others make of them: an average, or a part replaced.

    seal ← (seal + 1)·μ + Σ words        over blocks of the tensor's bytes, eight to a word, and in the end folded to 32 bits

Codes and counters say which, not how much: the mean of two codes is a third code, of a value that has nothing to do with them.
Averages of a model's buffers make such means without a word. The seal is written wherever codes or a counter are, and is no longer
right after anything else has touched either. It costs one pass over a byte a weight: half a millisecond for those of ResNet-18.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 16  # words
MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 divided by the golden ratio: odd, and without pattern (Knuth, vol. 3, §6.4)


@torch.no_grad()
def seal(values: Tensor) -> Tensor:
    """Return the seal of a tensor of whole numbers, int32 of shape ().

    Example:
        >>> codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
        >>> torch.equal(seal(codes), seal(codes.clone())), torch.equal(seal(codes), seal(codes + 1))
        (True, False)
    """
    octets = values.detach().contiguous().view(-1).view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()
    whole = len(octets) - len(octets) % 8
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in octets[:whole].view(torch.int64).split(BLOCK) if whole else ():
        total = (total + 1) * MIX + part.sum()
    rest = octets[whole:].long()
    total = (total + 1) * MIX + (rest << (8 * torch.arange(len(rest), device=rest.device))).sum()
    return (total ^ (total >> 32)).to(torch.int32)
