import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torchopt.data import (
    Augment,
    Dataset,
    Digits,
    FashionMnist,
    ImageFolder,
    ImportedData,
    SpokenDigits,
    epoch_order,
    generator,
)
from torchopt.data.dataset import shifted
from torchopt.data.sources import read_idx
from torchopt.errors import ConfigError, DataError, FileError

SHARED = Path(os.environ.get("TORCHOPT_DATA", "../shared/data"))


def _small(**changes) -> Dataset:
    parts = {
        "train_inputs": torch.zeros(4, 2),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "test_inputs": torch.zeros(2, 2),
        "test_labels": torch.tensor([0, 1]),
        "classes": ("a", "b"),
    }
    return Dataset(**{**parts, **changes})


def test_digits_are_split_once_and_stratified() -> None:
    a, b = Digits().load(), Digits().load()
    assert a.train_inputs.shape == (1437, 1, 8, 8)
    assert a.test_inputs.shape == (360, 1, 8, 8)
    torch.testing.assert_close(a.test_inputs, b.test_inputs, rtol=0, atol=0)
    assert a.test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert abs(float(a.train_inputs.mean())) < 1e-5
    assert abs(float(a.train_inputs.std()) - 1) < 1e-3
    assert a.example.shape == (1, 1, 8, 8)


def test_epoch_order_is_a_partition_that_depends_on_seed_and_epoch_only() -> None:
    order = epoch_order(10, 3, seed=1, epoch=2)
    assert [len(b) for b in order] == [3, 3, 3]
    assert len(set(torch.cat(order).tolist())) == 9
    assert not torch.equal(torch.cat(order), torch.cat(epoch_order(10, 3, seed=1, epoch=3)))
    assert not torch.equal(torch.cat(order), torch.cat(epoch_order(10, 3, seed=2, epoch=2)))
    assert [len(b) for b in epoch_order(5, 64, seed=0, epoch=0)] == [5]


def test_batches_are_the_same_however_many_ranks_share_them() -> None:
    for alone, shared in zip(epoch_order(20, 8, seed=0, epoch=0), epoch_order(20, 8, seed=0, epoch=0, ranks=2), strict=True):
        assert alone.tolist() == shared.tolist()
    assert [len(batch) for batch in epoch_order(5, 8, seed=0, epoch=0, ranks=2)] == [4]
    with pytest.raises(DataError, match="1 samples in batches of 1 for 2 processes"):
        epoch_order(1, 8, seed=0, epoch=0, ranks=2)


def test_shift_moves_whole_pictures() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4) + 1
    seen = set()
    for place in range(60):
        moved = shifted(x, 1, generator(place))
        dy, dx = next((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if _rolled(x, dy, dx).equal(moved))
        seen.add((dy, dx))
    assert len(seen) == 9


def _rolled(x: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    out = torch.full_like(x, float(x.flatten()[0]))
    for i in range(4):
        for j in range(4):
            if 0 <= i + dy < 4 and 0 <= j + dx < 4:
                out[0, 0, i, j] = x[0, 0, i + dy, j + dx]
    return out


def test_flip_mirrors_about_half_of_the_pictures() -> None:
    x = torch.arange(4.0).expand(400, 1, 4, 4)
    changed = Augment(flip=True)(x, generator(3))
    mirrored = int((changed[:, 0, 0, 0] == 3).sum())
    assert 160 < mirrored < 240
    with pytest.raises(DataError, match=r"Augment: got inputs of shape \(2, 3\)"):
        Augment(flip=True)(torch.zeros(2, 3), generator(0))
    with pytest.raises(ConfigError, match="Augment.shift: got -1"):
        Augment(shift=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_inputs": torch.zeros(0, 2), "train_labels": torch.zeros(0).long()}, "data: the train part is empty"),
        ({"test_inputs": torch.zeros(0, 2), "test_labels": torch.zeros(0).long()}, "data: the test part is empty"),
        ({"train_inputs": torch.zeros(3, 2)}, "the train part has 3 inputs and 4 labels"),
        ({"test_inputs": torch.tensor([[0.0, float("nan")], [0, 0]])}, "the test inputs hold NaN"),
        ({"train_labels": torch.tensor([0, 1, 2, 1])}, "the train labels reach 2; 0 … 1 are the classes"),
    ],
)
def test_bad_data_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _small(**changes)


def test_fashion_mnist_files(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("t10k", 2)):
        pictures = np.full((count, 28, 28), 255, np.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in pictures.shape)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pictures.tobytes()))
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    data = FashionMnist(root=str(tmp_path), train_samples=2).load()
    assert data.train_inputs.shape == (2, 1, 28, 28)
    assert data.test_labels.tolist() == [0, 1]
    torch.testing.assert_close(data.test_inputs[0, 0, 0, 0], torch.tensor((1 - 0.2860) / 0.3530))
    damaged = tmp_path / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(FileError, match="train-images-idx3-ubyte.gz: cannot be read"):
        FashionMnist(root=str(tmp_path)).load()
    damaged.write_bytes(gzip.compress(b"text"))
    with pytest.raises(FileError, match="no IDX file of bytes"):
        read_idx(damaged)


def test_missing_files_say_where_to_put_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHOPT_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"\$TORCHOPT_DATA/fashion-mnist: train-images-idx3-ubyte.gz is not there; put the files"):
        FashionMnist().load()
    with pytest.raises(FileError, match=r"\$TORCHOPT_DATA/fsdd: fsdd.npz is not there"):
        SpokenDigits().load()
    (tmp_path / "fsdd.npz").write_bytes(b"text")
    with pytest.raises(FileError, match="not the spoken-digits archive"):
        SpokenDigits(root=str(tmp_path)).load()


@pytest.mark.skipif(not (SHARED / "fashion-mnist").is_dir(), reason="Fashion-MNIST is not in $TORCHOPT_DATA")
def test_the_real_fashion_mnist_has_the_known_statistics() -> None:
    data = FashionMnist().load()
    assert data.train_inputs.shape == (60000, 1, 28, 28)
    assert abs(float(data.train_inputs.mean())) < 1e-3
    assert abs(float(data.train_inputs.std()) - 1) < 1e-3


@pytest.mark.skipif(not (SHARED / "fsdd").is_dir(), reason="the spoken digits are not in $TORCHOPT_DATA")
def test_the_real_spoken_digits_have_the_official_split() -> None:
    data = SpokenDigits().load()
    assert data.train_inputs.shape == (2700, 1, 32, 32)
    assert data.test_labels.bincount().tolist() == [30] * 10


def test_image_folder(tmp_path: Path) -> None:
    from PIL import Image

    with pytest.raises(FileError, match="none: no such folder"):
        ImageFolder(root=str(tmp_path / "none"), image_size=8).load()
    with pytest.raises(FileError, match="one folder of pictures a class is needed"):
        ImageFolder(root=str(tmp_path), image_size=8).load()
    for name, value in (("cat", 0), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.new("RGB", (12, 10), (value, i, 0)).save(tmp_path / name / f"{i}.png")
    data = ImageFolder(root=str(tmp_path), image_size=8).load()
    assert data.classes == ("cat", "dog")
    assert (data.train_inputs.shape, data.test_inputs.shape) == ((8, 3, 8, 8), (2, 3, 8, 8))


def test_bad_sources() -> None:
    with pytest.raises(ConfigError, match="Digits.test_fraction: got 0.9"):
        Digits(test_fraction=0.9)
    with pytest.raises(ConfigError, match="ImageFolder.channels: got 2"):
        ImageFolder(root=".", image_size=8, channels=2)
    with pytest.raises(ConfigError, match="ImageFolder.image_size: got 4"):
        ImageFolder(root=".", image_size=4)
    with pytest.raises(ConfigError, match="ImageFolder.test_fraction: got 0"):
        ImageFolder(root=".", image_size=8, test_fraction=0)
    with pytest.raises(ConfigError, match="FashionMnist.train_samples: got 0"):
        FashionMnist(train_samples=0)


def test_imported_data(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_data.py").write_text(
        "import torch\nfrom torchopt.data import Dataset\n"
        "def one(): return 1\n"
        "def rows(n):\n    x, y = torch.zeros(n, 2), torch.zeros(n, dtype=torch.int64)\n"
        "    return Dataset(train_inputs=x, train_labels=y, test_inputs=x, test_labels=y, classes=('a',))\n"
    )
    assert len(ImportedData(import_="my_data:rows", args={"n": 3}).load().train_inputs) == 3
    with pytest.raises(DataError, match="my_data:one returned int; a torchopt.data.Dataset is needed"):
        ImportedData(import_="my_data:one").load()
