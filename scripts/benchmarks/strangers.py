"""Networks that are not torchvision's own, through every technique: each works, or is refused in one sentence.

For each network of `networks/` (random weights, statistics of the data) and each technique the exported file is run in ONNX Runtime and
compared with the network it should be. The peer is ONNX Runtime's own `quantize_static` of the same float file on the same batches.

- static: post-training, default settings. The file against float; at most 1 dB below the peer.
- qat: three steps of SGD (batches of 32) after `prepare`; the file against a float twin that took the same, beside what the peer makes of
  that twin with the same three batches as its calibration.
- weight_only: the file against float, likewise.
- all three: half of the weights zero and 16 shared values in one round, int8 in a second, which keeps both; the file against the zeros
  and values in float, beside what the peer makes of those.
- shrink: half of the channels removed, saved, loaded and exported; file and loaded network within 1e-4 of the shrunken one.

Each network runs in a process of its own; what was found is kept under runs/strangers, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
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

import torch
from harness import DOCS, Row, note, write
from networks import ALL
from networks.case import SLACK, Case, by_file, by_torch, decibels, tensors
from networks.stranger import Inputs
from torch import nn

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule

KEPT = Path(__file__).resolve().parents[2] / "runs" / "strangers"
PATIENCE = 900  # seconds a network may take


def static(case: Case) -> dict[str, Any]:
    """Post-training, default settings."""
    return case.compared(case.one_shot(Rule("*", quantize=Quantize())), "static", case.reference, case.peer)


def qat(case: Case) -> dict[str, Any]:
    """Three steps with fake quantizers on batches of 32, against a float twin of the same steps."""
    prepared = torchopt.prepare(case.model, [Rule("*", quantize=Quantize())], case.example)
    twin, batches = case.stranger.model(), case.stranger.batches(3, 32, 4)
    for model in (prepared, twin):
        _three_steps(model, batches, advance=model is prepared)
    final, reference = torchopt.finalize(prepared).eval(), by_torch(twin.eval(), case.others)
    cell = case.compared(final, "qat", reference, case.peer_of(twin, "twin", reference, batches))
    same = decibels(by_torch(prepared.eval(), case.others), by_torch(final, case.others))
    if same < 60 and cell["verdict"] == "works":
        return cell | {"verdict": "file differs", "why": f"prepared and finalized {same:.1f} dB apart"}
    return cell


def _three_steps(model: nn.Module, batches: list[Inputs], *, advance: bool) -> None:
    """Pull the outputs a little towards zero, on the same data and the same random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = sum(t.square().mean() for t in tensors(model(*batch)) if t.is_floating_point())
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if advance:
            torchopt.step(model)


def weight_only(case: Case) -> dict[str, Any]:
    """Integer weights, float activations."""
    return case.compared(case.one_shot(Rule("*", quantize=Quantize(mode="weight_only"))), "weights", case.reference, case.peer)


def all_three(case: Case) -> dict[str, Any]:
    """Zeros and shared values in one round, int8 in a second; against the zeros and values in float."""
    half = Prune(schedule=ConstantSparsity(target_sparsity=0.5))
    plain = case.one_shot(Rule("*", prune=half, cluster=Cluster(n_clusters=16)))
    reference = by_torch(plain, case.others)
    small = case.one_shot(Rule("*", quantize=Quantize()), plain)
    return case.compared(small, "all", reference, case.peer_of(plain, "plain", reference))


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
        path = _place(kept, name)
        if not path.exists():
            path.write_text(json.dumps(in_a_process(name)), encoding="utf-8")
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        note(f"{name:28} " + "  ".join(f"{t}: {c['verdict']}" for t, c in found[name].items()))
    return found


def _place(kept: Path, name: str) -> Path:
    return kept / f"{name.replace(' ', '-').replace(',', '')}.json"


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
    parser.add_argument("--so-far", action="store_true", help="the table of what is kept; measures nothing new")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.technique or list(TECHNIQUES))))
        return 0
    names = [s.name for s in ALL if not options.so_far or _place(options.kept, s.name).exists()]
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
