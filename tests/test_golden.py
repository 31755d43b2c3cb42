"""Files that version 0.1 wrote: they load today, and give the outputs that they gave then.

`python tests/test_golden.py` writes the files of the version that is installed, under tests/golden/VERSION; it was run once for 0.1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(p.name for p in GOLDEN.glob("*") if p.is_dir())


class Small(nn.Module):
    """A convolution with its norm, a residual sum, attention, a linear layer: one of each kind that a file records."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.stem(x)))  # (n, 16, 6, 6)
        y = y + F.relu(self.body(y))
        y = y.flatten(2).transpose(1, 2)  # (n, 36, 16)
        y = y + self.mix(y, y, y, need_weights=False)[0]
        return self.head(y.mean(1))  # type: ignore[no-any-return]


class Sequence(nn.Module):
    """An embedding and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.memory(self.words(ids))[0][:, -1])  # type: ignore[no-any-return]


def fresh(kind: type[nn.Module]) -> nn.Module:
    """A network of the same architecture; its weights do not matter, since a file brings its own."""
    torch.manual_seed(1)
    return kind()


def data(kind: type[nn.Module]) -> torch.Tensor:
    """The same inputs on every machine: closed forms, no generator."""
    if kind is Sequence:
        return torch.arange(24).reshape(4, 6) * 7 % 20
    return torch.sin(torch.arange(4 * 2 * 36, dtype=torch.float32)).reshape(4, 2, 6, 6)


ALL_THREE = Rule(
    "*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5)), cluster=Cluster(n_clusters=8), quantize=Quantize()
)
SCALES = Rule("*", quantize=Quantize(learn_scale=True, weight_bits=4))
BLOCKS = Rule("*", quantize=Quantize(mode="weight_only", weight_bits=4, block_size=16))
RANGES = Rule("*", quantize=Quantize(equalize=False, rounding="nearest", bias_correction=False))
CASES: dict[str, tuple[type[nn.Module], list[Rule] | None]] = {
    "all-three": (Small, [ALL_THREE]),
    "learned-scales": (Small, [SCALES]),
    "weight-only": (Sequence, [Rule("*", quantize=Quantize(mode="weight_only"))]),
    "blocks": (Small, [BLOCKS]),
    "masks": (Sequence, [Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5)))]),
    "shrunken": (Small, None),
}
TRAINED = [name for name, (_, rules) in CASES.items() if rules is not None]


def _outputs(model: nn.Module, kind: type[nn.Module]) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(data(kind)).numpy()  # type: ignore[no-any-return]


def _from_file(path: Path, kind: type[nn.Module]) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: data(kind).numpy()})[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_finished_model_loads_and_gives_its_outputs(version: str, name: str) -> None:
    folder, kind = GOLDEN / version, CASES[name][0]
    loaded = torchopt.load(folder / f"{name}.safetensors", fresh(kind))
    np.testing.assert_allclose(_outputs(loaded, kind), np.load(folder / "outputs.npz")[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_model_in_training_loads_steps_and_is_finalized(version: str, name: str) -> None:
    folder, kind = GOLDEN / version, CASES[name][0]
    loaded = torchopt.load(folder / f"{name}.training.safetensors", fresh(kind))
    np.testing.assert_allclose(
        _outputs(torchopt.finalize(loaded), kind), np.load(folder / "outputs.npz")[name], rtol=1e-4, atol=1e-5
    )
    loaded.train()(data(kind)).square().mean().backward()
    torch.optim.SGD(loaded.parameters(), lr=1e-3).step()
    assert torchopt.step(loaded) == 3


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_packed_file_runs_and_unpacks(version: str, name: str, tmp_path: Path) -> None:
    folder, kind = GOLDEN / version, CASES[name][0]
    packed = _from_file(folder / f"{name}.onnx", kind)
    np.testing.assert_allclose(packed, np.load(folder / "outputs.npz")[name], rtol=1e-3, atol=1e-3)
    torchopt.unpack(folder / f"{name}.onnx", tmp_path / "dense.onnx")
    np.testing.assert_allclose(_from_file(tmp_path / "dense.onnx", kind), packed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_ranges_load(version: str) -> None:
    prepared = torchopt.prepare(fresh(Small), [RANGES], (data(Small),))
    torchopt.load_ranges(prepared, GOLDEN / version / "ranges.json")
    assert torchopt.finalize(prepared) is not None


def test_there_are_golden_files() -> None:
    assert "0.1" in VERSIONS


def _write(folder: Path) -> None:
    """All files of this version, with the outputs of the finished models."""
    folder.mkdir(parents=True)
    outputs = {}
    for name, (kind, rules) in CASES.items():
        torch.manual_seed(0)
        model, example = kind(), data(kind)
        if rules is None:
            final = torchopt.shrink(model.eval(), (example,), ratio=0.5)
        else:
            prepared = torchopt.prepare(model, rules, (example,))
            optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-2)
            for _ in range(2):
                prepared.train()(example).square().mean().backward()
                optimizer.step()
                torchopt.step(prepared)
            torchopt.save(prepared, folder / f"{name}.training.safetensors")
            final = torchopt.finalize(prepared)
        torchopt.save(final, folder / f"{name}.safetensors")
        torchopt.export(final.eval(), (example,), folder / f"{name}.onnx", pack=True)
        outputs[name] = _outputs(final, kind)
    np.savez(folder / "outputs.npz", **outputs)
    measured = torchopt.prepare(fresh(Small), [RANGES], (data(Small),))
    torchopt.save_ranges(torchopt.calibrate(measured, [data(Small)]), folder / "ranges.json")


if __name__ == "__main__":
    _write(GOLDEN / ".".join(torchopt.__version__.split(".")[:2]))
    sys.exit()
