"""Names of things in the user's own code: "package.module:attribute", found also in the working folder.

Recipes and the command line name model builders and data sets this way. Nothing of torchopt's own is looked up by string.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from torchopt.errors import ConfigError, nearest


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
    with _working_folder_first():
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
    """Let imports leave Python's and numpy's random numbers and the list of warning filters as they were; some libraries change them.

    Example:
        >>> import random
        >>> before = random.getstate()
        >>> with unnoticed():
        ...     _ = random.random()
        >>> random.getstate() == before
        True
    """
    python, array = random.getstate(), np.random.get_state()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
