"""Every error that a user of torchopt can cause.

One sentence each: *where: what is wrong, with the value; what would be right.*

    TorchoptError
    ├── ConfigError    a field out of its range, an unknown key (also a ValueError)
    ├── RuleError      a rule that matches nothing, or a weight that it cannot act on
    ├── ModelError     a model that cannot be used: NaN weights, control flow that cannot be traced, no such layer kind
    ├── DataError      an empty loader, a batch with NaN, a batch of another shape
    ├── StateError     a verb at the wrong time, or a state that belongs to another model or other rules
    ├── FileError      missing, truncated, foreign or unwritable files
    └── TargetError    a goal (latency, size, score) that was tried and cannot be reached; says the best found
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TorchoptError(Exception):
    """Parent of all errors that a user can cause; the command line prints it on one line and exits with 2."""


class ConfigError(TorchoptError, ValueError):
    """A configuration field is out of its range, of a wrong type, or unknown."""


class RuleError(TorchoptError):
    """A rule matches nothing, or names a weight that cannot be compressed."""


class ModelError(TorchoptError):
    """The model itself cannot be used as asked."""


class DataError(TorchoptError):
    """The data given is empty, not finite, or of another shape than the model takes."""


class StateError(TorchoptError):
    """A verb was called at the wrong time, or a saved state belongs to another model or other rules."""


class FileError(TorchoptError):
    """A file is missing, damaged, foreign, or cannot be written."""


class TargetError(TorchoptError):
    """A goal was tried for and cannot be reached."""


def nearest(value: str, candidates: Iterable[str], *, limit: int = 3) -> str:
    """Return `"; did you mean 'a' or 'b'?"` for the candidates closest to a mistyped value, else an empty string.

    Example:
        >>> nearest("prun", ["prune", "cluster", "quantize"])
        "; did you mean 'prune'?"
        >>> nearest("xyz", ["prune"])
        ''
    """
    close = difflib.get_close_matches(value, list(candidates), n=limit, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, else the name of its class.

    Example:
        >>> first_line(ValueError("\\n  too long\\n")), first_line(KeyError())
        ('too long', 'KeyError')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
