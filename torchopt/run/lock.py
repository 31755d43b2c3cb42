"""One run in a folder at a time: a lock that the operating system gives up when its holder ends, however it ends.

The lock is on a file `.lock` beside the run's files, in which the holder writes who it is; it is removed at the end. A file that a
killed process left behind holds no lock any more, and the next run takes it over. Where a file system has no locks, the process
that the file names decides: it is asked whether it lives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchopt.errors import FileError

try:
    import fcntl
except ImportError:  # not on Windows, where the process that the file names is asked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder of a run; made where it does not exist.

    Args:
        folder: of the run.

    Raises:
        FileError: another process holds it, or it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder):
        ...     os.listdir(folder)
        ['.lock']
        >>> os.listdir(folder)
        []
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _taken(path)
    except OSError as error:
        raise FileError(f"{folder}: cannot be written ({error.strerror or error}); give another folder by --out") from error
    if handle is None:
        raise FileError(f"{folder}: {_holder(path)} is running in it; wait until it ends, or give another folder by --out")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while the lock is held: whoever waits for this file sees that it is another one now
        os.close(handle)


def _taken(path: Path) -> int | None:
    """Open the lock's file and take the lock; None where another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _take(handle, path):
                os.close(handle)
                return None
            if _is_still(handle, path):  # not removed by a holder that ended just now
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _take(handle: int, path: Path) -> bool:
    if fcntl is None:
        return not _named_lives(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return not _named_lives(path)
    return True


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _named(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _named_lives(path: Path) -> bool:
    """True where the process that the file names is alive; of another machine's nothing is known, and it counts as alive."""
    named = _named(path)
    pid = named.get("pid")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    if named.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _holder(path: Path) -> str:
    named = _named(path)
    if "pid" not in named:
        return "another process"
    elsewhere = "" if named.get("host") == socket.gethostname() else f" on {named.get('host')}"
    return f"process {named['pid']}{elsewhere}"
