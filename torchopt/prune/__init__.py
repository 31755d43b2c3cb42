"""Pruning: masks that follow a schedule, and channels really removed. Blind to clusters and quantization."""

from torchopt.prune.attach import attach, bake, mask_of
from torchopt.prune.config import Prune
from torchopt.prune.consistency import damaged
from torchopt.prune.coupled import Coupled, attach_coupled, couple
from torchopt.prune.rechosen import chooses, rechosen
from torchopt.prune.schedule import ConstantSparsity, CosineDecay, MultiStep, PolynomialDecay, Schedule
from torchopt.prune.score import GATHERS
from torchopt.prune.update import finish, gather, observes, unfinished, update

__all__ = [
    "GATHERS",
    "ConstantSparsity",
    "CosineDecay",
    "Coupled",
    "MultiStep",
    "PolynomialDecay",
    "Prune",
    "Schedule",
    "attach",
    "attach_coupled",
    "bake",
    "chooses",
    "couple",
    "damaged",
    "finish",
    "gather",
    "mask_of",
    "observes",
    "rechosen",
    "unfinished",
    "update",
]
