"""One process that has imported all that tests import but torchopt itself; each fault is tried in a fork of it.

A fork begins where imports of torch and its neighbours, five seconds, are done. No tensor is made before: threads do not survive a fork.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

NEIGHBOURS = (
    "torch",
    "torchvision",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "scipy.sparse",
    "sklearn.cluster",
    "pytest",
)
MEMORY = 32 << 30  # bytes of addresses; a fault may ask for any


def warm_up(folder: Path) -> None:
    """Import the neighbours, and let `folder` be where torchopt comes from."""
    sys.dont_write_bytecode = True
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.path.insert(0, str(folder))
    for name in NEIGHBOURS:
        importlib.import_module(name)


def tried(tests: list[str], limit: float, log: Path) -> str:
    """Run tests in a fork until one fails; return "failed", "passed" or "late"."""
    child = os.fork()
    if child == 0:
        _in_the_fork(tests, log)
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "late"


def _in_the_fork(tests: list[str], log: Path) -> None:
    code = 3
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import pytest

        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
