"""Clustering: how near k-means comes to the true optimum, how fast it is beside its peers, and what tables cost in training.

The optimum is a quadratic dynamic program, written here without any of torchopt. Peers: scikit-learn, and coremltools where it is
installed (its palettizer's own k-means on the same values).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from harness import Row, Times, interleave, note, ratio, write
from sklearn.cluster import KMeans
from torch import nn

import torchopt
from torchopt.cluster.tables.kmeans import kmeans, squared_error

Array = np.ndarray
MANY, K = 2_360_000, 16


def true_optimum(values: Array, k: int) -> float:
    """Least squared error of k clusters, by the O(k·n²) recurrence D[j, i] = min_t D[j-1, t] + cost(t, i)."""
    x = np.sort(values.astype(np.float64))
    x -= x.mean()
    first, second = (np.concatenate(([0.0], np.cumsum(x**p))) for p in (1, 2))
    n = len(x)
    best = second[1:] - first[1:] ** 2 / np.arange(1, n + 1)
    for _ in range(k - 1):
        after = np.empty(n)
        for i in range(n):
            size = i + 1 - np.arange(1, i + 1)
            cost = (second[i + 1] - second[1 : i + 1]) - (first[i + 1] - first[1 : i + 1]) ** 2 / size
            after[i] = min(best[i], (best[:i] + cost).min()) if i else 0.0
        best = after
    return float(best[-1])


def distribution(number: int, most: int) -> tuple[Array, int]:
    """One of many shapes that weights take, and a number of clusters."""
    rng = np.random.default_rng(number)
    n = int(rng.integers(200, most + 1))
    shapes: list[Callable[[], Array]] = [
        lambda: rng.normal(size=n),
        lambda: rng.laplace(size=n),
        lambda: rng.standard_t(3, size=n),
        lambda: rng.uniform(-1, 1, n),
        lambda: np.concatenate([rng.normal(m, s, n) for m, s in ((-2, 0.1), (0, 1.0), (5, 0.3))])[::3],
    ]
    return shapes[number % len(shapes)]().astype(np.float32), int(rng.integers(2, 33))


def optimum_rows(count: int, most: int) -> list[Row]:
    """Loss over the true optimum's, and over scikit-learn's best of ten starts."""
    over, above = [], []
    for number in range(count):
        values, k = distribution(number, most)
        ours = squared_error(values, kmeans(values, k, init="optimal"))
        over.append(ours / true_optimum(values, k))
        theirs = KMeans(k, n_init=10, random_state=number).fit(values[:, None].astype(np.float64)).inertia_
        above.append(ours / theirs)
    return [
        Row(
            what=f"squared error of init='optimal' over the true optimum, worst of {count} distributions of ≤ {most:,} values",
            asked="≤ 1.000001",
            reached=f"{max(over):.9f}",
            holds=max(over) <= 1.000001,
        ),
        Row(
            what="the same over scikit-learn's KMeans, best of 10 starts, worst",
            asked="never above 1",
            reached=f"{max(above):.6f}",
            holds=max(above) <= 1 + 1e-9,
            note=f"best {min(above):.4f}",
        ),
    ]


def coremltools_kmeans() -> Callable[[Array, int], Array] | None:
    """The k-means of coremltools' palettizer: values → table; None where it is not installed."""
    if importlib.util.find_spec("coremltools") is None:
        return None
    from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    def run(values: Array, bits: int) -> Array:
        layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(values)
        config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": bits, "granularity": "per_tensor"}})
        done = PostTrainingPalettizer(nn.Sequential(layer), config).compress()
        return done[0].weight.detach().numpy()

    return run


def speed_rows(repeats: int) -> list[Row]:
    """2.36 M normal values in 16 clusters, and ResNet-50's weights."""
    values = np.random.default_rng(0).normal(size=(1536, MANY // 1536)).astype(np.float32)
    cases: dict[str, Callable[[], object]] = {"ours": lambda: kmeans(values, K)}
    peer = coremltools_kmeans()
    if peer is not None:
        cases["coremltools"] = lambda: peer(values, 4)
    times = interleave(cases, repeats=repeats)
    error = squared_error(values, kmeans(values, K))
    middle = statistics.median(times["ours"])
    rows = [Row(what=f"{values.size:,} values N(0, 1), 16 clusters: seconds", asked="", reached=f"{middle:.3f}")]
    if peer is not None:
        theirs = float(((peer(values, 4) - values).astype(np.float64) ** 2).sum())
        half, low, high = ratio(times, "ours", "coremltools")
        rows += [
            Row(
                what="time over coremltools' palettizer, same values, same run",
                asked="≤ 0.5",
                reached=f"{half:.3f} [{low:.3f}–{high:.3f}]",
                holds=half <= 0.5,
                note=f"coremltools {statistics.median(times['coremltools']):.3f} s",
            ),
            Row(what="squared error over coremltools'", asked="≤ 1", reached=f"{error / theirs:.7f}", holds=error <= theirs,
                note=f"{error:,.1f} against {theirs:,.1f}"),
        ]  # fmt: skip
    else:
        rows.append(
            Row(
                what="squared error",
                asked="≤ 22,389 for 2.36 M values",
                reached=f"{error:,.0f}",
                note="coremltools is not installed",
            )
        )
    torch.manual_seed(0)
    tensors = [p.detach().numpy() for p in torchvision.models.resnet50(weights=None).parameters() if p.dim() > 1]
    whole = interleave({"ours": lambda: [kmeans(t, K) for t in tensors]}, repeats=max(2, repeats // 3))["ours"]
    rows.append(
        Row(
            what=f"all of ResNet-50 ({sum(t.size for t in tensors) / 1e6:.1f} M weights, {len(tensors)} tensors), 16 clusters: seconds",
            asked="≤ 1",
            reached=f"{statistics.median(whole):.2f}",
            holds=statistics.median(whole) <= 1,
        )
    )
    return rows


def trainer(model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, prepared: bool) -> Callable[[], None]:
    """One training step as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()

    def once() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if prepared:
            torchopt.step(model)

    return once


def step_times(rounds: int) -> Times:
    """Float, hard and soft tables on every layer of ResNet-18, batch 32, 64×64."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 64, 64), torch.randint(0, 1000, (32,))
    model = torchvision.models.resnet18(weights=None)
    cases = {"float": trainer(copy.deepcopy(model), x, y, prepared=False)}
    for name, soft in (("hard", False), ("soft", True)):
        ready = torchopt.prepare(
            model, [torchopt.Rule("*", cluster=torchopt.Cluster(n_clusters=K, soft_until=1_000_000 if soft else 0))]
        )
        cases[name] = trainer(ready, x, y, prepared=True)
    return interleave(cases, repeats=rounds, warmup=3)


def step_rows(rounds: int) -> list[Row]:
    """Training step with tables over the float step."""
    times = step_times(rounds)
    rows = []
    for name, goal in (("hard", 1.15), ("soft", 1.5)):
        middle, low, high = ratio(times, name, "float")
        rows.append(
            Row(
                what=f"training step, 16 clusters on every layer, {name} assignment / float (ResNet-18, batch 32, 64×64)",
                asked=f"≤ {goal}",
                reached=f"{middle:.3f} [{low:.3f}–{high:.3f}]",
                holds=middle <= goal,
                note=f"float {statistics.median(times['float']) * 1e3:.0f} ms",
            )
        )
    return rows


def memory_row() -> Row:
    """Peak memory of a training process with tables less that of one without, per weight; each in a process of its own."""
    peaks = {
        kind: int(subprocess.check_output([sys.executable, __file__, "--peak", kind]).split()[-1]) for kind in ("float", "hard")
    }
    count = sum(p.numel() for p in torchvision.models.resnet50(weights=None).parameters() if p.dim() > 1)
    extra = (peaks["hard"] - peaks["float"]) / count
    return Row(
        what="peak memory beyond the float training's, bytes a weight (ResNet-50, batch 2, 64×64)",
        asked="≤ 2 beyond the trainable copy (4)",
        reached=f"{extra:.2f}",
        holds=extra <= 6,
        note=f"float {peaks['float'] / 2**20:,.0f} MiB",
    )


def peak(kind: str) -> None:
    """Print the peak resident bytes of three training steps."""
    model, x, y = torchvision.models.resnet50(weights=None), torch.randn(2, 3, 64, 64), torch.randint(0, 1000, (2,))
    if kind == "hard":
        model = torchopt.prepare(model, [torchopt.Rule("*", cluster=torchopt.Cluster(n_clusters=K))])
    once = trainer(model, x, y, prepared=kind == "hard")
    for _ in range(3):
        once()
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss would start from the parent's peak
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024)


def main() -> None:
    """Measure, print, write docs/bench/cluster.*."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five distributions, three rounds")
    parser.add_argument("--peak", choices=("float", "hard"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    if options.peak:
        peak(options.peak)
        return
    note("cluster: optimum")
    rows = optimum_rows(5 if options.quick else 50, 600 if options.quick else 5000)
    note("cluster: speed")
    rows += speed_rows(3 if options.quick else 9)
    note("cluster: training step and memory")
    rows += [*step_rows(3 if options.quick else 15), memory_row()]
    write("cluster", rows)


if __name__ == "__main__":
    main()
