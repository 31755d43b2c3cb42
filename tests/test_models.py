import pytest
import torch
from torch import nn

from torchopt.errors import ConfigError, FileError, ModelError
from torchopt.models import ImportedModel, ReferenceModel, build

WEIGHTS = {"resnet8": 77_072, "digits_net": 205_792, "ds_cnn": 20_928, "mobile_net": 83_216}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8)])
def test_each_network_takes_each_picture_size_and_traces(kind: str, shape: tuple[int, int, int]) -> None:
    net = build(kind, classes=7, in_channels=shape[0]).eval()
    x = torch.randn(2, *shape)
    traced = torch.fx.symbolic_trace(net)
    assert net(x).shape == (2, 7)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_numbers_of_weights(kind: str) -> None:
    conv_and_linear = [p for p in build(kind, classes=10).parameters() if p.dim() > 1]
    assert sum(p.numel() for p in conv_and_linear) == WEIGHTS[kind]


def test_digits_net_has_depthwise_residual_and_batch_norm_parts() -> None:
    net = build("digits_net", classes=10)
    assert any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in net.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert any(type(m).__name__ == "Residual" for m in net.modules())


def test_width_multiplies_channels() -> None:
    assert build("resnet8", classes=10, width=0.5).features[0].conv.out_channels == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "resnet9", "classes": 10}, "model.kind: 'resnet9' is not one of .*did you mean 'resnet8'"),
        ({"kind": "resnet8", "classes": 1}, "model.classes: got 1; at least 2"),
        ({"kind": "resnet8", "classes": 10, "in_channels": 0}, "model.in_channels: got 0; at least 1"),
        ({"kind": "resnet8", "classes": 10, "width": 0.0}, "model.width: got 0.0; a number between"),
    ],
)
def test_bad_configurations(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReferenceModel(**arguments)


def test_imported_model_with_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\ndef net(classes=3): return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))\n"
        "def no(): return 'x'\n"
    )
    torch.save({"1.weight": torch.full((3, 4), 2.0), "1.bias": torch.zeros(3)}, tmp_path / "w.pt")
    net = ImportedModel(import_="my_net:net", weights=str(tmp_path / "w.pt")).build()
    torch.testing.assert_close(net(torch.ones(1, 4)), torch.full((1, 3), 8.0))
    with pytest.raises(ModelError, match=r"w.pt: the weights do not fit Sequential: size mismatch"):
        ImportedModel(import_="my_net:net", args={"classes": 5}, weights=str(tmp_path / "w.pt")).build()
    with pytest.raises(ModelError, match="my_net:no returned str; a torch.nn.Module is needed"):
        ImportedModel(import_="my_net:no").build()
    with pytest.raises(ConfigError, match="module 'my_net' has no callable 'nett'; did you mean 'net'"):
        ImportedModel(import_="my_net:nett").build()
    with pytest.raises(ConfigError, match="model.import: no module named 'my_nett'"):
        ImportedModel(import_="my_nett:net").build()
    with pytest.raises(ConfigError, match="got 'my_net'; 'package.module:function' is needed"):
        ImportedModel(import_="my_net").build()


def test_weights_that_are_missing_or_foreign(tmp_path) -> None:
    with pytest.raises(FileError, match="none.pt: no such file"):
        ReferenceModel(kind="resnet8", classes=10, weights=str(tmp_path / "none.pt")).build()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(FileError, match="text.pt: not a file of weights"):
        ReferenceModel(kind="resnet8", classes=10, weights=str(tmp_path / "text.pt")).build()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(FileError, match="list.pt: holds no state_dict"):
        ReferenceModel(kind="resnet8", classes=10, weights=str(tmp_path / "list.pt")).build()
