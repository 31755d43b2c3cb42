"""A traced graph survives JSON, and a hostile one is refused."""

import json
import re

import pytest
import torch
from torch import fx, nn

from torchopt.errors import FileError
from torchopt.network.traced import describe, rebuild


class Net(nn.Module):
    """Every kind of argument: nodes, tuples, slices, dtypes, keywords, methods, shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = self.conv(x)[:, 1:, ..., None].squeeze(-1)
        x = torch.cat([x, x + self.shift], dim=1)
        x = nn.functional.relu6(x).to(torch.float64).to(torch.float32)
        return x.mean((2, 3)).reshape(x.shape[0], -1)


def test_round_trip_through_json():
    net = Net()
    nodes = json.loads(json.dumps(describe(fx.symbolic_trace(net).graph)))
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(rebuild(nodes, net, "test")(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("target", ["torch.load", "torch.hub.load", "os.system", "builtins.eval", "torch._C._jit_init"])
def test_foreign_functions_are_refused(target):
    nodes = [{"name": "a", "op": "call_function", "target": target, "args": {"tuple": []}, "kwargs": {"dict": {}}}]
    with pytest.raises(FileError, match=re.escape(f"file.safetensors: the graph calls '{target}', which is no tensor operation")):
        rebuild(nodes, nn.Module(), "file.safetensors")


def test_foreign_methods_are_refused():
    nodes = [{"name": "a", "op": "call_method", "target": "__reduce__", "args": {"tuple": []}, "kwargs": {"dict": {}}}]
    with pytest.raises(FileError, match="the method '__reduce__', which tensors do not have"):
        rebuild(nodes, nn.Module(), "f")


@pytest.mark.parametrize(
    "node", [{}, {"op": "placeholder"}, {"name": "a", "op": "output", "target": "o", "args": {"node": "b"}, "kwargs": {}}]
)
def test_damaged_nodes_are_refused(node):
    with pytest.raises(FileError, match="f: the graph's node .* is damaged"):
        rebuild([node], nn.Module(), "f")


def test_a_module_that_is_missing_is_named():
    nodes = describe(fx.symbolic_trace(Net()).graph)
    with pytest.raises(FileError, match="names a module that the network lacks"):
        rebuild(nodes, nn.Module(), "f")
