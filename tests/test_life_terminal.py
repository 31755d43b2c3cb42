"""Pictures, terminals and disks as they come: split folders, damaged files, a full or ASCII-only stdout, output that is there already."""

import io
import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchopt.cli import commands as cli
from torchopt.cli.terminal import reason_of, say, take_any_encoding
from torchopt.data import ImageFolder, read_inputs
from torchopt.errors import ConfigError, DataError, FileError
from torchopt.io.files import atomic_path, check_place
from torchopt.run.folder import Folder, Position


def pictures(folder: Path, count: int = 4, value: int = 100) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (12, 10), (value, 10 * i, 0)).save(folder / f"{i}.png")


def loaded(root: Path):
    return ImageFolder(root=str(root), image_size=8).load()


@pytest.mark.parametrize(
    ("folders", "note"),
    [
        (("train", "val"), "train/ is for training, val/ for testing"),
        (("train", "valid", "test"), "train/ is for training, test/ for testing; valid/ is not read"),
        (("Training", "Validation"), "Training/ is for training, Validation/ for testing"),
        (("train",), "its classes are split here; there is no folder for testing beside it"),
    ],
    ids=str,
)
def test_a_split_folder_is_understood_and_said(folders, note: str, tmp_path: Path) -> None:
    for folder in folders:
        for value, name in enumerate(("cat", "dog")):
            pictures(tmp_path / folder / name, value=100 * value)
        pictures(tmp_path / folder / ".ipynb_checkpoints")
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    (tmp_path / folders[0] / "cat" / "._0.png").write_text("of another system")
    data = loaded(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.note.endswith(note)
    sizes = (8, 8) if len(folders) > 1 else (6, 2)
    assert (len(data.train_labels), len(data.test_labels)) == sizes
    assert data.train_labels.sum() + data.test_labels.sum() == sum(sizes) / 2


def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    for folder in ("train", "val"):
        for name in ("cat", "dog"):
            pictures(tmp_path / folder / name, 1)
    pictures(tmp_path / "car", 1)
    with pytest.raises(DataError, match="holds train/ and val/ beside car/, which may be a split or classes"):
        loaded(tmp_path)
    (tmp_path / "car" / "0.png").unlink()  # empty: annotations and the like lie beside a split
    assert loaded(tmp_path).classes == ("cat", "dog")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "dogs")
    with pytest.raises(
        DataError, match=r"train/ has the classes \['cat', 'dog'\], val/ has the classes \['cat', 'dogs'\]; the same"
    ):
        loaded(tmp_path)
    pictures(tmp_path / "one" / "cat", 2)
    with pytest.raises(DataError, match=r"holds one class, 'cat'; one folder for each of at least two classes"):
        loaded(tmp_path / "one")
    (tmp_path / "one" / "dog").mkdir()
    with pytest.raises(FileError, match=r"the class 'dog' holds no picture; one folder of pictures a class is needed \(.bmp"):
        loaded(tmp_path / "one")


def test_changed_files_are_another_digest(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        pictures(tmp_path / name)
    before = loaded(tmp_path).files
    assert len(before) == 64
    assert loaded(tmp_path).files == before
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "9.png")
    assert loaded(tmp_path).files != before


DAMAGED = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>"),
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere.png")),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_picture_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        pictures(tmp_path / name, 1)
    DAMAGED[kind](tmp_path / "dog" / "0.png")
    for read in (lambda: loaded(tmp_path), lambda: read_inputs(tmp_path, size=(3, 8, 8))):
        with pytest.raises(FileError, match=r"dog/0.png: is no picture that can be read \(.+\); remove it or replace it"):
            read()


def test_pictures_of_sixteen_bits_are_not_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(tmp_path / "grey.png")
    found = read_inputs(tmp_path, size=(1, 8, 8), normalize=((0,), (1,)))
    torch.testing.assert_close(found, torch.full((1, 1, 8, 8), 0x40 / 255))


def test_a_folder_that_links_to_itself_ends(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 1)
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert read_inputs(tmp_path, size=(3, 8, 8)).shape == (1, 3, 8, 8)


def test_arrays_that_are_no_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(["a"]))
    with pytest.raises(DataError, match="x.npy: holds <U1; one array of numbers is needed"):
        read_inputs(tmp_path / "x.npy", size=(1, 8, 8))
    with pytest.raises(
        ConfigError, match=r"pictures have 1 channel \(grey\) or 3, and inputs of shape \(4, 8, 8\) are asked for"
    ):
        read_inputs(tmp_path, size=(4, 8, 8))


NETWORK = """\
from torch import nn


def build():
    print('loading')
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "printing_net.py").write_text(NETWORK)
    np.save(tmp_path / "inputs.npy", np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("printing_net", None)


def test_quantize_writes_over_nothing_unasked(own: Path, capsys) -> None:
    (own / "model.onnx").write_text("precious")
    command = ["quantize", "printing_net:build", "--data", "inputs.npy", "--input-shape", "1,8,8"]
    assert cli.status(command) == 2
    assert capsys.readouterr().err == "torchopt: model.onnx: is there already; --out FILE names another, --force writes over it\n"
    assert cli.status([*command, "--out", "inputs.npy"]) == 2
    assert "--out: inputs.npy is what is read; the name of another file is needed" in capsys.readouterr().err
    assert (own / "model.onnx").read_text() == "precious"
    assert cli.status([*command, "--overwrite", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verify"]["weights_equal"] is True  # one document: what the network prints goes to stderr
    assert "loading" in captured.err
    assert (own / "model.onnx").stat().st_size > 1000


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="the path '' names no file"), atomic_path(""):
        pass
    with pytest.raises(FileError, match="the path '..' names no file"):
        check_place("..")
    with pytest.raises(FileError, match="is a folder; the name of a file to write is needed"):
        check_place(tmp_path)
    with pytest.raises(FileError, match=r"none does not exist; create it, or write somewhere else"):
        check_place(tmp_path / "none" / "x.onnx")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that prints what ASCII lacks."""
    monkeypatch.setattr(cli.app.commands["unpack"], "callback", lambda **_: say("3 × 3"))
    return ["unpack", "a.onnx", "b.onnx"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_stdout_is_one_line(times: list[str], monkeypatch, capsys) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.status(times) == 2
    assert (
        capsys.readouterr().err
        == "torchopt: stdout: cannot be written (No space left on device); free space, or send it elsewhere\n"
    )


def test_a_closed_pipe_ends_without_a_word(times: list[str], monkeypatch, capsys) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.status(times) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_stdout_that_knows_ascii_only(times: list[str], monkeypatch) -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as narrow:
        monkeypatch.setattr(sys, "stdout", narrow)
        take_any_encoding()
        assert cli.status(times) == 0
        assert narrow.buffer.getvalue() == b"3 ? 3\n"


def test_the_package_runs_as_a_module(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "take_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["torchopt", "check", "none.yaml"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("torchopt", run_name="__main__")
    assert capsys.readouterr().err.startswith("torchopt: none.yaml: cannot be read")


def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    position = Position(stage=0, start={"weight": torch.zeros(300_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(FileError, match=r"checkpoint.pt: cannot be written \(.+\); free space"):
            Folder(path=tmp_path).save(position)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_the_machine_lacks_is_no_defect() -> None:
    assert (
        reason_of(OSError(28, "No space left on device", "disk/x"))
        == "disk/x: No space left on device; free or permit it, or choose another place"
    )
    assert "set TMPDIR" in str(reason_of(FileNotFoundError(2, "No usable temporary directory found in ['/x']")))
    assert reason_of(FileNotFoundError(2, "No such file or directory", "lost.txt")) is None
