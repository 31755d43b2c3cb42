"""`verify` compares every output of a file with the model's, whatever nesting they come in, and says in one sentence what does not fit."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch import nn

import torchopt

X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Pair(NamedTuple):
    """Two outputs."""

    first: torch.Tensor
    second: torch.Tensor


class Many(nn.Module):
    """Two layers, each with an output of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.kind = nn.Linear(3, 4), nn.Linear(3, 5), kind

    def forward(self, x: torch.Tensor):
        a, b = self.a(x), self.b(x)
        return {
            "tuple": (a, b),
            "dict": {"boxes": a, "scores": b},
            "named": Pair(a, b),
            "nested": [a, {"more": (None, b)}],
            "scalar": (a, b.sum()),
            "whole": (a, b.argmax(1)),
            "mask": (a, torch.where(b > 0, b, float("-inf"))),
        }[self.kind]


SECOND = {"scalar": "output_1 = ReduceSum <keepdims = 0> (b)", "whole": "output_1 = ArgMax <axis = 1, keepdims = 0> (b)"}
SECOND["mask"] = "z = Constant <value_float = 0.0> () l = Log (z) g = Greater (b, z) output_1 = Where (g, b, l)"


def exported(tmp_path, kind: str) -> tuple[Many, str]:
    """A model and the file that the exporter would write of it."""
    model = Many(kind).eval()
    text = SECOND.get(kind, "output_1 = Identity (b)")
    kind_of = {"scalar": "float", "whole": "int64[N]"}.get(kind, "float[N, 5]")
    made = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]> g (float[N, 3] x) => (float[N, 4] output_0, {kind_of} output_1) {{
            output_0 = Gemm <transB = 1> (x, w, c)
            b = Gemm <transB = 1> (x, v, d)
            {text} }}"""
    )
    names = {"w": "a.weight", "c": "a.bias", "v": "b.weight", "d": "b.bias"}
    for node in made.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    made.graph.initializer.extend(numpy_helper.from_array(model.get_parameter(n).detach().numpy(), n) for n in names.values())
    onnx.save(made, tmp_path / "m.onnx")
    return model, str(tmp_path / "m.onnx")


def changed(path: str, name: str, add: float) -> None:
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(add), name))
    onnx.save(model, path)


KEYS = {"tuple": ["0", "1"], "dict": ["boxes", "scores"], "named": ["first", "second"], "nested": ["0", "[1]['more'][1]"]}


@pytest.mark.parametrize("kind", ["tuple", "dict", "named", "nested", "scalar", "whole", "mask"])
def test_all_outputs_are_in_the_verdict(tmp_path, kind) -> None:
    model, path = exported(tmp_path, kind)
    verdict = torchopt.verify(model, path, [X, X[:1]], progress=False)
    assert [o.name for o in verdict.outputs] == ["output_0", "output_1"]
    assert [o.key for o in verdict.outputs] == KEYS.get(kind, ["0", "1"])
    assert [o.shape for o in verdict.outputs] == [(4, 4), {"scalar": (), "whole": (4,)}.get(kind, (4, 5))]
    assert verdict.outputs[1].dtype == verdict.outputs[1].model_dtype == ("int64" if kind == "whole" else "float32")
    assert verdict.max_relative <= 1e-6
    assert (verdict.samples, verdict.top1_agreement) == (5, 1.0)
    assert verdict.to_dict()["outputs"][1]["name"] == "output_1"


@pytest.mark.parametrize("kind", ["tuple", "dict", "named", "nested", "scalar"])
def test_a_difference_in_the_second_output_is_seen(tmp_path, kind) -> None:
    model, path = exported(tmp_path, kind)
    changed(path, "b.bias", 0.5)
    verdict = torchopt.verify(model, path, [X], progress=False)
    assert verdict.outputs[0].max_abs <= 1e-6
    assert verdict.max_abs == verdict.outputs[1].max_abs == pytest.approx(10.0 if kind == "scalar" else 0.5, rel=1e-5)
    assert "of 2 outputs output_1 is the furthest apart" in str(verdict)


class FixedQuantize(nn.Identity):
    """Stands for what makes a model a quantized one."""


def test_steps_are_those_of_each_output(tmp_path) -> None:
    model, path = exported(tmp_path, "tuple")
    model.quantizer = FixedQuantize()
    changed(path, "b.bias", 0.01)
    verdict = torchopt.verify(model, path, [X], progress=False)
    spans = [float(y.max() - y.min()) for y in (model.a(X).detach(), model.b(X).detach())]
    assert [o.step for o in verdict.outputs] == pytest.approx([span / 255 for span in spans])
    assert verdict.max_steps == verdict.outputs[1].max_steps == pytest.approx(0.01 * 255 / spans[1], rel=1e-3)
    assert verdict.step == verdict.outputs[1].step
    assert (verdict.within_one_step, verdict.outputs[0].within_one_step) == (0.0, 1.0)


class Swapped(nn.Module):
    """A dict whose keys are the file's names, in another order."""

    def __init__(self, inner: Many) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = self.inner(x)
        return {"output_1": b, "output_0": a}


def test_names_decide_where_they_are_the_files(tmp_path) -> None:
    model, path = exported(tmp_path, "tuple")
    verdict = torchopt.verify(Swapped(model), path, [X], progress=False)
    assert verdict.max_abs <= 1e-6
    assert [o.name for o in verdict.outputs] == ["output_1", "output_0"]


class First(nn.Module):
    """Only some of the outputs, or another shape."""

    def __init__(self, inner: Many, wide: bool) -> None:
        super().__init__()
        self.inner, self.wide = inner, wide

    def forward(self, x: torch.Tensor):
        a, b = self.inner(x)
        return (a, b[:, :4]) if self.wide else a


def test_outputs_of_another_number_or_shape_are_refused(tmp_path) -> None:
    model, path = exported(tmp_path, "tuple")
    with pytest.raises(
        torchopt.DataError, match=r"gives 2 outputs \(output_0, output_1\), and the model 1 \(one tensor\); give the model"
    ):
        torchopt.verify(First(model, wide=False), path, [X], progress=False)
    with pytest.raises(
        torchopt.DataError, match=r"output output_1 has the shape \(4, 5\) in .*, and the shape \(4, 4\) in torch"
    ):
        torchopt.verify(First(model, wide=True), path, [X], progress=False)


def test_inputs_that_do_not_fit_the_file_are_one_sentence(tmp_path) -> None:
    model, path = exported(tmp_path, "tuple")
    with pytest.raises(torchopt.DataError, match=r"does not run it on x 4×2 float32: .*dimensions"):
        torchopt.verify(model, path, [X[:, :2]], progress=False)
    with pytest.raises(torchopt.DataError, match=r"does not run it on x 4×3 int64: .*data type"):
        torchopt.verify(model, path, [X.long()], progress=False)
    with pytest.raises(
        torchopt.DataError, match=r"has the inputs x, and a batch gives 2 tensors \(left, right\); give batches of what"
    ):
        torchopt.verify(Two(), path, [(X, X)], progress=False)


class Two(nn.Module):
    """Lists and dicts of tensors as arguments; it changes one of them."""

    def forward(self, left: torch.Tensor, right):
        return (left.mul_(2) if isinstance(right, torch.Tensor) else left) + (
            right if isinstance(right, torch.Tensor) else right[0] - right[1]["h"]
        )


def test_nested_inputs_are_taken_in_order_and_a_model_may_change_them(tmp_path) -> None:
    made = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float[N, 3] left, float[N, 3] r0, float[N, 3] r1) => (y) {
        t = Add (left, r0) y = Sub (t, r1) }""")
    onnx.save(made, tmp_path / "n.onnx")
    assert torchopt.verify(Two(), tmp_path / "n.onnx", [(X, [X + 1, {"h": X * 3}])], progress=False).max_abs < 1e-6
    made = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float[N, 3] right, float[N, 3] left) => (y) {
        t = Add (left, left) y = Add (t, right) }""")  # in another order than the arguments
    onnx.save(made, tmp_path / "c.onnx")
    assert torchopt.verify(Two(), tmp_path / "c.onnx", [(X.clone(), X + 1)], progress=False).max_abs == 0


class Own(nn.Module):
    """Raises where a batch is small."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.limit = nn.Linear(3, 2), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self.limit:
            raise KeyError("nothing to see")
        return self.fc(x)


def test_what_the_models_own_code_raises_is_one_sentence_and_modes_come_back(tmp_path) -> None:
    _, path = exported(tmp_path, "tuple")
    model = Own().train()
    model.limit, model.fc.training = 9, False
    with pytest.raises(torchopt.DataError, match="verify: Own does not take a batch: 'nothing to see'"):
        torchopt.verify(model, path, [X], progress=False)
    assert (model.training, model.fc.training) == (True, False)


def test_no_weight_in_common_is_said(tmp_path) -> None:
    inner, path = exported(tmp_path, "tuple")
    verdict = torchopt.verify(Swapped(inner), path, [X], progress=False)
    assert verdict.weights_compared == 0
    assert "no weight of the model is named in the file" in str(verdict)


def test_damaged_files_are_one_sentence(tmp_path) -> None:
    model, path = exported(tmp_path, "tuple")
    data = Path(path).read_bytes()
    for name, content in {"cut.onnx": data[: len(data) // 2], "text.onnx": b"not a model", "empty.onnx": b""}.items():
        (tmp_path / name).write_bytes(content)
        for verb in (
            lambda p: torchopt.verify(model, p, [X], progress=False),
            lambda p: torchopt.benchmark(p, repeats=1, progress=False),
            torchopt.inspect,
            torchopt.report,
        ):
            with pytest.raises(torchopt.FileError) as error:
                verb(tmp_path / name)
            assert name in str(error.value)
            assert "\n" not in str(error.value)
