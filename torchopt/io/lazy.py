"""A package whose names are imported when they are asked for: `import torchopt` costs no torch.

`__getattr__` of a module (PEP 562) is asked only for what is not there. That is not enough where a function has the name of a folder, as
`torchopt.export` has: importing anything below the folder sets the package's attribute to the folder's module. So such names are data
descriptors on the package's class: the function is what one reads, and what the import sets is let go.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torchopt.io.importing import unnoticed


def lazy(package: str, names: Mapping[str, Iterable[str]]) -> None:
    """Let a package give names from elsewhere when they are asked for, and its own submodules.

    Args:
        package: the `__name__` of the package, whose module is being executed.
        names: what is public there, by the module that has it.
    """
    where = {name: module for module, found in names.items() for name in found}
    module = sys.modules[package]
    hidden = {name: Hidden(name, home) for name, home in where.items() if importlib.util.find_spec(f"{package}.{name}")}
    module.__class__ = type("LazyPackage", (LazyPackage,), {"__module__": __name__, "where": where, **hidden})


class LazyPackage(ModuleType):
    """A package that imports what it is asked for."""

    where: Mapping[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        """Import a public name from its module, or a submodule of that name."""
        if name in self.where:
            value = fetched(self.where[name], name)
        elif name.startswith("_") or importlib.util.find_spec(f"{self.__name__}.{name}") is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        else:
            with unnoticed():
                value = importlib.import_module(f"{self.__name__}.{name}")
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        """What is there, and what can be asked for."""
        return sorted({*super().__dir__(), *self.where})


class Hidden:
    """A public name that is a submodule's too; what the import of the submodule sets is let go."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    def __get__(self, package: ModuleType | None, kind: type | None = None) -> Any:
        """What was set, else what the module has."""
        if package is None:
            return self
        if self.name not in vars(package):
            vars(package)[self.name] = fetched(self.module, self.name)
        return vars(package)[self.name]

    def __set__(self, package: ModuleType, value: Any) -> None:
        """Take anything but the submodule."""
        if not isinstance(value, ModuleType):
            vars(package)[self.name] = value

    def __delete__(self, package: ModuleType) -> None:
        """Forget what was set."""
        vars(package).pop(self.name, None)


def fetched(module: str, name: str) -> Any:
    """Import `name` from `module`; the process stays as it was.

    Example:
        >>> fetched("math", "pi")
        3.141592653589793
    """
    with unnoticed():
        return getattr(importlib.import_module(module), name)
