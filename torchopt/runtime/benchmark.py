"""Latency that can be trusted on a noisy machine: the files take turns, and ratios are taken turn by turn.

A burst runs one file a few times; A B C A B C … so that a disturbance hits all alike. What is reported is the median and the
quartiles of each file's bursts, and the median of its burst-by-burst ratio to the first file.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from torchopt.errors import ConfigError
from torchopt.progress import track
from torchopt.runtime.session import random_inputs, session

BURST_SECONDS = 0.02  # long against the clock, short against a disturbance


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file: latency median and quartiles, ratio to the first file with its quartiles, load time, size, peak memory."""

    path: str
    latency_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    load_ms: float
    size_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What `benchmark` measured: a row a file, and how."""

    rows: list[Row]
    threads: int
    repeats: int
    batch: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        table = Table(title=f"{self.threads} thread(s), batch {self.batch}, medians of {self.repeats} interleaved bursts")
        for name in ("file", "ms", "quartiles", "ratio", "quartiles", "load ms", "bytes", "peak MB"):
            table.add_column(name, justify="left" if name == "file" else "right")
        for r in self.rows:
            table.add_row(
                Path(r.path).name,
                f"{r.latency_ms:.3f}",
                f"{r.low_ms:.3f}–{r.high_ms:.3f}",
                f"{r.ratio:.2f}",
                f"{r.ratio_low:.2f}–{r.ratio_high:.2f}",
                f"{r.load_ms:.0f}",
                f"{r.size_bytes:,}",
                "–" if r.peak_bytes is None else f"{r.peak_bytes / 2**20:.0f}",
            )
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def benchmark(
    paths: Sequence[str | os.PathLike[str]],
    *,
    threads: int = 1,
    repeats: int = 30,
    batch: int = 1,
    inputs: Sequence[dict[str, np.ndarray]] | None = None,
    memory: bool = False,
    progress: bool = True,
) -> Timing:
    """Measure the files against one another in ONNX Runtime on the CPU.

    Args:
        paths: ONNX files; the first is what the others are compared with.
        threads: for one operator.
        repeats: bursts of each file.
        batch: size of every free dimension.
        inputs: one dict of arrays for each file; random where left out.
        memory: measure the peak memory of loading and running each file once, in a process of its own.
        progress: show a bar on stderr.

    Raises:
        ConfigError: no file, or `repeats` or `batch` below 1.
        FileError: a file is missing or refused.
    """
    if not paths or repeats < 1 or batch < 1:
        raise ConfigError(f"benchmark: {len(paths)} files, repeats={repeats}, batch={batch}; at least one of each is needed")
    loads, opened = zip(*[_load(path, threads) for path in paths], strict=True)
    feeds = inputs or [random_inputs(s, batch=batch) for s in opened]
    calls = [_burst_length(s, feed) for s, feed in zip(opened, feeds, strict=True)]
    bursts: list[list[float]] = [[] for _ in paths]
    for _ in track(range(repeats), "benchmark", enabled=progress):
        for i, (s, feed, count) in enumerate(zip(opened, feeds, calls, strict=True)):
            bursts[i].append(_burst(s, feed, count))
    rows = [_row(path, times, bursts[0], load, memory) for path, times, load in zip(paths, bursts, loads, strict=True)]
    return Timing(rows=rows, threads=threads, repeats=repeats, batch=batch)


def _load(path: str | os.PathLike[str], threads: int) -> tuple[float, onnxruntime.InferenceSession]:
    session(path, threads=threads)  # once for the file cache
    start = time.perf_counter()
    opened = session(path, threads=threads)
    return (time.perf_counter() - start) * 1e3, opened


def _burst(opened: onnxruntime.InferenceSession, feed: dict[str, np.ndarray], count: int) -> float:
    """Milliseconds of one call, from `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        opened.run(None, feed)
    return (time.perf_counter() - start) * 1e3 / count


def _burst_length(opened: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> int:
    """Warm up, and return how many calls fill a burst."""
    _burst(opened, feed, 3)
    one = min(_burst(opened, feed, 1) for _ in range(3)) / 1e3
    return max(1, min(1000, round(BURST_SECONDS / max(one, 1e-6))))


def _row(path: str | os.PathLike[str], times: list[float], first: list[float], load: float, memory: bool) -> Row:
    low, middle, high = _quartiles(times)
    ratios = _quartiles([a / b for a, b in zip(times, first, strict=True)])
    return Row(
        path=str(path),
        latency_ms=middle,
        low_ms=low,
        high_ms=high,
        ratio=ratios[1],
        ratio_low=ratios[0],
        ratio_high=ratios[2],
        load_ms=load,
        size_bytes=Path(path).stat().st_size,
        peak_bytes=_peak(path) if memory else None,
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


_PEAK = """
import resource, sys
from torchopt.runtime.session import random_inputs, session

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, old = now(), highest()
s = session(sys.argv[1]); s.run(None, random_inputs(s))
print(max(now(), highest() if highest() > old else 0) - before)
"""


def _peak(path: str | os.PathLike[str]) -> int | None:
    """Bytes by which loading and running the file once raises a fresh process's memory at most; None where unknown (not Linux)."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else None
