"""A run's life: what is refused before it starts, one run a folder, the data of then, a word when it is stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from torchopt.cli import commands as cli
from torchopt.errors import ConfigError, DataError, FileError, ModelError, StateError
from torchopt.recipe import parse
from torchopt.run import matched, run
from torchopt.run.lock import LOCK, locked

MODEL = "model: {kind: digits_net, classes: 10, width: 0.25}\ndata: {kind: digits}\n"
LATE = "{match: '*', prune: {schedule: {kind: polynomial, final_sparsity: 0.6, end_step: 20, frequency: 5}}}"
SHORT = MODEL + f"stages: [{{compress: [{LATE}], train: {{epochs: 1, batch_size: 256}}}}]\nbenchmark: {{repeats: 3}}\n"
NETWORK = """\
from torch import nn


def build(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, classes))
"""
DATA = """\
import numpy as np
import torch
from torchopt.data import Dataset


def rows(change=0.0, labels=3, as_numpy=False, count=64):
    x = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    x[5] += change
    y = torch.arange(count) % labels
    if as_numpy:
        x = x.numpy()
    return Dataset(train_inputs=x, train_labels=y, test_inputs=x, test_labels=y, classes=('a', 'b', 'c'))
"""
OWN = """\
model: {import: 'own_net:build'}
data: {import: 'own_data:rows'}
stages: [{train: {epochs: 2, batch_size: 16}}]
benchmark: {repeats: 3}
"""
HOLDER = """\
import fcntl, json, os, socket, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a network, data and a recipe of the user's own, which is the working folder."""
    for name, text in (("own_net.py", NETWORK), ("own_data.py", DATA), ("own.yaml", OWN), ("late.yaml", SHORT)):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("own_net", "own_data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("own_net", "own_data"):
        sys.modules.pop(name, None)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert cli.status(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("torchopt: ")
    return captured.err[len("torchopt: ") :].strip()


def test_a_schedule_that_training_does_not_reach_is_refused_with_both_numbers(own: Path, capsys) -> None:
    said = complaint(capsys, "run", "late.yaml", "--out", "out")
    assert (
        "stages.0: trains 5 optimizer steps (1 epochs of 5), and rule 1 (match='*') reaches its sparsity of 0.6 at step 20"
        in said
    )
    assert "by then 0.347" in said
    assert not (own / "out").exists()
    soft = SHORT.replace("frequency: 5}}", "frequency: 5}}, cluster: {n_clusters: 4, soft_until: 9}").replace(
        "end_step: 20", "end_step: 5"
    )
    with pytest.raises(ConfigError, match=r"trains 5 .*rule 1 \(match='\*'\) has soft values until step 9"):
        run(parse(soft), own / "out", progress=False)
    rounds = (
        MODEL + "stages: [{compress: [{match: '*', quantize: {milestones: [0, 3, 8]}}], train: {epochs: 1, batch_size: 256}}]"
    )
    with pytest.raises(ConfigError, match="has its last milestone at step 8; train longer, end it earlier, or give --unfinished"):
        run(parse(rounds), own / "out", progress=False)
    assert not (own / "out").exists()


def test_what_could_only_fail_later_is_refused_before_the_folder_is_touched(own: Path, monkeypatch) -> None:
    cases = [
        (
            OWN.replace("epochs: 2", "epochs: 2, distill: true"),
            ConfigError,
            "stages.0.train.distill: the teacher is the model before",
        ),
        (
            OWN.replace("epochs: 2", "epochs: 2, augment: {shift: 1}").replace("rows'", "flat'"),
            DataError,
            "pictures .N, C, H, W. are",
        ),
        (
            OWN.replace("build'", "normed'").replace("batch_size: 16", "batch_size: 1"),
            ModelError,
            "cannot be trained on 1 of the 1 samp",
        ),
        (OWN.replace("build'", "two'"), ModelError, "model: gives tuple in training mode; the logits alone"),
    ]
    if not torch.cuda.is_available():
        cases.append(
            (OWN.replace("epochs: 2", "epochs: 2, device: cuda"), ConfigError, "Train.device: is 'cuda', but torch finds no")
        )
    with (own / "own_net.py").open("a") as file:
        file.write("\n\ndef normed():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3))\n")
        file.write("\n\nclass Two(nn.Linear):\n    def forward(self, x):\n        y = super().forward(x.flatten(1))\n")
        file.write("        return (y, y) if self.training else y\n\n\ndef two():\n    return Two(12, 3)\n")
    with (own / "own_data.py").open("a") as file:
        file.write("\n\ndef flat():\n    x, y = torch.randn(8, 12), torch.arange(8) % 3\n")
        file.write("    return Dataset(train_inputs=x, train_labels=y, test_inputs=x, test_labels=y, classes=('a', 'b', 'c'))\n")
    for text, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(parse(text), own / "out", progress=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="stages.0.train.batch_size: 16 is no multiple of the 3 processes"):
        run(parse(OWN), own / "out", progress=False)
    assert not (own / "out").exists()


def test_a_teacher_that_knows_nothing_is_warned_of(own: Path, monkeypatch) -> None:
    class Enough(BaseException):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Enough

    monkeypatch.setattr("torchopt.run.pipeline.run_stages", stop)
    text = OWN.replace("{train:", "{compress: [{match: '*', prune: {schedule: 0.5}}], train:").replace(
        "epochs: 2", "epochs: 2, distill: true"
    )
    with (
        pytest.warns(
            RuntimeWarning, match=r"distill: the teacher is the model as it starts, .* no better than guessing \(34.4%\)"
        ),
        pytest.raises(Enough),
    ):
        run(parse(text), own / "out", progress=False)


def test_the_users_own_mistakes_are_one_line_with_file_and_line(own: Path, capsys) -> None:
    arguments = ("run", "own.yaml", "--out", "out", "--set")
    said = complaint(capsys, *arguments, "model.args={clases: 3}")
    assert said == (
        "model.import: own_net:build: TypeError: build() got an unexpected keyword argument 'clases' (own_net.py, line 4; it takes classes)"
    )
    said = complaint(capsys, *arguments, "data.args={as_numpy: true}")
    assert said.startswith("data: the train inputs are a numpy.ndarray; a torch.Tensor is needed")
    assert "(own_data.py, line 12: return Dataset(" in said
    said = complaint(capsys, *arguments, "data.args={count: many}")
    assert said.startswith("data.import: own_data:rows: TypeError: ")
    assert "(own_data.py, line 7: x = torch.randn(count" in said
    assert "data: the train labels reach 3; 0 … 2 are the classes" in complaint(capsys, *arguments, "data.args={labels: 4}")
    assert "data: the train inputs hold NaN or infinity" in complaint(capsys, *arguments, "data.args={change: .nan}")
    (own / "broken.py").write_text("import torch\n\ndef build(:\n    pass\n")
    said = complaint(capsys, *arguments, "model.import=broken:build")
    assert (
        said
        == "model.import: importing 'broken': SyntaxError: invalid syntax (broken.py, line 3) (broken.py, line 3: def build(:)"
    )
    (own / "ends.py").write_text("import sys\nsys.exit('no licence')\n")
    assert "SystemExit: no licence (ends.py, line 2: sys.exit(" in complaint(capsys, *arguments, "model.import=ends:build")
    with (own / "own_net.py").open("a") as file:
        file.write(
            "\n\nclass Odd(nn.Linear):\n    def forward(self, x):\n        return super().forward(x.flatten(1)) + torch.zeros(3)\n"
        )
        file.write("\n\ndef odd():\n    return Odd(12, 3)\n")
    sys.modules.pop("own_net")
    said = complaint(capsys, *arguments, "model.import=own_net:odd")
    assert "NameError: name 'torch' is not defined (own_net.py, line 10: return super()" in said
    assert not (own / "out").exists()


def test_an_empty_out_is_refused(own: Path, capsys) -> None:
    assert complaint(capsys, "run", "own.yaml", "--out", "") == "--out: is empty; the name of what to write is needed"
    assert "--out: is empty" in complaint(capsys, "export", "own_net:build", "--input-shape", "3,2,2", "--out", " ")
    assert not list(own.glob("*.onnx"))
    assert not (own / "recipe.yaml").exists()


def test_a_folder_is_held_by_one_run_and_given_up_when_its_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (tmp_path / ".model.onnx.1234.part").write_text("of the run in progress")
        with pytest.raises(FileError, match=f"{tmp_path.name}: process {holder.pid} is running in it; wait until it ends"):
            run(parse(SHORT, ["train.epochs=4"]), tmp_path, overwrite=True, progress=False)
        assert (tmp_path / ".model.onnx.1234.part").exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / LOCK).exists()  # left behind, and free
    with locked(tmp_path), pytest.raises(FileError, match=f"process {os.getpid()} is running in it"), locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_without_locks_of_the_system_the_process_that_is_named_decides(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torchopt.run.lock.fcntl", None)
    living = {"pid": os.getppid(), "host": os.uname().nodename}
    (tmp_path / LOCK).write_text(json.dumps(living))
    with pytest.raises(FileError, match=f"process {os.getppid()} is running in it"), locked(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps(living | {"host": "elsewhere"}))
    with pytest.raises(FileError, match="on elsewhere is running in it"), locked(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / LOCK).write_text(json.dumps(living | {"pid": ended.pid}))
    with locked(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the user's own network and data."""
    root = tmp_path_factory.mktemp("finished")
    (root / "own_net.py").write_text(NETWORK)
    (root / "own_data.py").write_text(DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(parse(OWN), root / "out", progress=False)
    for name in ("own_net", "own_data"):
        sys.modules.pop(name, None)
    return root / "out"


def test_a_resumed_run_needs_the_data_that_it_began_with(own: Path, finished: Path) -> None:
    shutil.copytree(finished, own / "out")
    (own / "out" / "report.json").unlink()
    (own / "own_data.py").write_text(DATA.replace("change=0.0", "change=0.5"))
    with pytest.raises(
        StateError, match=r"out: the data is not what the run began with \(the train inputs\); resume with the data of"
    ):
        run(parse(OWN), own / "out", resume=True, progress=False)
    for old, new, said in (
        ("% labels", "% 2", "the train labels"),
        ("count=64", "count=63", r"shape \(64, 3, 2, 2\) have \(63, 3, 2, 2\) now"),
    ):
        sys.modules.pop("own_data")
        (own / "own_data.py").write_text(DATA.replace(old, new))
        with pytest.raises(StateError, match=said):
            run(parse(OWN), own / "out", resume=True, progress=False)
    sys.modules.pop("own_data")
    (own / "own_data.py").write_text(DATA.replace("return", "x = x * (1 + 1e-6)\n    return"))  # the last bits of another library
    run(parse(OWN), own / "out", resume=True, progress=False)
    assert (own / "out" / "report.json").is_file()


def test_other_threads_or_another_torch_are_said(own: Path, finished: Path) -> None:
    shutil.copytree(finished, own / "out")
    (own / "out" / "report.json").unlink()
    state = torch.load(own / "out" / "checkpoint.pt", weights_only=True)
    torch.save(state | {"made": {"torch": "2.11.0", "threads": state["made"]["threads"]}}, own / "out" / "checkpoint.pt")
    with pytest.warns(
        RuntimeWarning, match=r"the run was begun with torch 2.11.0 \(now .*\); what comes may differ from it in the last bits"
    ):
        run(parse(OWN), own / "out", resume=True, progress=False)


def test_a_mixed_or_half_folder_is_one_sentence(own: Path, finished: Path, capsys) -> None:
    shutil.copytree(finished, own / "out")
    place = own / "out"
    assert cli.status(["export", "out", "--out", "again.onnx"]) == 0
    assert (own / "again.onnx").read_bytes() == (place / "model.onnx").read_bytes()
    state = torch.load(place / "checkpoint.pt", weights_only=True)
    (place / "recipe.yaml").write_text(OWN.replace("epochs: 2", "epochs: 9"))
    said = complaint(capsys, "export", "out", "--out", "x.onnx")
    assert said.startswith(
        "out/checkpoint.pt: belongs to another recipe than recipe.yaml beside it ('stages.0.train.epochs' differs)"
    )
    (place / "recipe.yaml").write_text(OWN)
    torch.save(state | {"stage": 3, "recipe": None}, place / "checkpoint.pt")
    assert "it has no stage 4" in complaint(capsys, "export", "out", "--out", "x.onnx")
    torch.save(state | {"training": state["training"] | {"step": 3}}, place / "checkpoint.pt")
    said = complaint(capsys, "export", "out", "--out", "x.onnx")
    assert said.startswith("out/checkpoint.pt: is of a run that has not ended, beside the report of another")
    (place / "report.json").write_text('{"score": 1}')
    assert "out/report.json: is damaged ('score' is missing" in complaint(capsys, "report", "out")
    (place / "report.json").write_text("[]")
    assert "out/report.json: is damaged" in complaint(capsys, "report", "out")
    assert not (own / "x.onnx").exists()


def test_a_folder_with_a_colon_is_a_folder(own: Path, finished: Path, capsys) -> None:
    shutil.copytree(finished, own / "runs" / "a:b")
    shutil.copytree(finished, own / "a:b")
    for name in ("runs/a:b", "a:b"):
        assert cli.status(["export", name, "--out", "a.onnx"]) == 0
    assert "runs/c:d/report.json: cannot be read" in complaint(capsys, "export", "runs/c:d", "--out", "x.onnx")


def test_check_promises_what_the_run_does() -> None:
    rule = "{match: '*', prune: {schedule: 0.8}, cluster: {n_clusters: 8}}"
    text = f"model: {{kind: ds_cnn, classes: 10}}\ndata: {{kind: digits}}\nstages: [{{compress: [{rule}]}}]"
    rows = {row["weight"]: row for row in matched(parse(text).recipe)}
    depthwise = [row for row in rows.values() if row["shape"] == "64×1×3×3"]
    assert len(depthwise) == 4
    for row in depthwise:
        assert row["prune"].startswith("none: is a depthwise convolution")
        assert row["cluster"].startswith("none: ")
    assert sum(row["prune"] == "80% element" for row in rows.values()) == len(rows) - 4


def test_ranks_that_do_not_write_print_nothing(own: Path, finished: Path, monkeypatch) -> None:
    import contextlib

    @contextlib.contextmanager
    def second():
        yield 1

    monkeypatch.setattr("torchopt.run.pipeline.process_group", second)
    shutil.copytree(finished, own / "out")
    assert run(parse(OWN), own / "out", resume=True, progress=False) == {}


def test_sigterm_is_one_line_and_143_and_the_run_goes_on(own: Path) -> None:
    (own / "long.yaml").write_text(OWN.replace("epochs: 2", "epochs: 100000"))
    command = [sys.executable, "-m", "torchopt", "run", "long.yaml", "--out", "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (own / "out" / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert errors == "torchopt: stopped by SIGTERM; the same command with --resume goes on\n"
    assert {path.name for path in (own / "out").iterdir()} == {"recipe.yaml", "checkpoint.pt"}
    assert torch.load(own / "out" / "checkpoint.pt", weights_only=True)["training"]["step"] >= 4


def test_a_trial_says_that_it_is_unfinished(own: Path, capsys) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.status(["run", "late.yaml", "--out", "out", "--unfinished", "--json"]) == 0
    captured = capsys.readouterr()
    reasons = [skip["reason"] for skip in json.loads(captured.out)["skipped"]]
    assert sum(reason.startswith("training ended at step 5, with sparsity 0.3") for reason in reasons) > 3
    assert captured.err.startswith("torchopt: warning: stages.0: trains 5 optimizer steps")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [*x]", "r:1: a.0: an anchor stands for what it is in; write the part out"),
        ("a:\n  b: 2020-13-45", "r:2: a.b: got 2020-13-45; month must be in 1..12"),
        ("a: !!bool x", "r:1: a: got x; 'x'"),
        ("? [1]\n: 2", "r:1: got a list or mapping as a key; a name is needed"),
        ("<<: 3", "r:1: '<<' merges keys and values; an anchor of some is needed"),
        ("\ta: 1", "r:1: not YAML: found character"),
        ("a: " + "9" * 5000, "r:1: a: got 9999999999999999999999999999999999999999…; Exceeds the limit"),
        ("a: " + "[" * 3000, "r: is nested too deeply; a recipe has a few levels"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 8)),
            "r: holds more than 100000",
        ),
    ],
    ids=lambda value: value[:12],
)
def test_texts_that_yaml_would_choke_on(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, name="r")
    assert str(caught.value).startswith(said)


def test_anchors_stand_for_parts_and_mappings_are_typed() -> None:
    stages = "stages:\n  - train: &t {epochs: 2}\n  - train: {<<: *t, batch_size: 8}\n"
    text = f"model: {{kind: digits_net, classes: 10}}\ndata: {{kind: digits}}\n{stages}"
    stages = parse(text).recipe.stages
    assert [(stage.train.epochs, stage.train.batch_size) for stage in stages] == [(2, 64), (2, 8)]
    with pytest.raises(ConfigError, match="r:6: stages.2.shrink.ratio.0: got 'half'; a number is needed"):
        parse(text + "  - shrink: {ratio: {'0': half}}", name="r")
