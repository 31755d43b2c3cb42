"""Proof that the C is the network: every step's values beside ONNX Runtime's, on this machine and on Cortex-M processors in QEMU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchopt.c_code.emit import steps_of
from torchopt.c_code.export import as_onnx, lowered, read_file, source_name
from torchopt.c_code.finished import Finished
from torchopt.c_code.machines import MACHINES, Built, Machine, Ran
from torchopt.c_code.program import Program
from torchopt.errors import ConfigError, DataError, FileError, nearest
from torchopt.network.batches import each, model_inputs
from torchopt.runtime.feed import feed_of_batch

CHUNK = 50  # samples that run together
FLOATS = 1e-5  # of the largest entry: what sums of floats in another order may differ by


@dataclass(frozen=True, kw_only=True)
class MachineVerdict:
    """What one machine gave.

    Attributes:
        machine: its name.
        skipped: why it did not run; empty where it did.
        samples: how many ran.
        layers: how many steps were compared in each.
        integers: how many 8-bit values.
        integers_different: how many of them are not ONNX Runtime's.
        first_difference: the first step with such a value, or with floats too far apart; None where there is none.
        max_abs: the largest difference in any output of the network, from ONNX Runtime's on the file itself.
        flash_bytes: of code and constants; None on the host.
        ram_bytes: of static memory; None on the host.
        instructions: of one sample; None on the host.
        instructions_by_layer: of each step, in order.
    """

    machine: str
    skipped: str = ""
    samples: int = 0
    layers: int = 0
    integers: int = 0
    integers_different: int = 0
    first_difference: str | None = None
    max_abs: float = 0.0
    flash_bytes: int | None = None
    ram_bytes: int | None = None
    instructions: int | None = None
    instructions_by_layer: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.machine}: skipped: {self.skipped}"
        first = f"; the first step to differ is {self.first_difference}" if self.first_difference else ""
        sizes = ""
        if self.flash_bytes is not None:
            sizes = (
                f"; flash {self.flash_bytes:,} bytes, RAM {self.ram_bytes:,} bytes, {self.instructions:,} instructions a sample"
            )
        return (
            f"{self.machine}: {self.integers - self.integers_different:,} of {self.integers:,} integers equal in {self.layers} steps of "
            f"{self.samples} samples, outputs at most {self.max_abs:.3g} apart{first}{sizes}"
        )


@dataclass(frozen=True, kw_only=True)
class CVerdict:
    """How C code compares with ONNX Runtime on each machine."""

    machines: tuple[MachineVerdict, ...]

    @property
    def equal(self) -> bool:
        """Whether every integer is equal and all floats are close, wherever it ran; False where it ran nowhere."""
        ran = [m for m in self.machines if not m.skipped]
        return bool(ran) and all(m.first_difference is None for m in ran)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self) | {"equal": self.equal}

    def __str__(self) -> str:
        return "\n".join(map(str, self.machines))


def verify_c(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    machines: Sequence[str] = ("host", "cortex-m4", "cortex-m7"),
    board_samples: int = 10,
) -> CVerdict:
    """Compile exported C and compare every step's values with ONNX Runtime's.

    Args:
        model: what was exported: the module, or the ONNX file.
        path: the .c file; its header lies beside it.
        batches: inputs, as `verify` takes them; for an ONNX file also arrays, or dicts of arrays by the input's name.
        machines: where to run: "host" (under the sanitizers of addresses and undefined behaviour), "host-fast", "cortex-m4", "cortex-m7".
        board_samples: how many samples run in an emulator, which is slow.

    Raises:
        ConfigError: an unknown machine.
        DataError: no batch, or one that does not fit.
        FileError: a file is missing, or the C was written from another network.
        ModelError: the compiler refuses it, or it breaks off.
    """
    for name in machines:
        if name not in MACHINES:
            raise ConfigError(f"verify_c: machine {name!r} is unknown; one of {', '.join(MACHINES)}{nearest(name, MACHINES)}")
    source = Path(path)
    name = source_name(source)
    given: list[Any] = list(each(batches)) if not hasattr(batches, "__array__") else [batches]
    if not given:
        raise DataError("verify_c: the loader gave no batch; give at least one")
    if isinstance(model, nn.Module):
        content, where = as_onnx(model, model_inputs(model, given[0])[0]), name
    else:
        content, where = read_file(model), str(model)
    found, program, text = lowered(content, name, where)
    _check_origin(source, text.fingerprint)
    feeds = [_feed(model, found, batch, where) for batch in given]
    samples = [sample for feed in feeds for sample in _samples(feed, found)]
    return CVerdict(machines=tuple(_verdict(MACHINES[m], source, found, program, samples, board_samples) for m in machines))


def _check_origin(source: Path, fingerprint: str) -> None:
    header = source.with_suffix(".h")
    if not header.is_file():
        raise FileError(f"{header}: there is no such file; export writes the .c file and its header side by side")
    found = re.search(r'_FINGERPRINT "(\w+)"', header.read_text(encoding="utf-8", errors="replace"))
    if found is None or found.group(1) != fingerprint:
        raise FileError(
            f"{source}: was written from another network, or by another version of torchopt or ONNX Runtime; export it again"
        )


def _feed(model: Any, found: Finished, batch: Any, where: str) -> dict[str, np.ndarray]:
    """The arrays of a batch by the input's name."""
    if isinstance(model, nn.Module):
        return feed_of_batch(model, found.everything, batch, where)
    names = [spec.name for spec in found.everything.get_inputs()]
    if not isinstance(batch, Mapping):
        parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
        batch = dict(zip(names, parts, strict=False))
    if not set(names) <= set(batch):
        raise DataError(
            f"verify_c: {where} has the inputs {', '.join(names)}; a batch gives {', '.join(map(str, batch)) or 'none'}"
        )
    return {name: np.asarray(batch[name]).astype(found.values[name].dtype) for name in names}


def _samples(feed: dict[str, np.ndarray], found: Finished) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a batch one by one."""
    shapes = {name: found.values[name].shape for name in feed}
    if all(array.shape == shapes[name] for name, array in feed.items()):
        yield feed
        return
    counts = {len(array) if array.ndim else 0 for array in feed.values()}
    for number in range(min(counts)):
        sample = {name: array[number : number + 1] for name, array in feed.items()}
        for name, array in sample.items():
            if array.shape != shapes[name] or len(counts) > 1:
                raise DataError(
                    f"verify_c: the input {name!r} has shape {feed[name].shape}; samples of {shapes[name]} are needed"
                )
        yield sample


def _verdict(
    machine: Machine, source: Path, found: Finished, program: Program, samples: list[dict[str, np.ndarray]], board_samples: int
) -> MachineVerdict:
    if machine.missing:
        return MachineVerdict(machine=machine.name, skipped=machine.missing)
    if machine.emulator:
        samples = samples[:board_samples]
    tally = _Tally(found, program)
    with Built(source, program, machine) as built:
        flash, ram = built.sizes() if machine.emulator else (None, None)
        for start in range(0, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            ran = built.run(chunk)
            for number, sample in enumerate(chunk):
                tally.compare(ran, number, sample)
    layers = tuple((tally.labels[number], count) for number, count in ran.instructions.items())
    return MachineVerdict(
        machine=machine.name,
        samples=len(samples),
        layers=tally.layers,
        integers=tally.integers,
        integers_different=tally.different,
        first_difference=tally.first,
        max_abs=tally.max_abs,
        flash_bytes=flash,
        ram_bytes=ram,
        instructions=sum(count for _, count in layers) if layers else None,
        instructions_by_layer=layers,
    )


class _Tally:
    """Counts what differs.

    Args:
        found: the graph, with a session that gives every value.
        program: its steps.
    """

    def __init__(self, found: Finished, program: Program) -> None:
        self.found, self.program = found, program
        self.traced = [(n, step.output) for n, step in steps_of(program) if step.output.name in found.names]
        self.labels = {n: f"{n} {step.what}" for n, step in steps_of(program)}
        self.layers, self.integers, self.different = len(self.traced), 0, 0
        self.first: str | None = None
        self.max_abs = 0.0

    def compare(self, ran: Ran, row: int, sample: dict[str, np.ndarray]) -> None:
        """Compare one sample's values."""
        arrays = dict(zip(self.found.names, self.found.everything.run(None, sample), strict=True))
        for number, value in self.traced:
            wanted, got = value.in_memory(arrays[value.name].reshape(value.shape)).reshape(-1), ran.values[number][row]
            if wanted.dtype.kind == "f":
                apart = not np.abs(wanted - got).max(initial=0) <= FLOATS * max(1.0, float(np.abs(wanted).max(initial=0)))
            else:
                count = int((wanted != got).sum())
                self.integers, self.different, apart = self.integers + wanted.size, self.different + count, count > 0
            if apart and (self.first is None or int(self.first.split()[0]) > number):
                self.first = self.labels[number]
        for wanted, got in zip(self.found.session.run(None, sample), ran.outputs, strict=True):
            apart_by = np.abs(wanted.reshape(-1).astype(np.float64) - got[row].astype(np.float64))
            self.max_abs = max(self.max_abs, float(apart_by.max(initial=0)))
