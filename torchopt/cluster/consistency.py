"""Whether codes are those that the last step has left, near their weights, and asked for at one place: looked at instead of trusted."""

from __future__ import annotations

import torch
from torch import nn

from torchopt.cluster.assign import assign_
from torchopt.cluster.attach import shared_weights

MANY, STALE = 0.25, 1.5  # codes that are not the nearest, and times the error of those that are: 0 and 1.0 after a step


def damaged(model: nn.Module) -> str | None:
    """Say which codes of `model` are not those that the last step has left, and how that is seen; None where all are."""
    for weight, shared in shared_weights(model):
        entries = shared.table.shape[1]
        if int(shared.codes.max()) >= entries:
            return f"the codes of {weight.name} go up to {int(shared.codes.max())}, and its table has {entries} entries"
        if not shared.intact:
            return f"the codes of {weight.name} are not those that its last step has left"
        if not bool(torch.isfinite(shared.table).all()):
            return f"the table of {weight.name} holds NaN or infinity"
    return None


@torch.no_grad()
def stale(model: nn.Module) -> str | None:
    """Say which codes of `model` are those of other weights: their error is well above the one of the nearest codes; else None."""
    for weight, shared in {id(shared): (weight, shared) for weight, shared in shared_weights(model) if not shared.soft}.values():
        if shared.scales is not None:
            continue  # codes and scales were found together, and no step follows
        mask, value = weight.module._buffers.get(f"{weight.param}_mask"), weight.trainable.detach()
        value = shared.grouped(value if mask is None else value * mask).float()
        table = shared.values().detach()
        nearest = assign_(torch.empty_like(shared.codes), value, table)
        now, best = (float((table.gather(1, codes.long()).float() - value).square().mean()) for codes in (shared.codes, nearest))
        changed = float((nearest != shared.codes).float().mean())
        if changed > MANY and now > STALE * best:
            times = now / max(best, 1e-30)
            return f"{changed:.0%} of the codes of {weight.name} are not the nearest to its weights, and have {times:.1f} times the error"
    return None


def evaluations(model: nn.Module) -> int:
    """Return at how many places the tables of `model` were evaluated in training since the last step, at most."""
    return max((shared.evaluations for _, shared in shared_weights(model)), default=0)
