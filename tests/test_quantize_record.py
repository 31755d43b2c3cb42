"""One record a layer, made where quantization is attached; and the granularity of a scale, decided once and kept in the checkpoint."""

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.network.grid import grids


class Bags(nn.Module):
    """A bag of embeddings whose values are shared already, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.long, self.head = nn.EmbeddingBag(64, 8), nn.LSTM(8, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.bag.weight.copy_(torch.randint(-2, 3, self.bag.weight.shape) * 0.25 + 0.01)
            self.bag.weight[0] *= 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.long(self.bag(x))[0])


def test_a_record_says_what_each_layer_was_given() -> None:
    rules = [Rule("long", quantize=Quantize(mode="float16")), Rule("*", quantize=Quantize(mode="dynamic", milestones=[2, 3, 4]))]
    state = torchopt.prepare(Bags(), rules).torchopt_state
    found = {record.path: record for record in state.records}
    assert {path: (record.mode, record.bits, record.milestones) for path, record in found.items()} == {
        "bag": ("weight_only", 8, None), "long": ("float16", 16, None), "head": ("dynamic", 8, (2, 3, 4)),
    }  # fmt: skip
    assert not any(record.why_float for record in found.values())
    assert [skip.name for skip in state.skipped] == ["bag"]
    assert state.skipped[0].reason.startswith("only linear layers round their input at run time;")
    assert state.skipped[0].reason.endswith("its weights are rounded once, by finalize, and wait for no milestone")


@pytest.mark.parametrize("path", ["bag", "long"])
def test_a_loaded_checkpoint_has_as_many_scales_as_the_model_that_was_saved(path, tmp_path) -> None:
    """Values that were shared as training began may be shared no more: what was decided then still holds."""
    ready = torchopt.prepare(Bags(), [Rule(path, quantize=Quantize(mode="weight_only"))], preserve=False)
    with torch.no_grad():
        for parameter in ready.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    torchopt.save(ready, tmp_path / "m.safetensors")
    fresh = Bags()
    nn.init.normal_(fresh.bag.weight)
    again = torchopt.load(tmp_path / "m.safetensors", fresh)
    assert torchopt.load(tmp_path / "m.safetensors", fresh).state_dict().keys() == ready.state_dict().keys()
    wanted, given = (grids(torchopt.finalize(model)) for model in (ready, again))
    assert wanted.keys() == given.keys() != set()
    assert {name: grid.axis for name, grid in given.items()} == {name: grid.axis for name, grid in wanted.items()}
    assert all(torch.equal(given[name].scale, wanted[name].scale) for name in wanted)
    assert (wanted.get("bag.weight") is None) or wanted["bag.weight"].axis is None
