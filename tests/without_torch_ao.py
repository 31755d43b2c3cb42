"""torch as it will be when `torch.ao` is gone: importing this module takes it away, and what it has registered.

`scripts/test --without-torch-ao` runs the tests so; a subprocess imports it first. Libraries of today that lean on `torch.ao` are loaded
before the tests: those of that day will not.
"""

import contextlib
import importlib.abc
import sys

import torch

if "pytest" in sys.modules:  # the tests meet them
    import torch._inductor.lowering
    import torchvision  # noqa: F401


class Gone(importlib.abc.MetaPathFinder):
    """Finds no `torch.ao`, whoever asks."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.ao" or name.startswith("torch.ao."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def take_away():
    operators = sys.modules.get("torch.ao.quantization.fx._decomposed")
    if operators is not None:
        operators.quantized_decomposed_lib._destroy()
    for name in [n for n in sys.modules if n == "torch.ao" or n.startswith("torch.ao.")]:
        del sys.modules[name]
    with contextlib.suppress(AttributeError):
        del torch.ao
    sys.meta_path.insert(0, Gone())


take_away()
