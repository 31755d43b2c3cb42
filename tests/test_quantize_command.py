"""`torchopt quantize`: any data, any inputs, the library's defaults; what quantization cost, and apart from that what the file is."""

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from torchopt.cli import commands as cli
from torchopt.data.given import read_batches
from torchopt.data.preprocess import PRESETS, Preprocess
from torchopt.errors import ConfigError, DataError, FileError

CODE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.line = nn.Linear(8, 4)
    def forward(self, ids, scale, mask=None):
        x = self.embed(ids) * scale[:, None, None]
        x = x if mask is None else x * mask[..., None].float()
        return self.line(x).mean(1)

def two():
    torch.manual_seed(0)
    return Two().eval()

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()

def batches():
    for i in range(100):
        yield torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.zeros(3, dtype=torch.int64)

def nothing():
    return []

def score(model):
    torch.manual_seed(1)
    return float(model(torch.randn(64, 3, 8, 8)).std())

def words(model):
    return "good"

def prepared(picture):
    return torch.full((3, 8, 8), float(picture.size[0]) / 10)
"""
X = np.random.default_rng(0).standard_normal((24, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "qc_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    yield tmp_path
    sys.modules.pop("qc_code", None)


def quantize(*arguments: str, model: str = "qc_code:net") -> int:
    return cli.status(["quantize", model, "--rounding", "nearest", "--observer", "minmax", *arguments])


def code():
    from torchopt.io.importing import load_callable

    load_callable("qc_code:net", where="test")
    return sys.modules["qc_code"]


def photographs(folder: Path, count: int = 4, size: tuple[int, int] = (12, 10)) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(folder / f"{i}.png")


def test_the_defaults_are_the_librarys() -> None:
    from torchopt.cli.quantize_command import _recipe
    from torchopt.quantize import Quantize

    nothing = dict.fromkeys(["mode", "bits", "activation_bits", "observer", "rounding"])
    assert _recipe(nothing) == Quantize()
    assert Quantize().observer == "auto"


def test_both_comparisons_and_the_score_are_reported(place: Path, capsys) -> None:
    assert quantize("--data", "x.npy", "--evaluate", "qc_code:score", "--max-drop", "0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert "calibrated on 12 of them, compared on the other 12" in found["data"]
    assert found["against_float"]["samples"] == 12
    assert found["against_float"]["agreement"] >= 0.9
    assert 20 < found["against_float"]["sqnr_db"] < 80  # quantized, so not equal
    assert found["verify"]["weights_equal"] is True
    assert found["verify"]["max_abs"] < 1e-4  # the file is the network that was made, all the same
    score = found["score"]
    np.testing.assert_allclose(score["before"] - score["after"], score["drop"], atol=1e-9)
    assert len(found["placement"]["integer"]) == 2


@pytest.mark.slow  # measures latency, to leave layers float
def test_a_score_that_drops_too_far_leaves_layers_float_or_nothing_behind(place: Path, capsys) -> None:
    (place / "qc_drop.py").write_text("scores = iter([1.0, 0.0, 1.0])\ndef number(model):\n    return next(scores, 0.0)\n")
    assert quantize("-d", "x.npy", "--evaluate", "qc_drop:number", "--max-drop", "0.1") == 2
    assert "float the score is 0; 0.9 is needed" in capsys.readouterr().err
    assert not Path("model.onnx").exists()


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_pictures_need_a_preprocessing_which_is_shown(place: Path, kind: str, capsys) -> None:
    photographs(place / "pictures" / "cat")
    source = "pictures"
    if kind == "tar":
        source = "p.tar"
        with tarfile.open(source, "w") as archive:
            archive.add("pictures")
    if kind == "zip":
        source = "p.zip"
        with zipfile.ZipFile(source, "w") as packed:
            for file in (place / "pictures" / "cat").iterdir():
                packed.write(file, file.name)
    model = code().net()
    with pytest.raises(ConfigError, match="pictures need what the network was trained with: --preprocess imagenet"):
        read_batches(source, model)
    found = read_batches(
        source, model, preprocess=Preprocess(resize=8, crop=(8, 8), mean=(0.5,), std=(0.25,)).fitted(None), samples=3
    )
    assert found.told.endswith("3 pictures 1×8×8 float32: short side to 8, middle 8×8, pixels / 255, minus 0.5, over 0.25")
    three = read_batches(source, model, preprocess=Preprocess(resize=8, crop=(8, 8), mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)))
    assert three.batches[0].shape == (4, 3, 8, 8)
    assert 0.3 < float(three.batches[0].max()) <= 0.5


def test_the_imagenet_preset_is_torchvisions(place: Path) -> None:
    from torchvision.models import get_weight

    photographs(place / "big", 1, size=(300, 260))
    ours = PRESETS["imagenet"](place / "big" / "0.png", 3)
    theirs = get_weight("MobileNet_V2_Weights.IMAGENET1K_V1").transforms()(Image.open(place / "big" / "0.png"))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_weights_own_transform_and_a_function(place: Path, capsys) -> None:
    photographs(place / "pictures")
    arguments = ["-d", "pictures", "--mode", "weight_only"]
    assert quantize(*arguments, "--preprocess", "qc_code:prepared") == 0
    assert "4 pictures 3×8×8 float32: qc_code:prepared" in capsys.readouterr().out
    assert quantize(*arguments, "-f", "--preprocess", "weights:MobileNet_V2_Weights.IMAGENET1K_V1") == 0
    assert "pictures 3×224×224 float32: weights:MobileNet_V2_Weights.IMAGENET1K_V1: ImageClassification( crop_size=[224]" in (
        capsys.readouterr().out
    )


def named_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(0, 16, (10, 5)),
        "scale": rng.random(10).astype(np.float32),
        "mask": np.ones((10, 5), bool),
        "labels": np.zeros(10, np.int64),
    }


@pytest.mark.parametrize("kind", ["npz", "pt", "list.pt"])
def test_arrays_go_to_the_arguments_of_their_names(place: Path, kind: str, capsys) -> None:
    arrays = named_arrays()
    if kind == "npz":
        np.savez("d.npz", **arrays)
    else:
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        torch.save([tensors, tensors] if kind == "list.pt" else tensors, "d." + kind)
    assert quantize("-d", "d." + kind, model="qc_code:two") == 0
    said = capsys.readouterr().out
    assert (
        "20 samples in 2 batches" if kind == "list.pt" else "ids 5 int64, scale scalar float32, mask 5 bool, 10 samples"
    ) in said
    assert "weights bit-equal" in said


def test_arrays_of_two_dimensions_and_a_type_asked_for(place: Path, capsys) -> None:
    np.save("flat.npy", X.reshape(24, -1)[:, :8])
    np.save("whole.npy", (X[:, 0] * 10).astype(np.int16))
    linear = torch.nn.Linear(8, 4)
    found = read_batches("flat.npy", linear)
    assert found.batches[0].shape == (24, 8)
    from torchopt.runtime.inputs import parse_inputs

    whole = read_batches("whole.npy", linear, inputs=parse_inputs(["input:1,8,8:float32"]), samples=5)
    assert (whole.batches[0].shape, whole.batches[0].dtype) == ((5, 8, 8), torch.float32)


def test_a_function_yields_batches_and_no_more_are_drawn_than_asked_for(place: Path, capsys) -> None:
    assert quantize("-d", "qc_code:batches", "-n", "10") == 0
    assert "qc_code:batches: 10 samples in 4 batches, as they are; calibrated on 5" in capsys.readouterr().out


def test_parquet(place: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    arrays = named_arrays()
    parquet.write_table(arrow.table({name: value.tolist() for name, value in arrays.items()}), "d.parquet")
    found = read_batches("d.parquet", code().two())
    np.testing.assert_array_equal(found.batches[0]["ids"].numpy(), arrays["ids"])
    packed = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(packed, "png")
    parquet.write_table(
        arrow.table({"image": [{"bytes": packed.getvalue(), "path": "a.png"}] * 3, "label": [0, 1, 2]}), "p.parquet"
    )
    pictures = read_batches("p.parquet", code().net(), preprocess=PRESETS["pixels"])
    torch.testing.assert_close(pictures.batches[0][:, 0], torch.ones(3, 8, 8))


@pytest.mark.parametrize("form", ["plain", "state_dict", "module.", "_orig_mod.module.", "safetensors", "safetensors module."])
def test_weights_come_in_every_form(place: Path, form: str) -> None:
    from torchopt.models import ImportedModel

    state = {name: torch.full_like(value, 0.25) for name, value in code().net().state_dict().items()}
    prefix = form.rpartition(" ")[2] if form.endswith(".") else ""
    named = {prefix + name: value for name, value in state.items()}
    if form.startswith("safetensors"):
        save_file(named, "w.safetensors")
    else:
        torch.save({"epoch": 1, "state_dict": named} if form == "state_dict" else named, "w.pt")
    file = "w.safetensors" if form.startswith("safetensors") else "w.pt"
    model = ImportedModel(import_="qc_code:net", weights=file).build()
    assert all(bool((value == 0.25).all()) for value in model.state_dict().values())


def test_a_network_that_has_an_attribute_of_that_name_keeps_it(place: Path) -> None:
    (place / "qc_wrapped.py").write_text(
        CODE + "\nclass W(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.module = nn.Linear(2, 2)\n"
    )
    from torchopt.models import ImportedModel

    torch.save({"module.weight": torch.ones(2, 2), "module.bias": torch.zeros(2)}, "w.pt")
    assert float(ImportedModel(import_="qc_wrapped:W", weights="w.pt").build().module.weight.detach().sum()) == 4


def test_without_data_the_weights_alone_are_rounded(place: Path, capsys) -> None:
    assert quantize("-i", "input:1,3,8,8", "--mode", "dynamic", model="qc_code:net") == 0
    assert "data: random: input 3×8×8 float32, 16 samples" in capsys.readouterr().out
    assert quantize("-i", "ids:1,5:int64", "-i", "scale:1", "--mode", "weight_only", "-f", model="qc_code:two") == 0
    assert "weights bit-equal" in capsys.readouterr().out


MISTAKES = [
    (["-d", "x.npy", "-i", "input:1,4,8,8"], "x.npy: a sample of input is of 3,8,8, and --input says 4,8,8; they must agree"),
    (["-d", "x.npy", "-i", "inptu:1,3,8,8"], "has no input 'inptu'; it takes input; did you mean 'input'?"),
    (["-d", "x.npy", "-i", "input:1,3,8,8:flaot32"], "--input: got the type 'flaot32'; a type such as float32, int64 or bool"),
    (["-d", "x.npy", "--mean", "0.5", "--std", "0.5"], "holds no pictures, so nothing is preprocessed"),
    (["-d", "pictures"], "pictures need what the network was trained with"),
    (["-d", "pictures", "--mean", "0.5"], "--mean: is given without --std"),
    (["-d", "pictures", "--mean", "120", "--std", "58"], "--mean 120 --std 58: are of pixels in [0, 1]; divide them by 255"),
    (["-d", "pictures", "--mean", "0,5", "--std", "1,1"], "--mean 0, 5 --std 1, 1: are of pixels in [0, 1]"),
    (["-d", "pictures", "--mean", "a", "--std", "1"], "--mean: got 'a'; numbers such as 0.485,0.456,0.406 are needed"),
    (["-d", "pictures", "--resize", "1,2,3"], "--resize: got '1,2,3'; pixels are needed"),
    (["-d", "pictures", "--preprocess", "imagenet", "--crop", "8"], "--crop: cannot be used with --preprocess imagenet"),
    (["-d", "pictures", "--preprocess", "image"], "--preprocess: got 'image'; imagenet, pixels, weights:NAME"),
    (["-d", "pictures", "--preprocess", "timm"], "Sequential is no network of timm's"),
    (
        ["-d", "pictures", "--preprocess", "pixels", "-i", "input:1,5,8,8"],
        "pictures have 1 channel (grey) or 3, and 5 are asked for",
    ),
    (["-d", "mixed", "--preprocess", "pixels"], "mixed: its pictures are of 2 sizes after preprocessing; --resize and --crop"),
    (["-d", "empty", "--preprocess", "pixels"], "empty: holds no pictures"),
    (["-d", "broken.tar", "--preprocess", "pixels"], "broken.tar: cannot be unpacked"),
    (["-d", "broken.npz"], "broken.npz: cannot be read as arrays"),
    (["-d", "broken.pt"], "broken.pt: cannot be read as tensors"),
    (["-d", "nan.npy"], "nan.npy: input holds NaN or infinity; finite numbers are needed"),
    (["-d", "names.npz"], "names.npz: has no array for 'input'; it holds pixels, and the network takes input"),
    (["-d", "qc_code.py"], "qc_code.py: cannot be read as data; a folder of pictures"),
    (["-d", "qc_code:nothing"], "--data: qc_code:nothing gives no batch; at least one is needed"),
    (["-d", "x.npy", "--evaluate", "qc_code:words"], "--evaluate: qc_code:words returned good; a finite number is needed"),
    (["-d", "x.npy", "--max-drop", "1"], "--max-drop: is in the units of --evaluate module:function"),
    (["-d", "x.npy", "--out", "model"], "--out: got 'model'; a name that ends in .onnx or .ort is needed"),
    ([], "--data: is needed, to see the range of each activation"),
    (["--mode", "dynamic"], "--input: NAME:SIZES[:DTYPE] is needed where no --data is given"),
    (["-d", "x.npy", "--mode", "float"], "--mode float: rounds nothing"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_mistakes_are_one_sentence_and_write_nothing(place: Path, arguments: list[str], sentence: str, capsys) -> None:
    photographs(place / "pictures")
    photographs(place / "mixed")
    Image.new("RGB", (5, 5)).save("mixed/other.png")
    Path("empty").mkdir()
    for name in ("broken.tar", "broken.npz", "broken.pt"):
        Path(name).write_text("x")
    np.save("nan.npy", np.full((2, 3, 8, 8), np.nan, np.float32))
    np.savez("names.npz", pixels=X)
    before = {p.name for p in place.rglob("*") if "pycache" not in str(p)}
    assert quantize(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert {p.name for p in place.rglob("*") if "pycache" not in str(p)} == before


def test_a_file_is_not_written_over_without_force(place: Path, capsys) -> None:
    Path("m.onnx").write_text("precious")
    assert quantize("-d", "x.npy", "-o", "m.onnx") == 2
    assert "m.onnx: is there already; --out FILE names another, --force writes over it" in capsys.readouterr().err
    assert Path("m.onnx").read_text() == "precious"


def test_missing_data_is_a_file_error() -> None:
    for source in ("none", "none.npy", "none.npz", "none.pt", "none.tar", "none.zip"):
        with pytest.raises(FileError, match=f"{source}: no such"):
            read_batches(source, torch.nn.Linear(2, 2), preprocess=PRESETS["pixels"])


def test_labels_and_wrong_shapes_of_a_function(place: Path) -> None:
    from torchopt.runtime.inputs import parse_inputs

    with pytest.raises(DataError, match="a sample of input is of 3,8,8, and --input says 1,8,8"):
        read_batches("qc_code:batches", code().net(), inputs=parse_inputs(["input:1,1,8,8"]))
