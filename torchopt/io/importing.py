"""Names of things in the user's own code: "package.module:attribute", found also in the working folder.

Recipes and the command line name model builders and data sets this way. Nothing of torchopt's own is looked up by string.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import random
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torchopt.errors import ConfigError, ModelError, TorchoptError, nearest

PACKAGE = str(Path(__file__).parents[1]) + os.sep
_INSTALLED = [Path(path) for name, path in sysconfig.get_paths().items() if "lib" in name]
LIBRARIES = tuple({str(path) + os.sep for folder in _INSTALLED for path in (folder, folder.resolve())})


def load_callable(spec: str, *, where: str) -> Callable[..., Any]:
    """Return the callable that "package.module:attribute" names.

    Args:
        spec: module path, colon, attribute; the working folder is searched first, as `python -m` does.
        where: what the error message opens with ("model.import").

    Raises:
        ConfigError: the spec has no colon, or the module or attribute does not exist or is not callable.

    Example:
        >>> load_callable("math:sqrt", where="model.import")(9.0)
        3.0
    """
    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(f"{where}: got {spec!r}; 'package.module:function' is needed")
    with _working_folder_first(), in_users_code(f"{where}: importing {module_name!r}", ConfigError):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise ConfigError(f"{where}: importing {module_name!r} failed: {error}; install what it needs") from error
            raise ConfigError(f"{where}: no module named {module_name!r}; run where it can be imported, or install it") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ConfigError(f"{where}: module {module_name!r} has no callable {attribute!r}{nearest(attribute, public)}")
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Let imports leave random numbers and the list of warning filters as they were; some libraries change them.

    The numbers are Python's, and numpy's and torch's where these are loaded.

    Example:
        >>> import random
        >>> before = random.getstate()
        >>> with unnoticed():
        ...     _ = random.random()
        >>> random.getstate() == before
        True
    """
    python = random.getstate()
    numpy, torch = (sys.modules.get(name) for name in ("numpy", "torch"))
    array = numpy.random.get_state() if hasattr(numpy, "random") else None  # type: ignore[union-attr]
    tensor = torch.get_rng_state() if hasattr(torch, "get_rng_state") else None  # type: ignore[union-attr]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(python)
            if array is not None:
                numpy.random.set_state(array)  # type: ignore[union-attr]
            if tensor is not None:
                torch.set_rng_state(tensor)  # type: ignore[union-attr]


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


class in_users_code:  # noqa: N801 - reads as a statement
    """Turn what the user's own code raises into one sentence with its file and line; a defect of torchopt's stays as it is.

    Whose it is, the innermost frame tells that is either torchopt's or the user's. Where there is none of the two, a library was called
    with what the user gave it.

    Args:
        what: what the sentence opens with.
        kind: the error to raise.
        called: the function that is called, to name its file where calling it already fails.

    Example:
        >>> with in_users_code("model.import: my_net:build", ConfigError):
        ...     int("many")
        Traceback (most recent call last):
        torchopt.errors.ConfigError: model.import: my_net:build: ValueError: invalid literal for int() with base 10: 'many'
    """

    def __init__(self, what: str, kind: type[TorchoptError] = ModelError, called: Callable[..., Any] | None = None) -> None:
        self.what, self.kind, self.called = what, kind, called

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception | SystemExit) or trace is None:
            return
        frames = _own(traceback.extract_tb(trace)[1:])
        users = [f for f in frames if not f.filename.startswith(PACKAGE)]
        if isinstance(error, TorchoptError):
            cause = error.__cause__
            while cause is not None and not users:  # what torchopt has told already, of what the user's code had raised
                users = [f for f in _own(traceback.extract_tb(cause.__traceback__)) if not f.filename.startswith(PACKAGE)]
                cause = cause.__cause__
            if users and ", line " not in str(error):
                raise type(error)(f"{error} ({_place(users[-1])})") from error
            return
        if isinstance(error, SyntaxError) and error.filename and not frames:
            users = [traceback.FrameSummary(error.filename, error.lineno or 0, "", line=error.text)]
        elif frames and frames[-1].filename.startswith(PACKAGE):
            return
        place = f" ({_place(users[-1])})" if users else self._definition(error)
        said = str(error).strip().splitlines()[0][:300] if str(error).strip() else "no message"
        raise self.kind(f"{self.what}: {type(error).__name__}: {said}{place}") from error

    def _definition(self, error: BaseException) -> str:
        """Where the function that could not be called is defined, and what it takes."""
        if self.called is None:
            return ""
        function = inspect.unwrap(self.called.__init__ if inspect.isclass(self.called) else self.called)  # type: ignore[misc]
        code = getattr(function, "__code__", None)
        if code is None or _is_library(code.co_filename):
            return ""
        names = [name for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if name != "self"]
        takes = f"; it takes {', '.join(names) or 'nothing'}" if isinstance(error, TypeError) else ""
        return f" ({_short(code.co_filename)}, line {code.co_firstlineno}{takes})"


def _own(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Torchopt's frames and the user's, without those of libraries."""
    return [frame for frame in frames if not frame.filename.startswith("<") and not _is_library(frame.filename)]


def _place(frame: traceback.FrameSummary) -> str:
    line = f": {' '.join(frame.line.split())}" if frame.line else ""
    return f"{_short(frame.filename)}, line {frame.lineno}{line}"


def _short(path: str) -> str:
    """The path as the user would type it: from the working folder where it lies below."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).relative_to(os.getcwd()))
    return path


def _is_library(path: str) -> bool:
    return path.startswith(LIBRARIES) and not path.startswith(PACKAGE)
