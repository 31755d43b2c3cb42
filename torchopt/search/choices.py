"""What may be done with one layer: an option is a share of zeros, a number of values and a number of bits; or the layer stays float.

float                      as it is
bits                       integers, a scale a channel
values (+ bits)            K integers a tensor, a scale a channel: log2 K bits a weight
sparsity + values          where the nonzeros are, and log2 K bits for each of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchopt.cluster import Cluster
from torchopt.errors import ConfigError
from torchopt.network.weights import Weight
from torchopt.prune import Prune
from torchopt.quantize import Quantize
from torchopt.rules import Rule
from torchopt.solver.positions import readable

MOST_VALUES = 255  # beside a mask's zero


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing to do with a layer.

    Attributes:
        sparsity: the share of zeros.
        values: how many values the other weights have, all together; None leaves that to the bits.
        bits: of an integer weight; None keeps the layer float.

    Example:
        >>> print(Option(sparsity=0.5, values=16), Option(), Option(bits=None))
        50% zeros, 16 values 8 bits float
    """

    sparsity: float = 0.0
    values: int | None = None
    bits: int | None = 8

    def __str__(self) -> str:
        if self.bits is None:
            return "float"
        words = [f"{self.sparsity:.0%} zeros"] if self.sparsity else []
        words += [f"{self.values} values"] if self.values else []
        words += [f"{self.bits} bits"] if self.bits != 8 or not words else []
        return ", ".join(words)

    def rule(self, weight: Weight, mode: str = "static", *, trains: bool = False) -> Rule:
        """Return the rule that does this to one weight.

        Args:
            weight: which.
            mode: of `Quantize`: "static", or "weight_only" for float activations.
            trains: whether training follows; else the solver chooses the zeros.
        """
        if self.bits is None:
            return Rule(weight.name)
        solved = readable(weight.module) and weight.param == "weight" and not trains
        score = "hessian" if solved else "magnitude"
        prune = Prune(schedule=self.sparsity, score=score, include_depthwise=True) if self.sparsity else None  # type: ignore[arg-type]
        count = None if self.values is None else self.values + (self.sparsity > 0)  # a mask's zero stands beside the values
        cluster = None if count is None else Cluster(n_clusters=count, include_depthwise=True)
        return Rule(weight.name, prune=prune, cluster=cluster, quantize=Quantize(mode=mode, weight_bits=self.bits))


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options that each layer is tried with: every sparsity with every number of values, and every number of bits.

    Attributes:
        sparsities: shares of zeros; 0 is always tried too.
        values: numbers of distinct values, zeros not counted.
        bits: of integer weights without shared values.
        keep_float: try leaving a layer float too.

    Raises:
        ConfigError: a number is out of its range.

    Example:
        >>> [str(option) for option in Choices(sparsities=(0.5,), values=(16,), bits=(8,)).options()]
        ['float', '8 bits', '16 values', '50% zeros, 16 values']
    """

    sparsities: Sequence[float] = (0.65, 0.8, 0.9)
    values: Sequence[int] = (64, 32, 16, 8, 4, 2)
    bits: Sequence[int] = (8,)
    keep_float: bool = True

    def __post_init__(self) -> None:
        checks = (
            ("sparsities", self.sparsities, lambda s: isinstance(s, int | float) and 0 <= s < 1, "shares from 0 to below 1"),
            (
                "values",
                self.values,
                lambda v: isinstance(v, int) and 2 <= v <= MOST_VALUES,
                f"whole numbers from 2 to {MOST_VALUES}",
            ),
            ("bits", self.bits, lambda b: isinstance(b, int) and 2 <= b <= 8, "whole numbers from 2 to 8"),
        )
        for name, given, fine, right in checks:
            listed = isinstance(given, Sequence) and not isinstance(given, str)
            if not listed or not all(not isinstance(g, bool) and fine(g) for g in given):
                raise ConfigError(f"Choices.{name}: got {given!r}; a list of {right} is needed")
        if not self.bits and not self.values:
            raise ConfigError("Choices: got no bits and no values; at least one of bits=(8,) and values=(16,) is needed")

    def options(self) -> list[Option]:
        """Return them, the largest first; more than 4 values under zeros, or fewer without, are only tried where no others are."""
        counts = sorted(set(self.values), reverse=True)
        many, few = [c for c in counts if c >= 4] or counts, [c for c in counts if c <= 4] or counts
        found = [Option(bits=None)] if self.keep_float else []
        found += [Option(bits=bits) for bits in sorted(set(self.bits), reverse=True)]
        found += [Option(values=count) for count in many]
        under: Sequence[int | None] = few or (None,)
        return found + [Option(sparsity=s, values=count) for s in sorted({s for s in self.sparsities if s}) for count in under]
