"""Networks that are not torchvision's own, through every technique: each works, or is refused in one sentence.

For each network of `networks/` (random weights, statistics of the data) and each technique the exported file is run in ONNX Runtime and
compared with the network it should be. The peer is ONNX Runtime's own `quantize_static` of the same float file on the same batches.

- static: post-training, default settings. The file against float; at most 1 dB below the peer.
- qat: three steps of SGD after `prepare`; the file against a float twin that took the same steps, and as near to it as the peer is to float.
- weight_only: the file against float, likewise.
- all three: half of the weights zero, 16 shared values, int8, in one shot; the file against the same zeros and values in float, likewise.
- shrink: half of the channels removed, saved, loaded and exported; file and loaded network within 1e-4 of the shrunken one.

Each network runs in a process of its own; what was found is kept under runs/strangers, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import DOCS, Row, note, write
from networks import ALL
from networks.stranger import Inputs, Stranger
from onnxruntime import quantization as ort_quantization
from torch import nn

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule

KEPT = Path(__file__).resolve().parents[2] / "runs" / "strangers"
SLACK = 1.0  # dB below the peer that still counts as its equal
PATIENCE = 900  # seconds a network may take
Arrays = list[np.ndarray]


class Feeds(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    """Batches for ORT's quantizer, by input name."""

    def __init__(self, names: list[str], batches: list[Inputs]) -> None:
        self.left = [{name: x.numpy() for name, x in zip(names, batch)} for batch in batches]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop(0) if self.left else None


def tensors(outputs: object) -> list[torch.Tensor]:
    """Every tensor of whatever a network returns, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@torch.no_grad()
def by_torch(model: nn.Module, batches: list[Inputs]) -> Arrays:
    """Each output over all batches, end to end."""
    rows = [[t.float().numpy() for t in tensors(model(*batch))] for batch in batches]
    return [np.concatenate([r.reshape(-1) for r in column]) for column in zip(*rows)]


def by_file(path: Path, batches: list[Inputs]) -> Arrays:
    """The same of a file."""
    runner = torchopt.runtime.session(path)
    names = [i.name for i in runner.get_inputs()]
    rows = [runner.run(None, {n: x.numpy() for n, x in zip(names, batch)}) for batch in batches]
    return [np.concatenate([np.asarray(r, np.float32).reshape(-1) for r in column]) for column in zip(*rows)]


def decibels(found: Arrays, reference: Arrays) -> float:
    """Signal to noise of the worst output, at most 99."""
    worst = 99.0
    for a, b in zip(found, reference, strict=True):
        noise, signal = float(np.square(a - b).mean()), float(b.var())
        if not np.isfinite(noise):
            return -99.0
        worst = min(worst, 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else 99.0)
    return worst


class Case:
    """One network with its data, and the folder for its files."""

    def __init__(self, stranger: Stranger, folder: Path) -> None:
        self.stranger, self.folder = stranger, folder
        self.model = stranger.model()
        self.calibration, self.others = stranger.batches(8, 4, 1), stranger.batches(8, 4, 2)
        self.example = stranger.batches(1, 1, 3)[0]
        self.reference = by_torch(self.model, self.others)

    def export(self, model: nn.Module, name: str) -> Path:
        """Write a file that is not packed: packing is proved elsewhere, and the numbers are the same."""
        path = self.folder / f"{name}.onnx"
        torchopt.export(model, self.example, path, pack=False)
        return path

    @functools.cached_property
    def peer(self) -> float | None:
        """The decibels of ORT's own quantizer, or None where it fails."""
        path = self.export(self.model, "float")
        prepared, target = path.with_suffix(".prepared.onnx"), path.with_suffix(".ort.onnx")
        try:
            ort_quantization.shape_inference.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            names = [i.name for i in torchopt.runtime.session(path).get_inputs()]
            ort_quantization.quantize_static(
                *(str(prepared), str(target), Feeds(names, self.calibration)),
                quant_format=ort_quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=ort_quantization.QuantType.QUInt8,
                weight_type=ort_quantization.QuantType.QInt8,
            )
            return decibels(by_file(target, self.others), self.reference)
        except Exception as error:
            note(f"{self.stranger.name}: ORT's quantizer: {error}"[:200])
            return None

    def one_shot(self, rule: Rule) -> nn.Module:
        """Compress without training."""
        return torchopt.one_shot(self.model, [rule], self.calibration, example_inputs=self.example, progress=False).eval()

    def compared(self, model: nn.Module, name: str, reference: Arrays) -> dict[str, Any]:
        """Export, run, and judge."""
        peer = self.peer
        path = self.export(model, name)
        file, here = decibels(by_file(path, self.others), reference), decibels(by_torch(model, self.others), reference)
        goal = 10.0 if peer is None else min(peer - SLACK, 60.0)
        cell = {"dB": file, "torch_dB": here, "peer_dB": peer}
        if file < here - 3 and file < 60:
            return cell | {"verdict": "file differs", "why": f"file {file:.1f} dB, torch {here:.1f} dB"}
        if file < goal:
            return cell | {
                "verdict": "below the peer",
                "why": f"{file:.1f} dB, ORT {'fails' if peer is None else f'{peer:.1f} dB'}",
            }
        return cell | {"verdict": "works"}


def static(case: Case) -> dict[str, Any]:
    """Post-training, default settings."""
    return case.compared(case.one_shot(Rule("*", quantize=Quantize())), "static", case.reference)


def qat(case: Case) -> dict[str, Any]:
    """Three steps with fake quantizers, against a float twin of the same steps."""
    prepared = torchopt.prepare(case.model, [Rule("*", quantize=Quantize())], case.example)
    twin = case.stranger.model()
    for model in (prepared, twin):
        _three_steps(model, case.calibration, advance=model is prepared)
    final = torchopt.finalize(prepared).eval()
    cell = case.compared(final, "qat", by_torch(twin.eval(), case.others))
    same = decibels(by_torch(prepared.eval(), case.others), by_torch(final, case.others))
    if same < 60 and cell["verdict"] == "works":
        return cell | {"verdict": "file differs", "why": f"prepared and finalized {same:.1f} dB apart"}
    return cell


def _three_steps(model: nn.Module, batches: list[Inputs], *, advance: bool) -> None:
    """Pull the outputs a little towards zero, on the same data and the same random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for number, batch in enumerate((batches * 3)[:9]):  # three steps of learning after six that only move statistics and ranges
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = sum(t.square().mean() for t in tensors(model(*batch)) if t.is_floating_point())
        loss.backward()  # type: ignore[union-attr]
        if number >= 6:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if advance:
            torchopt.step(model)


def weight_only(case: Case) -> dict[str, Any]:
    """Integer weights, float activations."""
    return case.compared(case.one_shot(Rule("*", quantize=Quantize(mode="weight_only"))), "weights", case.reference)


def all_three(case: Case) -> dict[str, Any]:
    """Zeros, shared values and int8 in one shot, against the same without int8."""
    half = Prune(schedule=ConstantSparsity(target_sparsity=0.5))
    plain = case.one_shot(Rule("*", prune=half, cluster=Cluster(n_clusters=16)))
    small = case.one_shot(Rule("*", prune=half, cluster=Cluster(n_clusters=16), quantize=Quantize()))
    return case.compared(small, "all", by_torch(plain, case.others))


def shrink(case: Case) -> dict[str, Any]:
    """Half of the channels of each layer."""
    small = torchopt.shrink(case.model, case.example, ratio=0.5).eval()
    reference = by_torch(small, case.others)
    torchopt.save(small, case.folder / "small.pt")
    loaded = torchopt.load(case.folder / "small.pt", case.stranger.model()).eval()
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in case.model.parameters())
    apart = min(
        decibels(y, reference) for y in (by_torch(loaded, case.others), by_file(case.export(small, "small"), case.others))
    )
    cell = {"dB": apart, "parameters_kept": kept}
    return cell | ({"verdict": "works"} if apart > 80 else {"verdict": "file differs", "why": f"{apart:.1f} dB"})


TECHNIQUES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "static": static,
    "qat": qat,
    "weight_only": weight_only,
    "all three": all_three,
    "shrink": shrink,
}


def judged(technique: Callable[[Case], dict[str, Any]], case: Case) -> dict[str, Any]:
    """What came of it; an error of the tool's own tree is a refusal, every other one a crash."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        cell = technique(case)
    except torchopt.TorchoptError as error:
        cell = {"verdict": "refused", "why": " ".join(str(error).split())[:300]}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        cell = {"verdict": "crash", "why": f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"[:300]}
    return cell | {"seconds": round(time.perf_counter() - start, 1)}


def one(name: str, techniques: list[str]) -> dict[str, Any]:
    """All techniques on one network."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    stranger = next(s for s in ALL if s.name == name)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(stranger, Path(folder))
        return {technique: judged(TECHNIQUES[technique], case) for technique in techniques}


def in_a_process(name: str) -> dict[str, Any]:
    """The same in a process of its own: a fault there ends no other network's run."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]
    except subprocess.TimeoutExpired:
        why = f"more than {PATIENCE} s"
    except (IndexError, ValueError):
        why = f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
    return {technique: {"verdict": "crash", "why": why, "seconds": 0.0} for technique in TECHNIQUES}


def measured(names: list[str], kept: Path) -> dict[str, dict[str, Any]]:
    """Each network's cells, from an earlier call where there is one."""
    kept.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        path = kept / f"{name.replace(' ', '-').replace(',', '')}.json"
        if not path.exists():
            path.write_text(json.dumps(in_a_process(name)), encoding="utf-8")
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        note(f"{name:28} " + "  ".join(f"{t}: {c['verdict']}" for t, c in found[name].items()))
    return found


def good(cell: dict[str, Any]) -> bool:
    """It works, or said in one sentence that it does not."""
    return cell["verdict"] in ("works", "refused")


def row(technique: str, cells: dict[str, dict[str, Any]], before: dict[str, Any]) -> Row:
    """One technique over all networks."""
    column = {name: found[technique] for name, found in cells.items()}
    count = {
        v: sum(c["verdict"] == v for c in column.values())
        for v in ("works", "refused", "below the peer", "file differs", "crash")
    }
    earlier = {name: before[name][technique] for name in column if name in before}
    note_ = "; ".join(f"{name}: {c.get('why', c['verdict'])}" for name, c in column.items() if not good(c))
    then = f"before: {sum(map(good, earlier.values()))} of {len(earlier)}; " if earlier else ""
    refused = "; ".join(f"{name}: {c['why']}" for name, c in column.items() if c["verdict"] == "refused")
    return Row(
        what=f"{technique}: works (SQNR ≥ ORT's quantize_static − {SLACK:g} dB), or refused in one sentence",
        asked="all",
        reached=f"{sum(map(good, column.values()))} of {len(column)}: " + ", ".join(f"{n} {v}" for v, n in count.items() if n),
        holds=all(map(good, column.values())),
        note=then + (f"not: {note_}; " if note_ else "") + (f"refused: {refused}" if refused else ""),
    )


def main() -> int:
    """Measure, write the table, and fail where something went wrong without a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="six small networks; writes nothing")
    parser.add_argument("--one", help="one network's cells as JSON on stdout")
    parser.add_argument("--technique", action="append", choices=list(TECHNIQUES), help="with --one: only these")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where networks already measured are kept")
    parser.add_argument("--before", type=Path, help="such a folder of an earlier version, for the column 'before'")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.technique or list(TECHNIQUES))))
        return 0
    names = [s.name for s in ALL]
    cells = measured(names[::15] if options.quick else names, options.kept)
    document = DOCS / "strangers.json"
    before = json.loads(document.read_text(encoding="utf-8"))["details"]["before"] if document.exists() else {}
    before = measured(names, options.before) if options.before else before
    rows = [row(technique, cells, before) for technique in TECHNIQUES]
    if options.quick:
        print("\n".join(map(str, rows)))
    else:
        write("strangers", rows, details={"now": cells, "before": before})
    return 0 if all(r.holds for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
