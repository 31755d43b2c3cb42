"""What to cluster, into how many values, and how they are found and trained: the configuration of tables.

    ŵ = T[c]        c = argmin_j |w - T[j]|        T has 2 … 256 entries

The defaults differ from TensorFlow Model Optimization's on purpose: `init="optimal"` has never more error than k-means++ and needs no luck,
and `gradient="mean"` lets a table entry move as its members do, so that the learning rate keeps its meaning whatever the size of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torchopt.errors import ConfigError, nearest

INITS = ("optimal", "kmeans++", "linear", "density", "random")
GRADIENTS = ("mean", "sum")
IMPORTANCES = ("even", "fisher")
MOST_CLUSTERS = 256  # a code is one byte


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Shared values for the weights that a rule matches.

    Attributes:
        n_clusters: how many distinct values a table has, 2 … 256; a pinned zero is one of them.
        init: where k-means starts: "optimal" (the global optimum, by dynamic programming), "kmeans++", "linear" (evenly from the
            smallest to the largest weight), "density" (evenly in the cumulative distribution), "random" (uniform).
        iterations: Lloyd iterations after the start, at most; 0 keeps the start, as TensorFlow Model Optimization does.
        per_channel: a table for each output channel instead of one for the tensor.
        channels_per_table: with `per_channel`, how many neighbouring output channels share a table.
        gradient: a table entry gets the "mean" or the "sum" of its members' gradients.
        frequency: the nearest entry of each weight is found anew every so many steps.
        soft_until: the optimizer step until which assignment is soft (DKM, Cho et al. 2022, arXiv 2108.12659); 0 is hard from the
            start. Give it a third of the steps or more after that: batch norms must see the hard weights before the model is final.
        temperature: of the soft assignment at first, in units of the squared distance between neighbouring entries; it falls
            linearly to 0, which is hard.
        table_bits: 2 … 8 puts the table on a symmetric integer grid of that many bits; None leaves it in floating point.
        importance: what k-means weighs each weight by, where `one_shot` finds the table: "even", or "fisher", its squared gradients
            over the samples given (Kim et al. 2023, arXiv 2306.07629), of the loss given or else of the outputs.
        seed: of the "kmeans++" and "random" starts.
        include_depthwise: cluster depthwise convolutions too.
        skip_first: leave the first of the matched layers alone.

    Raises:
        ConfigError: a field is out of its range, or two fields contradict each other.

    Example:
        >>> Cluster(n_clusters=16).init
        'optimal'
    """

    n_clusters: int
    init: Literal["optimal", "kmeans++", "linear", "density", "random"] = "optimal"
    iterations: int = 300
    per_channel: bool = False
    channels_per_table: int = 1
    gradient: Literal["mean", "sum"] = "mean"
    frequency: int = 1
    soft_until: int = 0
    temperature: float = 0.1
    table_bits: int | None = None
    importance: Literal["even", "fisher"] = "even"
    seed: int = 0
    include_depthwise: bool = False
    skip_first: bool = False

    def __post_init__(self) -> None:
        _check_whole("n_clusters", self.n_clusters, 2, MOST_CLUSTERS)
        _check_choice("init", self.init, INITS)
        _check_choice("gradient", self.gradient, GRADIENTS)
        _check_choice("importance", self.importance, IMPORTANCES)
        _check_whole("iterations", self.iterations, 0)
        _check_whole("channels_per_table", self.channels_per_table, 1)
        _check_whole("frequency", self.frequency, 1)
        _check_whole("seed", self.seed, 0)
        _check_whole("soft_until", self.soft_until, 0)
        if self.table_bits is not None:
            _check_whole("table_bits", self.table_bits, 2, 8)
        for name in ("per_channel", "include_depthwise", "skip_first"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"Cluster.{name}: got {getattr(self, name)!r}; true or false is needed")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float) or not 0 < self.temperature <= 10:
            raise ConfigError(f"Cluster.temperature: got {self.temperature!r}; a number in (0, 10] is needed")
        if self.channels_per_table > 1 and not self.per_channel:
            raise ConfigError(
                f"Cluster.channels_per_table: got {self.channels_per_table} with per_channel=False; set per_channel=True as well"
            )
        if self.table_bits is not None and self.n_clusters > 2**self.table_bits - 1:
            raise ConfigError(
                f"Cluster.table_bits: {self.table_bits} bits hold {2**self.table_bits - 1} symmetric integers, fewer than "
                f"n_clusters={self.n_clusters}; use more bits or at most {2**self.table_bits - 1} clusters"
            )


def check_clusters(value: object) -> None:
    """Refuse a number of clusters that is not a whole number from 2 to 256.

    Raises:
        ConfigError: it is not.
    """
    _check_whole("n_clusters", value, 2, MOST_CLUSTERS)


def check_init(value: object) -> None:
    """Refuse an unknown start of k-means.

    Raises:
        ConfigError: it is unknown.
    """
    _check_choice("init", value, INITS)


def _check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    if not right:
        span = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"Cluster.{name}: got {value!r}; a whole number {span} is needed")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"Cluster.{name}: got {value!r}; one of {', '.join(map(repr, allowed))} is needed{nearest(str(value), allowed)}"
        )
