"""Run tests once and write down which of them executes which line: python recorded.py OUT.json ROOM,ROOM … TEST …

Run in the folder of the copy, as a process of its own: what coverage slows down here is not slowed down afterwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import coverage
import pytest


class Recorder:
    """A plugin of pytest that names each test to coverage, and adds up its seconds."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.cover = cover
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """From here on lines are this test's."""
        self.cover.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the seconds of setting up, calling and tearing down."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def main(out: str, rooms: str, tests: list[str]) -> None:
    """Write {"seconds": {test: s}, "lines": {file: {line: [test, …]}}} of the tests that pass."""
    folder = Path.cwd()
    cover = coverage.Coverage(data_file=None, include=[f"{folder}/{room}/*" for room in rooms.split(",")], config_file=False)
    cover.start()
    recorder = Recorder(cover)
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[recorder])
    cover.stop()
    data = cover.get_data()
    lines = {}
    for file in data.measured_files():
        by_line = {
            line: [t for t in found if t and t not in recorder.failed] for line, found in data.contexts_by_lineno(file).items()
        }
        lines[Path(file).relative_to(folder).as_posix()] = by_line
    kept = {test: s for test, s in recorder.seconds.items() if test not in recorder.failed}
    Path(out).write_text(json.dumps({"seconds": kept, "failed": sorted(recorder.failed), "lines": lines}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
