"""torch.ao behind one file: its observers and users' own are taken, and all works alike where torch has it no more."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.errors import ConfigError, DataError, FileError, ModelError, StateError
from torchopt.quantize import ActivationQuantizer
from torchopt.quantize.torch_ao import SameInterface
from torchopt.recipe import parse

ao = pytest.importorskip("torch.ao.quantization")
ROOT = Path(__file__).parents[1]


class Halved(ao.ObserverBase):
    """The simplest observer of a user's: half of the largest value seen, on 0 … 255."""

    def __init__(self):
        super().__init__(dtype=torch.quint8)
        self.register_buffer("most", torch.zeros(()))

    def forward(self, x):
        self.most.copy_(torch.maximum(self.most, x.detach().abs().max()))
        return x

    def calculate_qparams(self):
        return self.most / 255, torch.tensor(128)  # range −most/2 … most/2


class Plain(nn.Module):
    """No torch.ao in it, only its interface."""

    quant_min, quant_max = 0, 255

    def forward(self, x):
        return x

    def calculate_qparams(self):
        return 0.5, 10


class Silent(Plain):
    def calculate_qparams(self):
        return None


class Gridless(Plain):
    quant_min = None


class Fails(Plain):
    def forward(self, x):
        raise RuntimeError("no luck")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def batches(count=3, size=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator) for _ in range(count)]


def prepared(observer, **more):
    return torchopt.prepare(net(), [Rule("*", quantize=Quantize(observer=observer, **more))], example_inputs=(batches()[0],))


def quantizers(model):
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer) and not m.fixed]


OBSERVERS = [
    Halved,
    Plain,
    ao.MinMaxObserver,
    ao.MovingAverageMinMaxObserver,
    ao.HistogramObserver,
    ao.MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric),
    ao.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5).with_args(dtype=torch.qint8),
]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: getattr(o, "__name__", "with_args"))
def test_the_range_is_what_the_observer_chooses(observer, tmp_path):
    """Scale and zero point of the input are those of the class itself, shown the same batches; and the file is the model."""
    model = prepared(observer, equalize=False)
    torchopt.calibrate(model, batches(), progress=False)
    alone = observer()
    for batch in batches():
        alone(batch)
    scale, zero_point = alone.calculate_qparams()
    first = quantizers(model)[0]
    ends = (alone.quant_min, alone.quant_max) if hasattr(alone, "quant_min") else (0, 255)
    low = (ends[0] - zero_point) * scale
    assert float(first.scale) == pytest.approx(float(scale), rel=1e-6)
    assert float((first.quant_min - first.zero_point) * first.scale) == pytest.approx(float(low), rel=1e-6)
    final = torchopt.finalize(model)
    if observer in (Halved, ao.HistogramObserver):  # the others give numbers of the same kind
        torchopt.export(final, (batches()[0],), tmp_path / "m.onnx")
        torchopt.verify(final, tmp_path / "m.onnx", batches(1))


@pytest.mark.parametrize("observer", OBSERVERS[:4], ids=lambda o: getattr(o, "__name__", "with_args"))
def test_copies_and_files_hold_it(observer, tmp_path):
    model = prepared(observer)
    torchopt.calibrate(model, batches(), progress=False)
    model.train()
    model(batches()[0])  # training goes on with the observer
    torchopt.save(model, tmp_path / "m.safetensors")
    loaded = torchopt.load(tmp_path / "m.safetensors", net())
    others = [loaded, copy.deepcopy(model)]
    for other in others:
        same = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
        assert all(a == b and (x.equal(y) if isinstance(x, torch.Tensor) else x == y) for (a, x), (b, y) in same)
    for each in (model, *others):
        each.train()(batches()[1])
        assert [float(q.scale) for q in quantizers(model)] == [float(q.scale) for q in quantizers(each)]
    assert pickle.loads(pickle.dumps(Quantize(observer=observer))) == Quantize(observer=observer)


def test_arguments_go_into_files(tmp_path):
    observer = ao.MinMaxObserver.with_args(quant_min=0, quant_max=15, dtype=torch.quint8)
    model = prepared(observer)
    torchopt.calibrate(model, batches(), progress=False)
    torchopt.save(model, tmp_path / "m.safetensors")
    loaded = torchopt.load(tmp_path / "m.safetensors", net())
    assert {q.observer.inner.quant_max for q in quantizers(loaded)} == {15}


def test_training_follows_the_observer():
    model = prepared(ao.MinMaxObserver).train()
    seen = batches()
    for batch in seen:
        model(batch).sum().backward()
    low = min(float(b.min()) for b in seen)
    first = quantizers(model)[0]
    assert float(first.min_val) == pytest.approx(low, abs=float(first.scale) / 2 + 1e-6)
    first.disable_observer()
    before = float(first.scale)
    model(100 * seen[0])
    assert float(first.scale) == before


def test_sixteen_bits_keep_their_last_bits():
    model = prepared(ao.MinMaxObserver, activation_bits=16)
    torchopt.calibrate(model, batches(), progress=False)
    first = quantizers(model)[0]
    x = torch.cat(batches())
    assert float(first.scale) == pytest.approx(float(x.max() - x.min()) / 65535, rel=1e-4)


@pytest.mark.parametrize(
    ("observer", "said"),
    [
        (ao.PerChannelMinMaxObserver, "PerChannelMinMaxObserver gives 2 scales, and an activation has one"),
        (ao.MinMaxObserver(), "give its class"),
        (nn.ReLU, "forward.x. and calculate_qparams"),
        (7, "got 7; a class with"),
        (Silent, "must return .scale, zero_point."),
        (Gridless, "does not say which integers"),
        (Fails, "Fails: RuntimeError: no luck"),
        (ao.PlaceholderObserver, "PlaceholderObserver: Exception: calculate_qparams should not be called"),
        (ao.FixedQParamsObserver, "FixedQParamsObserver: TypeError"),
    ],
)
def test_what_cannot_choose_a_range_is_refused_where_it_is_given(observer, said):
    with pytest.raises((ConfigError, ModelError), match=said):
        Quantize(observer=observer)


def test_data_without_a_range_is_one_sentence():
    with pytest.raises(DataError, match="NaN or infinit"):
        torchopt.calibrate(prepared(ao.MinMaxObserver), [torch.full((2, 3, 6, 6), torch.nan)], progress=False)


RECIPE = """
model: {kind: resnet8, classes: 10}
data: {kind: digits}
stages: [{compress: [{quantize: {observer: %s}}], train: {epochs: 1}}]
"""


def observer_of(text):
    return parse(RECIPE % text).recipe.stages[0].compress[0].quantize.observer


def test_recipes_name_it(tmp_path, monkeypatch):
    assert observer_of("{import: 'torch.ao.quantization:HistogramObserver'}") is ao.HistogramObserver
    given = observer_of("{import: 'torch.ao.quantization:MinMaxObserver', arguments: {qscheme: torch.per_tensor_symmetric}}")
    assert given.kind is ao.MinMaxObserver
    assert given.arguments == {"qscheme": torch.per_tensor_symmetric}
    (tmp_path / "ours.py").write_text("from torch.ao.quantization import MinMaxObserver\nclass Mine(MinMaxObserver):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert observer_of("{import: 'ours:Mine'}").__name__ == "Mine"
    with pytest.raises(ConfigError, match=r"recipe:4: stages.0.compress.0.quantize: .*no callable 'MinMaxObserve'"):
        observer_of("{import: 'torch.ao.quantization:MinMaxObserve'}")
    with pytest.raises(ConfigError, match="text or keys and values of ImportedObserver is needed"):
        observer_of("3")


def test_a_file_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "theirs_alone.py").write_text(
        "from torch.ao.quantization import MinMaxObserver\nclass Mine(MinMaxObserver):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import theirs_alone

    torchopt.save(prepared(theirs_alone.Mine), tmp_path / "m.safetensors")
    monkeypatch.delitem(sys.modules, "theirs_alone")
    with pytest.raises(StateError, match="names the observer theirs_alone:Mine; import its module theirs_alone before"):
        torchopt.load(tmp_path / "m.safetensors", net())
    assert "theirs_alone" not in sys.modules


def test_a_class_without_a_name_is_refused_where_it_is_saved(tmp_path):
    class Here(Plain):
        pass

    with pytest.raises(FileError, match="defined inside a function"):
        torchopt.save(prepared(Here), tmp_path / "m.safetensors")


def test_the_replacement_has_the_same_interface_and_state():
    """Every public method and buffer of torch.ao's base class, so that checkpoints and subclasses go from one to the other."""

    class Theirs(ao.FakeQuantizeBase):
        def forward(self, x):
            return x

        def calculate_qparams(self):
            return None

    class Ours(SameInterface):
        forward, calculate_qparams = Theirs.forward, Theirs.calculate_qparams

    public = {name for name in vars(ao.FakeQuantizeBase) if not name.startswith("_")} - {"with_args"}
    assert public <= {name for name in vars(SameInterface) if not name.startswith("_")}
    theirs, ours = Theirs(), Ours()
    for switch in ("disable_observer", "disable_fake_quant", "enable_observer", "enable_fake_quant"):
        getattr(theirs, switch)()
        getattr(ours, switch)()
        assert ours.state_dict() == theirs.state_dict()
        assert [t.dtype for t in ours.buffers()] == [t.dtype for t in theirs.buffers()]


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import without_torch_ao
import torch
from torch import nn
import torchopt
from torchopt.quantize.torch_ao import FakeQuantizeBase, SameInterface

assert FakeQuantizeBase is SameInterface
torch.manual_seed(0)
data = [torch.randn(4, 3, 6, 6) for _ in range(2)]
for mode in ("static", "train", "weight_only", "dynamic"):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    rules = [torchopt.Rule("*", quantize=torchopt.Quantize(mode="static" if mode == "train" else mode))]
    model = torchopt.prepare(net, rules, example_inputs=(data[0],))
    if mode == "static":
        torchopt.calibrate(model, data, progress=False)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        for x in data:
            model.train()(x).square().mean().backward()
            optimizer.step()
            torchopt.step(model)
    torchopt.save(model, "m.safetensors")
    torchopt.load("m.safetensors", net)
    final = torchopt.finalize(model)
    torchopt.export(final, (data[0],), "m.onnx")
    torchopt.verify(final, "m.onnx", data)
    if mode == "static":
        program = torch.export.export(final.eval(), (data[0],))
        names = [str(n.target) for n in program.graph.nodes if "quantized_decomposed" in str(n.target)]
        assert len(names) >= 4, names
        assert torch.allclose(program.module()(data[1]), final(data[1]), atol=1e-6)


class Own(nn.Module):
    quant_min, quant_max = 0, 255
    def forward(self, x):
        return x
    def calculate_qparams(self):
        return 0.05, 128

model = torchopt.prepare(net, [torchopt.Rule("*", quantize=torchopt.Quantize(observer=Own))], example_inputs=(data[0],))
torchopt.calibrate(model, data, progress=False)
assert not [name for name in sys.modules if name == "torch.ao" or name.startswith("torch.ao.")]
print("all went")
"""


def test_all_goes_without_torch_ao(tmp_path):
    script = SCRIPT.format(tests=str(ROOT / "tests"))
    ran = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:torchopt", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.strip().endswith("all went"), ran.stderr[-2000:]
