"""Pruning: masks that follow a schedule, and channels really removed. Blind to clusters and quantization."""

from torchopt.prune.attach import attach, bake, mask_of
from torchopt.prune.config import Prune
from torchopt.prune.update import finish, observes, unfinished, update
from torchopt.schedule import ConstantSparsity, CosineDecay, MultiStep, PolynomialDecay, Schedule

__all__ = [
    "ConstantSparsity",
    "CosineDecay",
    "MultiStep",
    "PolynomialDecay",
    "Prune",
    "Schedule",
    "attach",
    "bake",
    "finish",
    "mask_of",
    "observes",
    "unfinished",
    "update",
]
