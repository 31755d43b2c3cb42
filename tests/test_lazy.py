"""`import torchopt` and the command line's help load no torch; what is named is there all the same, and is a function where it is one."""

import ast
import doctest
import graphlib
import importlib
import pickle
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import torchopt

HIDDEN = ["export", "from_torch_ao", "pack", "report", "search"]  # functions with the name of a folder
HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "torchvision", "torch_pruning", "sklearn", "scipy")


def ran(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "asked",
    [
        "import torchopt, torchopt.errors, torchopt.__main__; torchopt.__version__; dir(torchopt); torchopt.ConfigError",
        "from torchopt.cli.commands import status; assert status(['--help']) == 0",
        "from torchopt.cli.commands import status; assert status(['run', '--help']) == 0",
        "from torchopt.cli.commands import status; assert status(['--version']) == 0",
    ],
)
def test_nothing_heavy_is_loaded(asked):
    told = ran(f"import sys\n{asked}\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert told.splitlines()[-1] == "[]"


ORDERS = [
    "import torchopt.export.export, torchopt.pack, torchopt.report",
    "from torchopt import *",
    "import torchopt.run, torchopt.cli.commands, torchopt.onnx_to_onnx",
]


def test_functions_are_functions_whatever_was_imported():
    """Each way of importing in a process of its own, forked after the libraries were loaded; none moves random numbers."""
    code = f"""
import os, random, types
import numpy, torch, torchvision, torch_pruning, onnx, onnxruntime, onnx_ir, onnxscript, safetensors.torch
def state():
    return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
def right(order):
    import torchopt
    assert all(type(getattr(torchopt, name)) is types.FunctionType for name in {HIDDEN!r}), order
for order in {ORDERS!r}:
    child = os.fork()
    if child == 0:
        before = state()
        exec(order)
        assert state() == before, order
        right(order)
        import torchopt.export.operators, torchopt.pack.choose, torchopt.report.html
        right(order)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
import torchopt
print(torchopt.recipe.parse.__name__, torchopt.codecs.encode.__module__)
"""
    assert ran(code) == "parse torchopt.codecs.encode"


def test_any_module_may_be_the_first_that_is_imported():
    """No ring of imports; asking a folder for one of its files imports the folder's `__init__` before."""
    package = Path(torchopt.__file__).parent
    files = {
        ".".join(("torchopt", *p.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in package.rglob("*.py")
    }
    graph = {name: set(_first(name, path, files)) for name, path in files.items() if name != "torchopt"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def _dotted(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _first(name, path, files):
    """What must be executed before the module is."""
    for node in _at_the_top(ast.parse(path.read_text(encoding="utf-8")).body):
        asked = [a.name for a in node.names] if isinstance(node, ast.Import) else [f"{node.module}.{a.name}" for a in node.names]
        for other in asked:
            parts = other.split(".")
            for end in range(2, len(parts) + 1):
                part = ".".join(parts[:end])
                if part in files and part != name and (end == len(parts) or not f"{name}.".startswith(f"{part}.")):
                    yield part


def _at_the_top(body):
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.With | ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)):
            yield from _at_the_top(node.body)


def test_the_three_lists_of_names_agree():
    """What type checkers see, what is imported when asked for, and `__all__`."""
    tree = ast.parse(Path(torchopt.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == dict(type(torchopt).where)
    errors = {name for name in vars(torchopt.errors) if name.endswith("Error") and name in torchopt.__all__}
    assert set(torchopt.__all__) == set(seen) | errors
    assert set(torchopt.__all__) <= set(dir(torchopt))
    assert sorted(name for name in seen if importlib.util.find_spec(f"torchopt.{name}")) == HIDDEN


@pytest.mark.parametrize("name", torchopt.__all__)
def test_each_name_is_its_modules_own(name):
    found = getattr(torchopt, name)
    assert getattr(sys.modules[found.__module__], found.__name__) is found
    assert pickle.loads(pickle.dumps(found)) is found
    typing.get_type_hints(found)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'torchopt' has no attribute 'exprot'"):
        torchopt.exprot
    with pytest.raises(ImportError, match="cannot import name 'exprot'"):
        exec("from torchopt import exprot")
    assert not hasattr(torchopt, "__wrapped__")


@pytest.mark.parametrize("name", [*HIDDEN, "prepare"])
def test_a_test_may_put_another_in_its_place(name, monkeypatch):
    before = getattr(torchopt, name)
    with monkeypatch.context() as patch:
        patch.setattr(torchopt, name, len)
        assert getattr(torchopt, name) is len
        patch.delattr(torchopt, name)
        assert getattr(torchopt, name) is before  # asked for again
    assert getattr(torchopt, name) is before


def test_doctests_are_found_as_before():
    found = doctest.DocTestFinder(exclude_empty=False).find(torchopt, "torchopt")
    assert [test.name for test in found] == ["torchopt"]
