"""Forms that strangers' networks have: weights that torch's parametrizations compute, and extremes over everything."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchopt
from torchopt import Cluster, ConstantSparsity, Prune, Quantize, Rule
from torchopt.compress.existing import left_behind
from torchopt.network.weights import weights
from torchopt.run import read_report


class Normed(nn.Module):
    """As the positional convolution of wav2vec 2.0 is."""

    def __init__(self, norm=parametrizations.weight_norm):
        super().__init__()
        self.conv, self.head = norm(nn.Conv1d(8, 8, 3, padding=1)), nn.Conv1d(8, 4, 1)

    def forward(self, x):
        return self.head(nn.functional.gelu(self.conv(x)))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
@pytest.mark.parametrize(
    "rule", [{"quantize": Quantize()}, {"quantize": Quantize(mode="weight_only")}, {"prune": Prune(schedule=0.5)}]
)
def test_a_weight_that_torchs_parametrization_computes_is_compressed_as_any_other(norm, rule, tmp_path):
    torch.manual_seed(0)
    model, batches = Normed(norm).eval(), [torch.randn(4, 8, 16) for _ in range(2)]
    before = model.conv.weight.detach().clone()
    small = torchopt.one_shot(model, [Rule("*", **rule)], batches, example_inputs=(batches[0],), progress=False).eval()
    torchopt.export(small, (batches[0],), tmp_path / "model.onnx")
    assert torchopt.verify(small, tmp_path / "model.onnx", batches).max_relative < 1e-5
    assert nn.utils.parametrize.is_parametrized(model.conv)  # the caller's model is as it was
    assert torch.equal(model.conv.weight, before)
    torchopt.save(small, tmp_path / "small.pt")
    assert torch.equal(torchopt.load(tmp_path / "small.pt", Normed(norm)).eval()(batches[0]), small(batches[0]))
    if "prune" in rule:
        assert float((small.conv.weight == 0).float().mean()) == 0.5
    else:
        with torch.no_grad():
            y, wanted = small(batches[0]), model(batches[0])
        said = 10 * torch.log10(wanted.var() / (y - wanted).square().mean())
        assert float(said) > 30


def test_a_computed_weight_that_no_rule_names_stays_computed_and_one_that_is_baked_is_named():
    rule = {"prune": Prune(schedule=0.5)}
    ready = torchopt.prepare(Normed(), [Rule("head", **rule)])
    assert nn.utils.parametrize.is_parametrized(ready.conv)
    ready = torchopt.prepare(Normed(), [Rule("conv", **rule)])
    said = {s.name: s.technique for s in torchopt.report(ready).skipped}
    assert said == {"conv.weight": "weight_norm"}


class Scaled(nn.Module):
    """Outputs over the largest of all of them."""

    def __init__(self, axes):
        super().__init__()
        self.conv, self.axes = nn.Conv2d(3, 8, 3, padding=1), axes

    def forward(self, x):
        y = self.conv(x)
        most = y.abs().amax(*self.axes, keepdim=bool(self.axes))
        return y / most, y.amin(), y.amin((2, 3))


@pytest.mark.parametrize("axes", [(), ((1, 2, 3),), (1,)])
def test_extremes_over_everything_and_over_axes(axes, tmp_path):
    """The exporter has no form without an axis; file and network are equal to the bit between the layers."""
    torch.manual_seed(0)
    model, x = Scaled(axes).eval(), torch.randn(4, 3, 8, 8)
    small = torchopt.one_shot(model, [Rule("*", quantize=Quantize())], [x], example_inputs=(x,), progress=False).eval()
    torchopt.export(small, (x,), tmp_path / "model.onnx")
    given = torchopt.runtime.session(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    for ours, theirs in zip(small(x), given, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "damage", [lambda r: r["score"].pop("final"), lambda r: r["layers"].append(3), lambda r: r["size_bytes"].update(final=0)]
)
def test_a_report_that_is_damaged_within_is_one_sentence(damage, tmp_path):
    found = {
        "score": {"baseline": 0.9, "final": 0.9},
        "size_bytes": {"baseline": 4, "final": 2},
        "latency_ms": {"baseline": 2.0, "final": 1.0},
        "layers": [{"shape": [2], "sparsity": 0.5}],
        "placement": {"integer": ["a"], "float": []},
        "verify": {"weights_equal": True, "top1_agreement": 1.0},
    }
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert read_report(tmp_path)["score"]["final"] == 0.9
    damage(found)
    (tmp_path / "report.json").write_text(json.dumps(found))
    with pytest.raises(torchopt.FileError, match="report.json: is damaged"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    "rule",
    [
        {"cluster": Cluster(n_clusters=4)},
        {"cluster": Cluster(n_clusters=4), "quantize": Quantize()},
        {"prune": Prune(schedule=0.5), "cluster": Cluster(n_clusters=4)},
        {"prune": Prune(schedule=0.5, score="hessian"), "quantize": Quantize(weight_bits=4)},
    ],
)
def test_layers_that_read_nothing_but_zeros_are_compressed_as_if_each_weight_counted_alike(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    nn.init.constant_(model[0].bias, -100.0)
    nn.init.constant_(model[2].bias, -100.0)  # both ReLUs are dead
    x = torch.randn(64, 8)
    small = torchopt.one_shot(model, [Rule("*", **rule)], [x], example_inputs=(x[:1],), progress=False).eval()
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=0.01)
    if "cluster" in rule and "quantize" not in rule:
        assert 3 <= len(small.get_submodule("4").weight.unique()) <= 4
    if "prune" in rule:
        assert float((small.get_submodule("4").weight == 0).float().mean()) >= 0.5


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(3, 8, 3), nn.Embedding(8, 4)])
def test_a_network_that_is_itself_a_layer_is_refused_with_the_remedy(layer):
    example = {"Linear": torch.zeros(1, 8), "Conv2d": torch.zeros(1, 3, 8, 8), "Embedding": torch.zeros(1, 2, dtype=torch.int64)}
    with pytest.raises(torchopt.ModelError, match=r"itself is one [A-Za-z0-9]+, .*; put it into nn\.Sequential"):
        torchopt.prepare(layer, [Rule("*", quantize=Quantize())], (example[type(layer).__name__],))


@pytest.mark.parametrize(("values", "zero", "found"), [(255, True, 256), (256, False, 256), (256, True, 0), (257, False, 0)])
def test_what_was_shared_is_found_up_to_256_values_with_zero_among_them(values, zero, found):
    layer = nn.Linear(64, 64, bias=False)
    table = torch.arange(1.0, values + 1)
    table = torch.cat([table, torch.zeros(1)]) if zero else table
    layer.weight.data = table.repeat(4096 // len(table) + 1)[:4096].reshape(64, 64)
    assert left_behind(weights(layer)).get("weight", (0, 0))[1] == found


def test_256_values_of_an_earlier_round_stay_under_masks():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    layer[0].weight.data = torch.linspace(-1, 1, 256)[torch.randint(256, (64, 64))]
    ready = torchopt.prepare(layer, [Rule("*", prune=Prune(schedule=ConstantSparsity(target_sparsity=0.5, frequency=1)))])
    optimizer = torch.optim.SGD(ready.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        ready(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
        torchopt.step(ready)
    weight = torchopt.finalize(ready).get_submodule("0").weight
    assert float((weight == 0).float().mean()) == 0.5
    assert len(weight.unique()) <= 256


def test_a_layer_whose_activation_is_an_output_has_the_reason_that_its_output_is_not_quantized(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(4, 3, 8, 8)
    small = torchopt.one_shot(model, [Rule("*", quantize=Quantize())], [x], example_inputs=(x,), progress=False).eval()
    torchopt.export(small, (x,), tmp_path / "model.onnx")
    assert "no integer kernel for this form" not in str(torchopt.inspect(tmp_path / "model.onnx"))
