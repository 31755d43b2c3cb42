"""`torchopt search`: a recipe or a function in, a folder with the file, the recipe that makes it again, and the page out."""

import json

import pytest

from torchopt.cli.commands import status
from torchopt.recipe import load

RECIPE = """
model: {kind: digits_net, classes: 10, in_channels: 1, width: 0.25}
data: {kind: digits}
stages:
  - name: float
    train: {epochs: 2, batch_size: 64, optimizer: {kind: adamw, lr: 0.01}}
  - name: compressed
    compress: [{match: "*", quantize: {}}]
"""
FUNCTION = """
import torch
from torch import nn

def task():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return {"model": net, "batches": torch.randn(128, 64)}

def wrong():
    return 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHOPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "search_task.py").write_text(FUNCTION)
    (tmp_path / "net.yaml").write_text(RECIPE)


@pytest.mark.slow
def test_a_recipe_is_searched(tmp_path, capsys):
    assert status(["search", "net.yaml", "--max-drop", "0.05", "--out", "found", "--trials", "3"]) == 0
    told = json.loads((tmp_path / "found" / "search.json").read_text())
    assert (tmp_path / "found" / "model.onnx").stat().st_size == told["chosen"]["bytes"]
    assert told["float"]["score"] - told["chosen"]["score"] <= 0.05
    recipe = load(tmp_path / "found" / "searched.yaml").recipe
    assert [stage.title for stage in recipe.stages] == ["float", "searched"]
    assert recipe.stages[1].calibrate == 16
    assert "of at most 3" in capsys.readouterr().err


def test_a_function_is_searched_and_the_folder_is_not_written_over(tmp_path, capsys):
    asked = ["search", "search_task:task", "--max-drop", "0.1", "--out", "found", "--trials", "3"]
    assert status(asked) == 0
    first = (tmp_path / "found" / "search.json").read_text()
    assert {p.name for p in (tmp_path / "found").iterdir()} >= {"model.onnx", "searched.yaml", "report.html"}
    capsys.readouterr()
    assert status(asked) == 2
    assert "found: holds a search already; --resume goes on with it" in capsys.readouterr().err
    assert status([*asked, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == json.loads(first)["chosen"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["search_task:wrong", "--max-drop", "0.1"],
            "search: search_task:wrong returned int; a dict with model and batches is needed",
        ),
        (["search_task:task"], "search: got no limit; exactly one of"),
        (["nothing.yaml", "--max-drop", "0.1"], "nothing.yaml: cannot be read"),
    ],
)
def test_mistakes_exit_with_2(arguments, text, capsys):
    assert status(["search", *arguments, "--out", "found"]) == 2
    assert text in capsys.readouterr().err
