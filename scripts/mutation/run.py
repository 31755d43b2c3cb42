"""Plant a seeded sample of small faults in a copy of the package, and count those that tests notice.

1. The package and its tests are copied to a temporary folder: nobody's working tree is touched.
2. The tests run once under coverage, which says who executes which line; kept until a file of the package or of the tests changes.
3. Each fault is written into the copy, and the tests of its line run in a fork of a warm process, quickest first, until one fails.
4. What was found is written after every fault, so that a run may be stopped; a longer run begins with the same faults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
import warm
from sites import Site, sites

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "bench"
ROOMS = ["torchopt/quantize", "torchopt/cluster", "torchopt/export/passes", "torchopt/codecs"]
COPIED = ("torchopt", "tests", "recipes", "docs", "scripts", "conftest.py", "pyproject.toml", "README.md", "ARCHITECTURE.md")
START = 15.0  # seconds that a fork may take before its first test
SLOWER = 5.0  # than when it was recorded, at most


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--tests", nargs="*", default=["tests", *ROOMS], help="files of tests; all, and the rooms' examples")
    parser.add_argument("--each", type=float, default=60.0, help="seconds of tests a fault, as recorded: the quickest that fit")
    parser.add_argument(
        "--out", type=Path, help="folder of mutants.json and mutants.md; docs/bench where all tests run, else the temporary one"
    )
    asked = parser.parse_args()
    asked.out = asked.out or (DOCS if asked.tests == parser.get_default("tests") else Path(tempfile.gettempdir()))
    return asked


def copied() -> Path:
    """Return a fresh copy of the package, its tests and what they read."""
    folder = Path(tempfile.mkdtemp(prefix="torchopt-mutants-")).resolve()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, folder / name)
    return folder


def recorded(folder: Path, tests: list[str]) -> dict[str, Any]:
    """Return which test executes which line, from an earlier run where no file has changed since."""
    digest = hashlib.sha256(repr(tests).encode())
    for path in sorted([*(folder / "torchopt").rglob("*.py"), *(folder / "tests").rglob("*.py")]):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"torchopt-lines-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        script = [sys.executable, str(ROOT / "scripts/mutation/recorded.py"), str(kept), ",".join(ROOMS), *tests]
        subprocess.run(script, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(kept.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def drawn(folder: Path, seed: int) -> list[Site]:
    """Return all faults of the rooms in a seeded order."""
    found = [
        s
        for room in ROOMS
        for path in sorted((folder / room).rglob("*.py"))
        for s in sites(path, path.relative_to(folder).as_posix())
    ]
    random.Random(seed).shuffle(found)
    return found


def covering(site: Site, known: dict[str, Any], most: float) -> list[str]:
    """Return the tests of a fault, quickest first: those of its line; of the whole file where the line runs at import."""
    by_line = known["lines"].get(site.file, {})
    runs = [by_line.get(str(line), ()) for line in (site.line, site.statement)] if site.inside else by_line.values()
    found = {test for tests in runs for test in tests}
    chosen, total = [], 0.0
    for test in sorted(found, key=lambda t: known["seconds"].get(t, 0.0)):
        total += known["seconds"].get(test, 0.0)
        if chosen and total > most:
            break
        chosen.append(test)
    return chosen


def equivalents() -> dict[tuple[str, str, str], str]:
    """Return the reasons of faults that change nothing, by file and the two lines."""
    path = DOCS / "mutants_equivalent.json"
    listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {(e["file"], e["before"], e["after"]): e["reason"] for e in listed}


def judged(
    folder: Path, site: Site, known: dict[str, Any], reasons: dict[tuple[str, str, str], str], most: float
) -> dict[str, Any]:
    """Plant a fault, let its tests run, take it out again."""
    path = folder / site.file
    source = path.read_bytes()
    before, after = site.difference(source)
    found = {**asdict(site), "before": before, "after": after}
    tests = covering(site, known, most)
    if (site.file, before, after) in reasons:
        return found | {"result": "equivalent", "reason": reasons[site.file, before, after]}
    if not tests:
        return found | {"result": "untested"}
    limit = START + SLOWER * sum(known["seconds"].get(t, 0.0) for t in tests)
    begun = time.monotonic()
    try:
        path.write_bytes(site.planted(source))
        result = warm.tried(tests, limit, folder / "log.txt")
    finally:
        path.write_bytes(source)
    return found | {"result": result, "tests": len(tests), "seconds": round(time.monotonic() - begun, 2)}


def main() -> None:
    """Do it all."""
    asked, begun = options(), time.monotonic()
    folder = copied()
    known = recorded(folder, asked.tests)
    warm.warm_up(folder)
    everything = sorted(known["seconds"], key=known["seconds"].__getitem__)[:30]
    if warm.tried(everything, 300.0, folder / "log.txt") != "passed":
        sys.exit(f"mutants: tests fail with no fault planted; see {folder / 'log.txt'}")
    places, reasons, found = drawn(folder, asked.seed), equivalents(), []
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    for site in places[: asked.count]:
        found.append(judged(folder, site, known, reasons, asked.each))
        minutes = (time.monotonic() - begun) / 60
        about = {"planted": len(found), "sites": len(places), "seed": asked.seed, "commit": commit, "minutes": minutes}
        about |= {"tests": " ".join(asked.tests), "test_count": len(known["seconds"]), "failed_unplanted": known["failed"]}
        table = report.write(asked.out, found, ROOMS, about)
        last = found[-1]
        print(f"{len(found)} {last['result']} {last['file']}:{last['line']} {last.get('seconds', 0)} s", flush=True)
        if minutes > asked.minutes:
            break
    print(table)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
