"""Rules: which weight gets which compression. The first rule that matches a weight decides.

A rule's pattern is a glob over the dotted names of the modules that own weights (`layer1.*.conv2`; `*` crosses dots), or over the
weights' full names (`lstm.weight_hh_*`); `types` narrows it to classes of module, `params` names parameters that torchopt would
not take by itself (those of custom modules). A rule that matches nothing is a mistake; the error names the nearest candidates.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from torchopt.cluster import Cluster
from torchopt.errors import ConfigError, RuleError, nearest
from torchopt.network.weights import Weight, find_weight, has_parameter, weights
from torchopt.prune import Prune
from torchopt.quantize import Quantize


@dataclass(frozen=True)
class Rule:
    """What to do with the weights that a pattern matches; a technique left at None is not applied.

    Attributes:
        match: a glob over module names ("layer1.*.conv2") or weight names ("lstm.weight_hh_*"); "*" is every weight.
        types: module classes, or their names ("Linear"), that the rule is limited to; empty is all.
        params: parameters of the matched modules to take beside the usual ones, for custom modules ("kernel",).
        prune: masks (`torchopt.Prune`).
        cluster: shared values (`torchopt.Cluster`).
        quantize: the integer grid (`torchopt.Quantize`).

    Raises:
        ConfigError: the pattern is empty or a technique is not one of torchopt's configurations.

    Example:
        >>> Rule("classifier.*", quantize=Quantize()).match
        'classifier.*'
    """

    match: str = "*"
    types: Sequence[type[nn.Module] | str] = field(default=(), kw_only=True)
    params: Sequence[str] = field(default=(), kw_only=True)
    prune: Prune | None = field(default=None, kw_only=True)
    cluster: Cluster | None = field(default=None, kw_only=True)
    quantize: Quantize | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise ConfigError(f"Rule.match: got {self.match!r}; a glob over module names is needed, such as 'layer1.*' or '*'")
        for name, kind in (("prune", Prune), ("cluster", Cluster), ("quantize", Quantize)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"Rule.{name}: got {value!r}; torchopt.{kind.__name__}(...) or None is needed")
        for name in ("types", "params"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"Rule.{name}: got the string {value!r}; a list such as [{value!r}] is needed")

    def covers(self, weight: Weight) -> bool:
        """True where the pattern and the types of this rule match `weight`."""
        named = fnmatchcase(weight.module_name, self.match) or fnmatchcase(weight.name, self.match)
        return named and (not self.types or any(_is_a(weight.module, t) for t in self.types))

    @property
    def exact(self) -> bool:
        """True where the pattern names one thing, without wildcards."""
        return not any(c in self.match for c in "*?[")


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """A weight and the first rule that covers it."""

    weight: Weight
    rule: Rule


def assign(model: nn.Module, rules: Sequence[Rule]) -> list[Assigned]:
    """Give each weight of `model` the first rule that covers it; weights that none covers are left out.

    Args:
        model: the network.
        rules: in order of precedence.

    Raises:
        RuleError: `rules` is empty, or one matches nothing; the nearest names are given.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
        >>> [(a.weight.name, a.rule.match) for a in assign(net, [Rule("2", quantize=Quantize()), Rule("*", prune=None)])]
        [('0.weight', '*'), ('2.weight', '2')]
    """
    rules = checked(rules)
    candidates = _candidates(model, rules)
    for number, rule in enumerate(rules):
        if not any(rule.covers(w) for w in candidates) or not all(_owners(model, param) for param in rule.params):
            raise RuleError(_nothing_matched(model, number, rule, candidates))
    chosen = ((w, next((r for r in rules if r.covers(w)), None)) for w in candidates)
    return [Assigned(weight=w, rule=r) for w, r in chosen if r is not None]


def without_grids(rules: Sequence[Rule], assigned: Iterable[Assigned], names: Container[str]) -> list[Rule]:
    """Return the rules, preceded by one for each named weight that leaves its masks and tables and takes its integer grid away.

    Args:
        rules: in order of precedence.
        assigned: what `assign` gave of them.
        names: of weights.

    Example:
        >>> rules = [Rule("*", quantize=Quantize())]
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> [(r.match, r.quantize is None) for r in without_grids(rules, assign(net, rules), {"1.weight"})]
        [('1.weight', True), ('*', False)]
    """
    exact = [Rule(a.weight.name, prune=a.rule.prune, cluster=a.rule.cluster) for a in assigned if a.weight.name in names]
    return [*exact, *rules]


def checked(rules: Rule | Sequence[Rule]) -> list[Rule]:
    """Return rules as a list: one alone is a list of one.

    Raises:
        ConfigError: something else stands among them.
        RuleError: there is none.

    Example:
        >>> [rule.match for rule in checked(Rule("*", prune=None))]
        ['*']
    """
    if isinstance(rules, Rule):
        rules = [rules]
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ConfigError(f"rules: got {rule!r}; each must be a torchopt.Rule")
    if not rules:
        raise RuleError("rules: the list is empty; give at least one torchopt.Rule, such as Rule('*', quantize=Quantize())")
    return list(rules)


def _candidates(model: nn.Module, rules: Iterable[Rule]) -> list[Weight]:
    """The usual weights, followed by the parameters that rules name in `params`."""
    found = weights(model)
    known = {w.name for w in found} | {alias for w in found for alias in w.aliases}
    for rule in rules:
        for param in rule.params:
            for name in _owners(model, param):
                full = f"{name}.{param}" if name else param
                weight = find_weight(model, full)
                if weight is not None and full not in known and rule.covers(weight):
                    known.add(full)
                    found.append(weight)
    return found


def _owners(model: nn.Module, param: str) -> list[str]:
    return [name for name, module in model.named_modules() if has_parameter(module, param)]


def _nothing_matched(model: nn.Module, number: int, rule: Rule, candidates: Sequence[Weight]) -> str:
    where = f"rule {number + 1} (match={rule.match!r})"
    missing = [param for param in rule.params if not _owners(model, param)]
    if missing:
        params = sorted({name.rpartition(".")[2] for name, _ in model.named_parameters()})
        return f"{where}: no module has a parameter {missing[0]!r}{nearest(missing[0], params)}"
    names = sorted({w.module_name for w in candidates} | {w.name for w in candidates})
    if not names:
        return f"{where}: the model has no weights that torchopt compresses; name a custom module's parameter with params=[...]"
    hint = nearest(rule.match, names) or f"; the modules with weights are {', '.join(names[:6])}{' …' if len(names) > 6 else ''}"
    types = f" of types {[t if isinstance(t, str) else t.__name__ for t in rule.types]}" if rule.types else ""
    return f"{where}: matches no module that owns a weight{types}{hint}"


def _is_a(module: nn.Module, wanted: type[nn.Module] | str) -> bool:
    if isinstance(wanted, str):
        return any(c.__name__ == wanted for c in type(module).__mro__)
    return isinstance(module, wanted)
