"""What was measured once, on disk: lines of JSON, each under a key that names all that it depends on.

A line is written when it is known, so a killed process loses the one it was at, and the next finds all others. A line that was cut
in the middle is no JSON, and is measured again. A disk that is full, or a folder that cannot be written, costs the cache and not
the result: it is said once.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

Key = str


class Journal:
    """Results by key, in memory and in one file.

    Args:
        path: the file; None keeps them in memory only.

    Example:
        >>> journal = Journal(None)
        >>> journal.put("a", {"loss": 0.5})
        >>> journal.get("a"), journal.get("b")
        ({'loss': 0.5}, None)
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._known, self._cut = path, dict[Key, dict[str, Any]](), False
        if path is None or not path.is_file():
            return
        text = path.read_bytes().decode("utf-8", errors="replace")
        self._cut = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                found = json.loads(line)
                self._known[str(found["key"])] = dict(found["value"])
            except (ValueError, TypeError, KeyError):
                continue

    def get(self, key: Key) -> dict[str, Any] | None:
        """Return what is known under a key, or None."""
        return self._known.get(key)

    def put(self, key: Key, value: Mapping[str, Any]) -> None:
        """Remember a result, and write it.

        Warns:
            UserWarning: the file cannot be written; said once.
        """
        self._known[key] = dict(value)
        if self._path is None:
            return
        line = json.dumps({"key": key, "value": self._known[key]}) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("\n" + line if self._cut else line)
            self._cut = False
        except OSError as error:
            warnings.warn(
                f"{self._path}: cannot be written ({error.strerror or error}); what is measured from here on is not kept; free space, "
                "or give cache= another folder",
                stacklevel=2,
            )
            self._path = None


def folder_of(cache: str | os.PathLike[str] | bool) -> Path | None:
    """Return the folder of a cache: the one given, the user's own for True ($TORCHOPT_CACHE decides it), None for False."""
    if cache is False:
        return None
    if cache is not True:
        return Path(cache)
    named = os.environ.get("TORCHOPT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "torchopt"


def digest(*parts: object) -> str:
    """Return a short name of content: texts, numbers, tensors and whatever holds them.

    Example:
        >>> digest("a", torch.zeros(2)) == digest("a", torch.zeros(2)) != digest("a", torch.ones(2))
        True
    """
    found = hashlib.sha256()
    _feed(found, parts)
    return found.hexdigest()[:24]


def digest_of(model: nn.Module) -> str:
    """Return a name of a network: its layers as they print, and all that its state holds."""
    return digest(
        repr(model), sorted((name, value) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor))
    )


def _feed(found: Any, value: object) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        array = value.contiguous().view(torch.uint8).numpy() if value.dim() and value.numel() else np.array(value.tolist())
        found.update(f"{tuple(value.shape)}{value.dtype}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    elif isinstance(value, Mapping):
        _feed(found, list(value.items()))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes):
        listed = list(value)
        found.update(f"[{len(listed)}".encode())
        for part in listed:
            _feed(found, part)
    else:
        found.update(f"{type(value).__name__}:{value!r};".encode())
