"""What strangers write in a forward, and layers in other clothes: the prepared network is the float one in both modes, or says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchopt import Quantize, Rule, export, finalize, inspect, load, one_shot, prepare, save, step
from torchopt.errors import FileError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
RULES = [Rule("*", quantize=Quantize(rounding="nearest", equalize=False, observer="minmax"))]


def decibels(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.var() / (y - reference).square().mean()))


def alike(net: nn.Module, *x: torch.Tensor, least: float = 25.0) -> nn.Module:
    """The one-shot network, whose output is near the float one's."""
    net.eval()
    small = one_shot(net, RULES, [x], example_inputs=tuple(v[:1] for v in x), progress=False).eval()
    with torch.no_grad():
        assert decibels(small(*x), net(*x)) > least
    return small


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2, return_indices=True)
        self.unpool, self.last = nn.MaxUnpool2d(2), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, where = self.pool(F.relu(self.conv(x)))
        first, second = self.unpool(y, where).chunk(2, 1)[::-1]
        return self.last(torch.cat((*first.split(2, 1)[::-1], second), 1))


def test_indices_of_a_pool_and_slices_of_chunks() -> None:
    torch.manual_seed(0)
    alike(Pieces(), torch.randn(8, 3, 16, 16))


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1, groups=2, bias=False)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        nn.init.uniform_(self.norm.weight, 0.2, 2.0)
        nn.init.uniform_(self.norm.running_var, 0.3, 3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.up(F.relu(self.down(x)), output_size=x.shape[-2:]))))


@pytest.mark.parametrize("size", [16, 15])
def test_a_grouped_transposed_convolution_of_an_asked_size_and_its_norm(size: int) -> None:
    torch.manual_seed(0)
    alike(Sized(), torch.randn(8, 4, size, size))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.stem(x)]
        levels += [3 * F.avg_pool2d(levels[-1], 2)]
        return torch.cat([self.head(level).flatten(1) for level in levels], 1)


def test_a_head_with_its_norm_on_several_levels_is_folded_and_trains() -> None:
    torch.manual_seed(0)
    net, x = Shared(), torch.randn(16, 3, 8, 8)
    net.train()(x)
    alike(net, x, least=28)
    ready = prepare(net, RULES, (x[:1],)).train()
    before = {n: b.clone() for n, b in ready.named_buffers() if n.endswith("running_mean")}
    ready(x).square().mean().backward()
    after = dict(ready.named_buffers())
    assert before
    assert all(not torch.equal(after[n], b) for n, b in before.items())


def test_weights_that_hooks_compute_are_plain_ones() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.utils.spectral_norm(nn.Conv1d(8, 4, 3)))
    x = torch.randn(8, 4, 16)
    alike(net, x)
    ready = prepare(net, RULES, (x[:1],)).train()
    ready(x).square().mean().backward()
    step(finalize_after(ready))


def finalize_after(ready: nn.Module) -> nn.Module:
    torch.optim.SGD(ready.parameters(), lr=0.01).step()
    with torch.no_grad():
        x = torch.randn(4, 4, 16)
        torch.testing.assert_close(finalize(ready).eval()(x), ready.eval()(x), rtol=0, atol=0)
    return ready.train()


def test_a_linear_layer_that_keeps_its_weight_turned(tmp_path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    net, x = nn.Sequential(conv1d(32, 16), nn.GELU(), conv1d(8, 32)), torch.randn(64, 16)
    small = alike(net, x)
    export(small, (x[:1],), tmp_path / "m.onnx")
    assert len(inspect(tmp_path / "m.onnx").integer) == 2
    save(small, tmp_path / "m.pt")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "m.pt", net)(x), small(x), rtol=0, atol=0)


class Owner(nn.Sequential):
    classes = 3

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        self.names = ["a", "b", "c"]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self[0](x)


def test_own_methods_attributes_and_layers_by_number_are_there() -> None:
    net, x = Owner(), torch.randn(8, 4)
    ready = prepare(net, RULES, (x[:1],))
    assert ready.names == ["a", "b", "c"]
    assert ready[2] is ready.get_submodule("2")
    assert ready.features(x).shape == (8, 4)
    with pytest.raises(AttributeError, match="Owner was prepared as the graph of its forward, which has no 'nothing'"):
        ready.nothing


def test_hooks_on_what_became_part_of_the_graph_are_said() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    net[0].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match="the forward hooks on 0 are not called any more"):
        prepare(net, RULES, (torch.randn(1, 4),))


class Stateful(nn.Linear):
    state: object = {"epoch": 3}

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


def test_extra_state_is_saved_where_json_gives_it_back(tmp_path) -> None:
    net = nn.Sequential(Stateful(4, 4))
    save(net, tmp_path / "m.pt")
    fresh = nn.Sequential(Stateful(4, 4))
    fresh[0].state = None
    assert load(tmp_path / "m.pt", fresh)[0].state == {"epoch": 3}
    net[0].state = {1: (2,)}
    with pytest.raises(FileError, match="save: 0._extra_state is a dict that JSON does not give back as it is"):
        save(net, tmp_path / "m.pt")


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.centres = nn.Linear(4, 4), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(self.layer(x), self.centres)


def test_an_operation_that_onnx_has_not_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"which has no form of torch's cdist; write \(a.unsqueeze\(-2\) - b"):
        export(Distances(), (torch.randn(2, 4),), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
