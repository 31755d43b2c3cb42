"""What to prune, when, and by which rule: the configuration of masks.

    m = 1 for the units whose score is among the largest, 0 for the rest

A unit is one weight ("element"), an h×w block of the weight's matrix view ("block"), the n of every m neighbours along the
input channels ("n:m"), or a whole output channel ("channel"). The field's values say which; there is no class per pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchopt.errors import ConfigError, nearest
from torchopt.prune.schedule import ConstantSparsity, Schedule, check_sparsity

PATTERNS = ("element", "block", "n:m", "channel")
POOLINGS = ("AVG", "MAX")
SCOPES = ("layer", "global", "coupled")
SCORES = ("magnitude", "taylor", "movement", "wanda", "hessian", "random")
RUNTIMES = ("ort-x86", "ort-x86-avx2", "ort-arm", "ort-web")  # where element zeros run no faster than other weights


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Masks for the weights that a rule matches.

    Attributes:
        schedule: when the masks change and how sparse they are; a plain number is `ConstantSparsity` at that sparsity. May be
            left out for "n:m", whose sparsity the pattern fixes.
        pattern: "element", "block", "n:m" or "channel"; "2:4" is short for `pattern="n:m", n=2, m=4`.
        block_size: (rows, columns) of a block on the matrix view (output channels, everything else) of the weight.
        block_pooling: a block's score is the "AVG" or the "MAX" of its elements' scores.
        n: how many of every `m` weights along the input channels are KEPT (NVIDIA's reading of n:m; TFMOT's `sparsity_m_by_n` and
            coremltools' `n_m_ratio` count the zeros instead: their (3, 5) is n=2, m=5 here).
        m: the size of a group of neighbours.
        scope: "layer" ranks each weight tensor by itself; "global" ranks all tensors with this same configuration together; "coupled",
            for channels, masks what each channel lies on in all layers that share it, biases and norms too, so that
            `shrink(model, inputs, masked=True)` removes exactly the masked channels. It needs `example_inputs`.
        min_keep: with "global", the fraction of each tensor that survives at least.
        score: "magnitude" |w|; "taylor" Σ|w·∂L/∂w| and "movement" -Σ w·∂L/∂w over the steps so far, or the samples given to
            `one_shot`; "wanda" |w|·‖x‖ with x the layer's inputs seen so far; "hessian", for `one_shot`, what the outputs lose
            when the other weights take up what goes (OBC, Frantar et al. 2022, arXiv 2208.11580); "random".
        seed: of the "random" score.
        include_depthwise: mask depthwise convolutions too.
        only_where_faster: a runtime ("ort-x86"): leave alone what that runtime would not run faster, and say so in the report.

    Raises:
        ConfigError: a field is out of its range, or two fields contradict each other.

    Example:
        >>> Prune(schedule=0.8).schedule.final
        0.8
        >>> Prune(pattern="1:4").schedule.final
        0.75
    """

    schedule: Schedule | float | None = None
    pattern: str = "element"
    block_size: Sequence[int] = (1, 1)
    block_pooling: Literal["AVG", "MAX"] = "AVG"
    n: int | None = None
    m: int | None = None
    scope: Literal["layer", "global", "coupled"] = "layer"
    min_keep: float = 0.0
    score: Literal["magnitude", "taylor", "movement", "wanda", "hessian", "random"] = "magnitude"
    seed: int = 0
    include_depthwise: bool = False
    only_where_faster: str | None = None

    def __post_init__(self) -> None:
        self._expand_ratio()
        for name, allowed in (("pattern", PATTERNS), ("block_pooling", POOLINGS), ("scope", SCOPES), ("score", SCORES)):
            _check_choice(f"Prune.{name}", getattr(self, name), allowed)
        if self.only_where_faster is not None:
            _check_choice("Prune.only_where_faster", self.only_where_faster, RUNTIMES)
        self._check_block()
        self._check_ratio()
        self._check_schedule()
        self._check_scope()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"Prune.seed: got {self.seed!r}; a whole number of at least 0 is needed")

    @property
    def timing(self) -> Schedule:
        """The schedule as an object, also where a plain sparsity was given."""
        assert self.schedule is not None
        assert not isinstance(self.schedule, int | float)
        return self.schedule

    def _expand_ratio(self) -> None:
        """Read pattern="2:4" as pattern="n:m", n=2, m=4."""
        left, colon, right = self.pattern.partition(":") if isinstance(self.pattern, str) else ("", "", "")
        if not (colon and left.isdigit() and right.isdigit()):
            return
        if self.n is not None or self.m is not None:
            raise ConfigError(f"Prune.pattern: got {self.pattern!r} and n={self.n}, m={self.m}; give the ratio once")
        self._set(n=int(left), m=int(right), pattern="n:m")

    def _check_block(self) -> None:
        size = self.block_size
        if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2 or not all(_positive(side) for side in size):
            raise ConfigError(f"Prune.block_size: got {size!r}; two whole numbers of at least 1 are needed, (rows, columns)")
        self._set(block_size=tuple(size))
        if self.block_size == (1, 1) and self.pattern == "block":
            raise ConfigError("Prune.block_size: got (1, 1) with pattern='block'; give a larger block, or pattern='element'")
        if self.block_size != (1, 1) and self.pattern != "block":
            raise ConfigError(f"Prune.block_size: got {self.block_size} with pattern={self.pattern!r}; add pattern='block'")

    def _check_ratio(self) -> None:
        if self.pattern != "n:m":
            if self.n is not None or self.m is not None:
                raise ConfigError(f"Prune.n: got n={self.n}, m={self.m} with pattern={self.pattern!r}; add pattern='n:m'")
            return
        if not _positive(self.n) or not _positive(self.m) or self.n >= self.m:  # type: ignore[operator]
            raise ConfigError(
                f"Prune.n: got n={self.n}, m={self.m}; n of every m weights are kept, so 1 <= n < m is needed, such as n=2, m=4"
            )

    def _check_schedule(self) -> None:
        ratio = 1.0 - self.n / self.m if self.n is not None and self.m is not None else None
        if self.schedule is None and ratio is not None:
            self._set(schedule=ConstantSparsity(target_sparsity=ratio))
        if isinstance(self.schedule, int | float):
            check_sparsity("Prune.schedule", self.schedule)
            self._set(schedule=ConstantSparsity(target_sparsity=float(self.schedule)))
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(
                f"Prune.schedule: got {self.schedule!r}; a sparsity such as 0.8, or a schedule such as "
                "PolynomialDecay(final_sparsity=0.8, end_step=1000), is needed"
            )
        if ratio is not None and abs(self.schedule.final - ratio) > 1e-6:
            raise ConfigError(
                f"Prune.schedule: ends at sparsity {self.schedule.final}, but {self.n} kept of every {self.m} is "
                f"{ratio:.6g}; end at that, or leave the schedule out"
            )

    def _check_scope(self) -> None:
        check_sparsity("Prune.min_keep", self.min_keep)
        if self.min_keep and self.scope != "global":
            raise ConfigError(f"Prune.min_keep: got {self.min_keep} with scope={self.scope!r}; add scope='global'")
        if self.min_keep > 1.0 - self.timing.final + 1e-9:
            raise ConfigError(
                f"Prune.min_keep: got {self.min_keep}, which forbids a sparsity of {self.timing.final}; "
                f"at most {1.0 - self.timing.final:.6g} is possible"
            )
        if self.scope == "coupled" and self.pattern != "channel":
            raise ConfigError(
                f"Prune.scope: got 'coupled' with pattern={self.pattern!r}; coupled channels need pattern='channel'"
            )
        if self.pattern == "n:m" and self.scope == "global":
            raise ConfigError(
                "Prune.scope: got 'global' with pattern='n:m', which keeps n of every m everywhere; use scope='layer'"
            )

    def _set(self, **fields: object) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)


def _check_choice(where: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{where}: got {value!r}; one of {', '.join(allowed)} is needed{nearest(str(value), allowed)}")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
