"""Free dimensions by name, and calls of any form: the file gives torch's numbers at sizes that it never saw, on the same kernels."""

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import torchopt
from torchopt.network.structure import containers, leaves, rebuilt
from torchopt.quantize import Quantize

RULES = [torchopt.Rule("*", quantize=Quantize(observer="minmax", rounding="nearest", equalize=False))]
PICTURE = {"input": {0: "batch", 2: "height", 3: "width"}}
SIZES = [(40, 24), (33, 57), (16, 80), (101, 31), (64, 64)]
LENGTHS = [5, 9, 23, 48, 100]


def pictures() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU6()]
    layers += [
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 4, 1),
    ]
    return nn.Sequential(*layers).eval()


def classifier() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, 4)).eval()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(32, 3)

    def forward(self, ids):
        return self.out(self.layers(self.embed(ids)).mean(1))


class Decoder(nn.Module):
    """Rotary embedding, grouped heads, and a causal mask of −inf in a buffer."""

    def __init__(self, width=32, heads=4, groups=2, longest=128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 50)
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, 2 * groups * self.size), nn.Linear(width, width)
        self.register_buffer("mask", torch.full((longest, longest), float("-inf")).triu(1))
        angle = torch.outer(torch.arange(longest).float(), 100 ** (-torch.arange(0, self.size, 2) / self.size))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turned(self, x, n):
        a, b, c, s = x[..., 0::2], x[..., 1::2], self.cos[:n], self.sin[:n]
        return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)

    def forward(self, ids):
        b, n = ids.shape
        x = self.embed(ids)
        q = self.turned(self.q(x).view(b, n, self.heads, self.size).transpose(1, 2), n)
        k, v = self.kv(x).view(b, n, 2 * self.groups, self.size).transpose(1, 2).chunk(2, 1)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (self.turned(k, n), v))
        weights = (q @ k.transpose(-1, -2) / self.size**0.5 + self.mask[:n, :n]).softmax(-1)
        return self.head(x + self.o((weights @ v).transpose(1, 2).reshape(b, n, -1)))


def small(model: nn.Module, data: torch.Tensor) -> nn.Module:
    return torchopt.one_shot(model, RULES, [data], example_inputs=(data[:2],), progress=False)


def furthest(model: nn.Module, path: Path, inputs: list[torch.Tensor]) -> float:
    opened = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    with torch.no_grad():
        return max(float(np.abs(model(x).numpy() - opened.run(None, {name: x.numpy()})[0]).max()) for x in inputs)


@pytest.mark.parametrize("build", [pictures, classifier])
def test_pictures_of_any_size_run_on_the_kernels_of_one_size(build, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 32, 32)
    model = small(build(), x)
    torchopt.export(model, (x[:2],), tmp_path / "fixed.onnx")
    torchopt.export(model, (x[:2],), tmp_path / "free.onnx", dynamic_shapes=PICTURE)
    assert furthest(model, tmp_path / "free.onnx", [torch.randn(3, 3, *size) for size in SIZES]) <= 1e-6
    fixed, free = (torchopt.inspect(tmp_path / name) for name in ("fixed.onnx", "free.onnx"))
    assert free.kernels == fixed.kernels
    assert free.float == []


@pytest.mark.parametrize(("build", "count"), [(Encoder, 5), (Decoder, 4)])
def test_texts_of_any_length(build, count, tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (8, 16))
    model = small(build().eval(), ids)
    torchopt.export(model, (ids[:2],), tmp_path / "m.onnx", dynamic_shapes={"ids": {1: "time"}})
    assert furthest(model, tmp_path / "m.onnx", [torch.randint(0, 50, (3, n)) for n in LENGTHS]) <= 1e-5
    placement = torchopt.inspect(tmp_path / "m.onnx")
    assert (len(placement.integer), placement.float) == (count, [])


def named(path: Path) -> tuple[dict[str, list], list[str]]:
    opened = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {i.name: i.shape for i in opened.get_inputs()}, [o.name for o in opened.get_outputs()]


SHAPES = {
    "short": PICTURE,
    "torch's, by name": {"input": {0: Dim("batch"), 2: Dim("height", min=4, max=99), 3: Dim("width")}},
    "torch's, a tuple": ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},),
    "a list of sizes": {"input": ["batch", None, "height", "width"]},
}


@pytest.mark.parametrize("form", SHAPES)
def test_both_forms_mean_the_same(form: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3))
    torchopt.export(net, (torch.randn(1, 1, 8, 9),), tmp_path / "m.onnx", dynamic_shapes=SHAPES[form])
    assert named(tmp_path / "m.onnx")[0] == {"input": ["batch", 1, "height", "width"]}


def test_names_and_a_fixed_batch(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Conv2d(1, 2, 3)), torch.randn(1, 1, 8, 9)
    told = {"input_names": ["the pictures"], "output_names": ["map"], "dynamic_batch": False}
    torchopt.export(net, (x,), tmp_path / "m.onnx", dynamic_shapes={"input": {3: "w"}}, **told)
    assert named(tmp_path / "m.onnx") == ({"the pictures": [1, 1, 8, "w"]}, ["map"])
    assert torchopt.verify(net, tmp_path / "m.onnx", [torch.randn(1, 1, 8, 20)], progress=False).max_abs <= 1e-6


@dataclasses.dataclass(frozen=True)
class Words:
    ids: torch.Tensor
    mask: torch.Tensor | None = None


@dataclasses.dataclass
class Found:
    mean: torch.Tensor
    rows: list[torch.Tensor]


class Any_(nn.Module):
    """One computation behind every form of call."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.line, self.form = nn.Embedding(16, 8), nn.Linear(8, 4), form

    def computed(self, ids, mask):
        x = self.line(self.embed(ids))
        return x if mask is None else x * mask[..., None]

    def forward(self, first=None, *, ids=None, mask=None):
        if self.form in ("dict", "OrderedDict"):
            ids, mask = first["ids"], first["mask"]
        elif self.form in ("list", "tuple", "nested"):
            ids, mask = first if self.form != "nested" else (first[0]["ids"], first[1][0])
        elif self.form == "dataclass":
            ids, mask = first.ids, first.mask
        elif self.form == "positional and keyword":
            ids = first
        x = self.computed(ids, mask)
        return Found(mean=x.mean(1), rows=[x]) if self.form == "dataclass" else {"mean": x.mean(1), "rows": (x,)}


def call(form: str, batch: int, time: int):
    ids, mask = torch.randint(0, 16, (batch, time)), torch.rand(batch, time) > 0.3
    free = {1: "time"}
    both = {"ids": ids, "mask": mask}
    return {
        "dict": ((both,), {}, {"first": {"ids": free, "mask": free}}),
        "OrderedDict": ((OrderedDict(both),), {}, {"first": {"ids": free, "mask": free}}),
        "list": (([ids, mask],), {}, {"first": [free, free]}),
        "tuple": (((ids, mask),), {}, {"first": (free, free)}),
        "nested": ((({"ids": ids}, [mask]),), {}, ([{"ids": free}, [free]],)),
        "dataclass": ((Words(ids, mask),), {}, {"first": {"ids": free, "mask": free}}),
        "without the optional one": ((), {"ids": ids}, {"ids": free}),
        "keyword": ((), both, {"ids": free, "mask": free}),
        "positional and keyword": ((ids,), {"mask": mask}, {"first": free, "mask": free}),
    }[form]


@pytest.mark.parametrize(
    "form",
    [
        "dict",
        "OrderedDict",
        "list",
        "tuple",
        "nested",
        "dataclass",
        "without the optional one",
        "keyword",
        "positional and keyword",
    ],
)
def test_calls_of_every_form(form: str, tmp_path: Path) -> None:
    model = Any_(form).eval()
    args, kwargs, shapes = call(form, 2, 6)
    torchopt.export(model, args, tmp_path / "m.onnx", example_kwargs=kwargs, dynamic_shapes=shapes)
    inputs, outputs = named(tmp_path / "m.onnx")
    assert all(shape == ["batch", "time"] for shape in inputs.values())
    assert len(inputs) == (1 if form.startswith("without") else 2)
    assert len(outputs) == 2
    other, keywords, _ = call(form, 3, 9)
    names = ["first"] if other else []
    batch = dict(zip(names, other, strict=True)) | keywords
    verdict = torchopt.verify(model, tmp_path / "m.onnx", [batch], progress=False)
    assert (verdict.weights_equal, verdict.weights_compared) == (True, 2)
    assert verdict.max_abs <= 1e-6


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)

    def forward(self, x):
        return Found(mean=self.line(x), rows=[x * 2])


def test_a_dataclass_as_result_alone(tmp_path: Path) -> None:
    model = Plain().eval()
    torchopt.export(model, (torch.randn(2, 3),), tmp_path / "m.onnx", output_names=["mean", "rows"])
    assert named(tmp_path / "m.onnx") == ({"x": ["batch", 3]}, ["mean", "rows"])
    assert torchopt.verify(model, tmp_path / "m.onnx", [torch.randn(5, 3)], progress=False).max_abs <= 1e-6


class Fixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 32 * 32, 2))

    def forward(self, input):
        return self.body(input)


class Cuts(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], 3, 8, 128).sum(-1)


X, IDS = torch.randn(2, 3, 32, 32), torch.zeros(2, 7, dtype=torch.int64)
MISTAKES = {
    "a layer fixes it": (
        Fixes,
        (X,),
        {"dynamic_shapes": PICTURE},
        r"takes no other 'height' than 32: body.2 \(Linear\) refuses it \(mat1 and mat2 .*; leave it out of dynamic_shapes",
    ),
    "its code fixes it": (Cuts, (X,), {"dynamic_shapes": {"x": {2: "h"}}}, r"takes 'h' of 32 only .*Cuts \(Cuts\) refuses it"),
    "an unknown name": (Cuts, (X,), {"dynamic_shapes": {"y": {2: "h"}}}, "dynamic_shapes names 'y'; the inputs are x"),
    "a fixed batch that is free": (
        Cuts,
        (X,),
        {"dynamic_shapes": {"x": {0: "n"}}, "dynamic_batch": False},
        "frees dimension 0 of x, and dynamic_batch=False fixes it; leave one out",
    ),
    "no such dimension": (Cuts, (X,), {"dynamic_shapes": {"x": {4: "h"}}}, "frees dimension 4 of x, which has 4 dimensions"),
    "no dict": (Cuts, (X,), {"dynamic_shapes": "height"}, "dynamic_shapes='height'; a dict such as"),
    "too many": (Cuts, (X,), {"dynamic_shapes": (None, None)}, "has 2 entries, and the call 1 inputs: x"),
    "a size of 1": (Cuts, (X[:, :, :1],), {"dynamic_shapes": {"x": {2: "h"}}}, "'h' of x is 1 in the example"),
    "two sizes of one name": (
        lambda: Any_("keyword"),
        (),
        {"example_kwargs": {"ids": IDS, "mask": IDS[:, :6]}, "dynamic_shapes": {"ids": {1: "time"}, "mask": {1: "time"}}},
        "dimension 'time' is 7 in ids and 6 in mask; one size is needed for one name",
    ),
    "no such key": (
        lambda: Any_("dict"),
        ({"ids": IDS, "mask": IDS},),
        {"dynamic_shapes": {"first": {"idz": {1: "time"}}}},
        "names 'idz' in first; it holds ids, mask",
    ),
    "too few names": (Cuts, (X,), {"input_names": ["a", "b"]}, r"input_names=\['a', 'b'\]; 1 different names are needed, for x"),
    "too many names": (Cuts, (X,), {"output_names": ["a", "b"]}, r"output_names=\['a', 'b'\]; 1 different names are needed"),
    "no tensor": (Cuts, (), {}, "example_inputs is tuple; a tuple with the tensors of one call is needed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_and_write_nothing(mistake: str, tmp_path: Path) -> None:
    build, args, keywords, sentence = MISTAKES[mistake]
    with pytest.raises(torchopt.TorchoptError, match=sentence) as raised:
        torchopt.export(build().eval(), args, tmp_path / "m.onnx", **keywords)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


class Pair(NamedTuple):
    a: int
    b: tuple


def test_structures_come_apart_and_together() -> None:
    value = {"p": Pair(1, (2,)), "w": Words(3), "rest": [4, {"k": 5}]}
    assert list(leaves(value)) == [("p_0", 1), ("p_1_0", 2), ("w_ids", 3), ("w_mask", None), ("rest_0", 4), ("rest_1_k", 5)]
    made = rebuilt(value, iter("abcdef"))
    assert made == {"p": Pair("a", ("b",)), "w": Words("c", "d"), "rest": ["e", {"k": "f"}]}
    assert containers(Words(3)) == {"ids": 3, "mask": None}
