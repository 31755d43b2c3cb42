"""The whole path on a tiny recipe: what lies in the folder, and that a killed run ends with the same files, bit for bit."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from torchopt.errors import DataError, FileError, ModelError, RuleError, StateError
from torchopt.recipe import parse
from torchopt.run import final_model, matched, read_report, run, stages
from torchopt.run.folder import Folder

TINY = """\
model: {kind: digits_net, classes: 10, width: 0.25}
data: {kind: digits}
stages:
  - name: float
    train: {epochs: 2, batch_size: 128, optimizer: {kind: adamw, lr: 0.01}, augment: {shift: 1}}
  - name: compressed
    compress:
      - match: "*"
        prune: {schedule: {kind: polynomial, final_sparsity: 0.6, end_step: 20, frequency: 5}}
        cluster: {n_clusters: 16}
        quantize: {}
    train: {epochs: 3, batch_size: 128, distill: true}
benchmark: {repeats: 3}
"""
FILES = {"recipe.yaml", "checkpoint.pt", "model.onnx", "baseline.onnx", "report.json", "report.html"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A finished run, and a copy of each checkpoint that it wrote on the way."""
    root = tmp_path_factory.mktemp("run")
    copies: list[Path] = []
    save = Folder.save

    def saving(folder: Folder, position: object) -> None:
        save(folder, position)
        copies.append(root / f"checkpoint-{len(copies)}.pt")
        shutil.copy(folder["checkpoint.pt"], copies[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "save", saving)
        run(parse(TINY), root / "out", progress=False)
    return root / "out", copies


def test_the_folder_holds_exactly_the_promised_files(straight: tuple[Path, list[Path]]) -> None:
    out, _ = straight
    assert {p.name for p in out.iterdir()} == FILES
    assert (out / "recipe.yaml").read_text() == TINY


def test_the_report_has_what_the_contract_names(straight: tuple[Path, list[Path]]) -> None:
    out, _ = straight
    report = json.loads((out / "report.json").read_text())
    assert 0.3 < report["score"]["final"] <= 1
    assert report["size_bytes"]["final"] == (out / "model.onnx").stat().st_size
    assert report["size_bytes"]["baseline"] == (out / "baseline.onnx").stat().st_size
    assert report["size_bytes"]["final"] < report["size_bytes"]["baseline"] / 3
    assert report["size_bytes"]["final_gzip"] > 0
    assert report["latency_ms"]["baseline"] > 0
    assert report["latency_ms"]["final"] > 0
    assert report["macs"]["final"] == report["macs"]["baseline"] > 0
    assert report["verify"]["weights_equal"] is True
    assert report["verify"]["top1_agreement"] >= 0.99
    assert report["verify"]["weights_compared"] == 10
    assert report["placement"]["float"] == []
    assert len(report["placement"]["integer"]) == 10
    assert [s["name"] for s in report["stages"]] == ["float", "compressed"]
    layers = {row["name"]: row for row in report["layers"]}
    dense = layers["features.3.first.conv.weight"]
    assert dense["shape"] == [24, 24, 3, 3]
    assert dense["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert dense["distinct_values"] <= 16
    assert dense["bits"] <= 3.0  # a weight, as it is stored
    assert dense["bytes"] > 0


def test_resuming_from_every_checkpoint_gives_the_same_files(straight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out, copies = straight
    assert len(copies) == 6  # two epochs, the change of stage, three epochs
    for number in (0, 2, 3, 5):
        again = tmp_path / str(number)
        again.mkdir()
        checkpoint = torch.load(copies[number], weights_only=True)
        torch.save({**checkpoint, "seconds": checkpoint["seconds"] + 1000}, again / "checkpoint.pt")
        shutil.copy(out / "recipe.yaml", again)
        report = run(parse(TINY), again, resume=True, progress=False)
        assert 1000 < sum(stage["seconds"] for stage in report["stages"]) < report["seconds"] < 1000 + 120  # of both processes
        for name in ("baseline.onnx", "model.onnx"):
            assert (again / name).read_bytes() == (out / name).read_bytes(), f"{name} after checkpoint {number}"


def test_the_checkpoint_holds_no_pickled_code(straight: tuple[Path, list[Path]]) -> None:
    out, _ = straight
    assert torch.load(out / "checkpoint.pt", weights_only=True)["stage"] == 1


def test_a_finished_run_is_not_run_again(straight: tuple[Path, list[Path]]) -> None:
    out, _ = straight
    before = (out / "report.json").stat().st_mtime_ns
    assert run(parse(TINY), out, resume=True, progress=False) == read_report(out)
    assert (out / "report.json").stat().st_mtime_ns == before
    with pytest.raises(
        FileError, match=r"holds a run already \(recipe.yaml\); --resume goes on with it, --overwrite starts again"
    ):
        run(parse(TINY), out, progress=False)
    with pytest.raises(StateError, match="the run was started with another 'stages.0.train.epochs'"):
        run(parse(TINY, ["stages.0.train.epochs=9"]), out, resume=True, progress=False)


def test_the_final_model_of_a_run_is_the_exported_one(straight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from torchopt.export import export

    out, _ = straight
    model, example = final_model(out)
    export(model, (example,), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def _started(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torchopt", "run", str(recipe), "--out", str(out), "--resume"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def _killed_at(recipe: Path, out: Path, reached) -> None:
    process = _started(recipe, out)
    deadline = time.monotonic() + 120
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_kill_minus_nine_at_any_moment_then_resume_gives_the_same_files(
    straight: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    reference, _ = straight
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(TINY)
    checkpoint = out / "checkpoint.pt"
    _killed_at(recipe, out, lambda: (out / "recipe.yaml").exists())
    assert not (out / "report.json").exists()
    _killed_at(recipe, out, checkpoint.exists)
    seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    _killed_at(recipe, out, lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen)
    _killed_at(recipe, out, lambda: (out / "baseline.onnx").exists())
    last = _started(recipe, out)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors.decode()
    assert {p.name for p in out.iterdir()} == FILES
    for name in ("baseline.onnx", "model.onnx"):
        if torch.get_num_threads() == 1:  # sums over several threads end in another last bit than over one
            assert (out / name).read_bytes() == (reference / name).read_bytes()
        else:
            assert (out / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (('match: "*"', "match: featurs.*"), RuleError, "rule 1 .*'featurs.*'.* matches no module"),
        (("classes: 10", "classes: 4"), ModelError, r"model: gives outputs of shape \(1, 4\) for data of 10 classes; \(N, 10\)"),
        (
            ("classes: 10", "classes: 10, in_channels: 3"),
            ModelError,
            r"model: does not take the data's inputs of shape \(1, 1, 8, 8\)",
        ),
        (("classes: 10", "classes: 10, weights: none.pt"), FileError, "none.pt: no such file"),
    ],
)
def test_mistakes_are_found_before_the_folder_is_touched(change, error, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        run(parse(TINY.replace(*change)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_nan_weights_and_empty_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(TINY).recipe.model.build()
    model.classifier.weight.data[0, 0] = float("nan")
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(ModelError, match="model: classifier.weight holds NaN or infinity; finite weights are needed"):
        run(parse(TINY, [f"model.weights={tmp_path / 'nan.pt'}"]), tmp_path / "out", progress=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "no_data.py").write_text(
        "import torch\nfrom torchopt.data import Dataset\n\n\n"
        "def empty():\n    x, y = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)\n"
        "    return Dataset(train_inputs=x, train_labels=y, test_inputs=x, test_labels=y, classes=('a',))\n"
    )
    with pytest.raises(DataError, match="data: the train part is empty; at least one sample is needed"):
        run(parse(TINY.replace("kind: digits}", "import: 'no_data:empty'}")), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file/out: cannot be written \(Not a directory\); give another folder by --out"):
        run(parse(TINY), tmp_path / "file" / "out", progress=False)


def test_damaged_checkpoints(straight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out, _ = straight
    shutil.copy(out / "recipe.yaml", tmp_path)
    whole = (out / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="checkpoint.pt: is damaged"):
        run(parse(TINY), tmp_path, resume=True, progress=False)
    torch.save({"format": 99}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileError, match="checkpoint.pt: is no checkpoint of format 1"):
        run(parse(TINY), tmp_path, resume=True, progress=False)
    torch.save({"format": 1, "stage": 0}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileError, match="checkpoint.pt: lacks parts of a checkpoint"):
        run(parse(TINY), tmp_path, resume=True, progress=False)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(FileError, match="recipe.yaml: is missing beside the run's other files"):
        run(parse(TINY), tmp_path, resume=True, progress=False)


def test_a_run_without_compression_and_one_in_one_shot(tmp_path: Path) -> None:
    plain = TINY[: TINY.index("  - name: compressed")] + "benchmark: {repeats: 3}\n"
    report = run(parse(plain), tmp_path / "plain", progress=False)
    assert (tmp_path / "plain" / "model.onnx").read_bytes() == (tmp_path / "plain" / "baseline.onnx").read_bytes()
    assert report["score"]["final"] == report["score"]["baseline"]
    shot = plain.replace("benchmark", "  - compress: [{match: '*', quantize: {}}]\n    calibrate: 4\nbenchmark")
    report = run(parse(shot), tmp_path / "shot", progress=False)
    assert report["score"]["final"] > report["score"]["baseline"] - 0.1
    assert report["placement"]["float"] == []


def test_a_trial_run_shorter_than_the_schedule_says_so_in_the_report(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="stages.1: trains 11 optimizer steps"):
        report = run(parse(TINY, ["train.epochs=1"]), tmp_path / "out", unfinished=True, progress=False)
    short = [skip["reason"] for skip in report["skipped"] if skip["reason"].startswith("training ended")]
    masked = [row for row in report["layers"] if 0.4 < row["sparsity"] < 0.59]
    assert len(short) == len(masked) > 4
    assert short[0].startswith("training ended at step 11, with sparsity 0.5")
    assert short[0].endswith(" of 0.6, which the schedule reaches at step 20")


def _rank(rank: int, port: int, text: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    bake = stages.finalize

    def keeping(ready: torch.nn.Module, **options: bool) -> torch.nn.Module:
        torch.save(ready.state_dict(), f"{folder}/{rank}.pt")
        return bake(ready, **options)

    stages.finalize = keeping
    run(parse(text), f"{folder}/two", progress=False)


def _on_two_ranks(text: str, folder: Path) -> dict[str, Any]:
    """Run a recipe on two ranks, check that they end in the same state, and return the report."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, text, str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert {name.rpartition("_")[2] for name in first} >= {"mask", "val", "var"}  # masks, ranges, statistics
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return read_report(folder / "two")


def _assert_alike(one: dict[str, Any], two: dict[str, Any], points: float) -> None:
    assert abs(one["score"]["final"] - two["score"]["final"]) <= points / 100
    assert [row["sparsity"] for row in one["layers"]] == [row["sparsity"] for row in two["layers"]]


def test_two_ranks_end_in_one_state(straight: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _assert_alike(read_report(straight[0]), _on_two_ranks(TINY, tmp_path), points=3)  # far from the end of learning


@pytest.mark.slow
def test_two_ranks_end_as_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "recipes" / "digits.yaml").read_text()
    one = run(parse(text), tmp_path / "one", progress=False)
    _assert_alike(one, _on_two_ranks(text, tmp_path), points=0.3)  # one of the 360 pictures is 0.28


def test_rows_of_check() -> None:
    rows = matched(parse(TINY).recipe)
    assert len(rows) == 10
    assert rows[0] == {
        "stage": "compressed",
        "weight": "features.0.conv.weight",
        "shape": "8×1×3×3",
        "rule": "*",
        "prune": "60% element",
        "cluster": "16 values",
        "quantize": "static, 8 bits",
    }


def test_reports_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="report.json: cannot be read; the folder of a finished run is needed"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(FileError, match="report.json: is damaged"):
        read_report(tmp_path)
