"""Writing files so that nothing is ever lost: a temporary name in the same folder, then one atomic rename.

A reader sees the old file or the complete new one, whatever happens in between (kill -9, full disk). Every `OSError` on the
way becomes a `FileError` that names the path and the reason.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from torchopt.errors import FileError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`, else delete it.

    The file may be read by whom the umask says, or by whom the file before it was read, whatever the library that writes it thinks.

    Args:
        path: the destination file; its folder must exist.

    Raises:
        FileError: the folder is missing or not writable, or the disk is full.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_path(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['a.txt'])
    """
    check_place(path)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        mode = _mode(target, temporary)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise FileError(f"{target}: cannot be written ({error.strerror or error}); free space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a path at which no file can be written, before the work whose result it is for.

    Raises:
        FileError: it is empty or a folder, its folder is missing, or nothing may be written there.

    Example:
        >>> check_place("")
        Traceback (most recent call last):
        torchopt.errors.FileError: the path '' names no file; the name of a file to write is needed
    """
    target = Path(path)
    if not os.fspath(path) or not target.name or target.name == "..":
        raise FileError(f"the path {os.fspath(path)!r} names no file; the name of a file to write is needed")
    if not target.parent.is_dir():
        raise FileError(f"{target}: the folder {target.parent} does not exist; create it, or write somewhere else")
    if target.is_dir():
        raise FileError(f"{target}: is a folder; the name of a file to write is needed")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise FileError(f"{target}: cannot be written (the folder is read-only); permit it, or write somewhere else")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically.

    Raises:
        FileError: as `atomic_path`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _mode(target: Path, probe: Path) -> int:
    """The permissions of the file that is there, else those that a new one gets beside it: the umask is not read without being set."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(target.stat().st_mode)
    with open(probe, "xb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
