"""Latency that can be trusted on a noisy machine: the files take turns, and ratios are taken turn by turn.

A burst runs one file a few times; A B C A B C … so that a disturbance hits all alike. What is reported is the median and the
quartiles of each file's bursts, and the median of its burst-by-burst ratio to the first file.
"""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from torchopt.errors import ConfigError, FileError
from torchopt.io.importing import unnoticed
from torchopt.io.progress import track
from torchopt.runtime.inputs import Asked, Feed, call, check_names, feed_of, foreign, run, shape_of
from torchopt.runtime.session import session

with unnoticed():
    from rich.console import Console
    from rich.table import Table

STATM = Path("/proc/self/statm")  # a process's memory, on Linux
BURST_SECONDS = 0.02  # long against the clock, short against a disturbance


@dataclass(frozen=True, kw_only=True)
class Row:
    """One file: latency median and quartiles, ratio to the first file with its quartiles, load time, size, peak memory.

    `inputs` is what it was timed on: {name: {"shape": [sizes], "dtype": type}}.
    """

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
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)


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
        return capture.get() + "\n".join(self._timed_on())

    def _timed_on(self) -> list[str]:
        """What the files were run on: one line where it is the same for all, as it should be, else one a file."""
        told = [
            f"timed on {', '.join(f'{n} {_told(given)}' for n, given in row.inputs.items()) or 'no input'}" for row in self.rows
        ]
        return (
            told[:1] if len(set(told)) == 1 else [f"{Path(r.path).name}: {text}" for r, text in zip(self.rows, told, strict=True)]
        )


def _told(given: Mapping[str, Any]) -> str:
    return f"{'×'.join(map(str, given['shape'])) or 'scalar'} {given['dtype']}"


def benchmark(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    threads: int = 1,
    repeats: int = 30,
    batch: int = 1,
    inputs: Asked | Sequence[Asked] | None = None,
    memory: bool = False,
    progress: bool = True,
) -> Timing:
    """Measure the files against one another in ONNX Runtime on the CPU.

    Args:
        paths: ONNX files; the first is what the others are compared with. One path is taken as one file.
        threads: for one operator.
        repeats: bursts of each file.
        batch: size of a free first axis.
        inputs: shapes or arrays by the input's name, for all files, or a dict for each file; random values of the shapes that
            the files name where left out. An input with a free size other than the batch needs one: `{"x": (1, 3, 320, 320)}`.
        memory: measure the peak memory of loading and running each file once, in a process of its own.
        progress: show a bar on stderr.

    Raises:
        ConfigError: no file, `repeats` or `batch` below 1, a free size that is not given, or an input that does not fit.
        FileError: a file is missing or refused.
        DataError: ONNX Runtime does not run a file on these inputs.

    Example:
        >>> benchmark("no.onnx", inputs={"x": (1, 3, 320, 320)})
        Traceback (most recent call last):
        torchopt.errors.FileError: no.onnx: there is no such file; give an ONNX file
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not files or repeats < 1 or batch < 1:
        raise ConfigError(f"benchmark: {len(files)} files, repeats={repeats}, batch={batch}; at least one of each is needed")
    loads, opened = zip(*[_load(path, threads) for path in files], strict=True)
    feeds = _feeds(files, opened, inputs, batch)
    calls = [_caller(s, feed, path) for s, feed, path in zip(opened, feeds, files, strict=True)]
    counts = [_burst_length(once) for once in calls]
    bursts: list[list[float]] = [[] for _ in files]
    for _ in track(range(repeats), "benchmark", enabled=progress):
        for i, (once, count) in enumerate(zip(calls, counts, strict=True)):
            bursts[i].append(_burst(once, count))
    rows = [_row(*measured, bursts[0], memory) for measured in zip(files, bursts, loads, feeds, strict=True)]
    return Timing(rows=rows, threads=threads, repeats=repeats, batch=batch)


def _feeds(
    files: Sequence[str | os.PathLike[str]],
    opened: Sequence[onnxruntime.InferenceSession],
    inputs: Asked | Sequence[Asked] | None,
    batch: int,
) -> list[Feed]:
    """What each file is run on."""
    if inputs is None or isinstance(inputs, Mapping):
        check_names(inputs, opened, "benchmark")
        asked: Sequence[Asked | None] = [inputs] * len(files)
    else:
        if len(inputs) != len(files):
            raise ConfigError(
                f"benchmark: {len(inputs)} dicts of inputs for {len(files)} files; give one for each, or one dict for all"
            )
        for path, session_, own in zip(files, opened, inputs, strict=True):
            check_names(own, [session_], str(path))
        asked = inputs
    return [feed_of(s, str(p), inputs=given, batch=batch) for s, p, given in zip(opened, files, asked, strict=True)]


def _load(path: str | os.PathLike[str], threads: int) -> tuple[float, onnxruntime.InferenceSession]:
    session(path, threads=threads)  # once for the file cache
    start = time.perf_counter()
    opened = session(path, threads=threads)
    return (time.perf_counter() - start) * 1e3, opened


def _caller(opened: onnxruntime.InferenceSession, feed: Feed, path: str | os.PathLike[str]) -> Callable[[], object]:
    """What is timed, tried once."""
    run(opened, feed, str(path))
    return functools.partial(call, opened, feed) if foreign(opened) else functools.partial(opened.run, None, feed)


def _burst(once: Callable[[], object], count: int) -> float:
    """Milliseconds of one call, from `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        once()
    return (time.perf_counter() - start) * 1e3 / count


def _burst_length(once: Callable[[], object]) -> int:
    """Warm up, and return how many calls fill a burst."""
    _burst(once, 3)
    one = min(_burst(once, 1) for _ in range(3)) / 1e3
    return max(1, min(1000, round(BURST_SECONDS / max(one, 1e-6))))


def _row(path: str | os.PathLike[str], times: list[float], load: float, feed: Feed, first: list[float], memory: bool) -> Row:
    low, middle, high = _quartiles(times)
    shapes = {name: shape_of(value) for name, value in feed.items()}
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
        peak_bytes=_peak(path, feed) if memory else None,
        inputs={
            name: dict(zip(("shape", "dtype"), (list(shape), dtype), strict=True)) for name, (shape, dtype) in shapes.items()
        },
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


_PEAK = """
import resource, sys
from torchopt.runtime.inputs import feed_of, parse_inputs, run
from torchopt.runtime.session import session

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def highest():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, old = now(), highest()
s = session(sys.argv[1]); run(s, feed_of(s, "", inputs=parse_inputs(sys.argv[2:])), "")
print(max(now(), highest() if highest() > old else 0) - before)
"""


def _peak(path: str | os.PathLike[str], feed: Feed) -> int | None:
    """Bytes by which loading and running the file once raises a fresh process's memory at most; None where unknown (not Linux)."""
    shapes = [
        f"{name}:{','.join(map(str, shape))}:{dtype}" for name, (shape, dtype) in ((n, shape_of(v)) for n, v in feed.items())
    ]
    if not STATM.exists():
        return None
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path), *shapes], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FileError(
            f"{path}: its memory cannot be measured: {(done.stderr.strip().splitlines() or ['it was ended'])[-1][:300]}"
        )
    return int(done.stdout)
