"""The process that a verb runs in: other threads, inference mode, another default dtype, and nothing left changed behind."""

import gc
import logging
import os
import random
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import torchopt
from torchopt import Cluster, Prune, Quantize, Rule
from torchopt.data import Dataset
from torchopt.recipe import parse
from torchopt.run import matched
from torchopt.train import Train, train

INTEGERS = [Rule("*", quantize=Quantize())]
PLAIN = {"__call__": nn.Module.__call__, "__getattr__": nn.Module.__getattr__}


class Net(nn.Module):
    """A convolution and a head; its forward takes a while, so that what overlaps does."""

    def __init__(self, wait: float = 0.0) -> None:
        super().__init__()
        self.wait = wait
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(288, 64)

    def forward(self, x):
        time.sleep(self.wait)
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def made(wait: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(wait).float().eval()


def pictures() -> torch.Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def shot(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return torchopt.one_shot(model, INTEGERS, [x], example_inputs=(x[:1],), progress=False).state_dict()


def test_three_threads_quantize_while_a_fourth_runs_its_network() -> None:
    x, alone, other = pictures(), shot(made(), pictures()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    found, failed, done = [], [], threading.Event()
    waiting = [made(wait=0.02) for _ in range(3)]  # made here: threads share torch's random state

    def compress() -> None:
        try:
            found.append(shot(waiting.pop(), x))
        except Exception as error:
            failed.append(error)

    def use() -> None:
        try:
            while not done.is_set():
                other(torch.zeros(1, 4))
                time.sleep(0.001)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=compress) for _ in range(3)]
    fourth = threading.Thread(target=use)
    for thread in (fourth, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    fourth.join()
    assert failed == []
    assert len(found) == 3
    for one in found:
        torch.testing.assert_close(one, alone, rtol=0, atol=0)
    assert {name: getattr(nn.Module, name) for name in PLAIN} == PLAIN
    shot(made(), x)  # afterwards too


def test_inference_mode_around_one_shot_and_export(tmp_path) -> None:
    rules = [Rule("*", prune=Prune(schedule=0.5, score="taylor"), cluster=Cluster(n_clusters=8), quantize=Quantize())]
    x, file = pictures(), tmp_path / "net.onnx"
    usual = torchopt.one_shot(made(), rules, [x], example_inputs=(x[:1],), progress=False)
    with torch.inference_mode():
        model, x = made(), x.clone()
        assert next(model.parameters()).is_inference()
        assert x.is_inference()
        found = torchopt.one_shot(model, rules, [x], example_inputs=(x[:1],), progress=False)
        torchopt.export(found, (x[:1],), file)
        assert torchopt.verify(found, file, [x], progress=False).weights_equal
        assert torch.is_inference_mode_enabled()
    assert not any(tensor.is_inference() for tensor in found.state_dict().values())
    torch.testing.assert_close(found.state_dict(), usual.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"learn_scale": True}, {"observer": "mse", "activation_bits": 16}], ids=str)
def test_a_default_dtype_of_float64_changes_nothing(options) -> None:
    x = pictures()
    rules = [Rule("*", prune=Prune(schedule=0.5), cluster=Cluster(n_clusters=8), quantize=Quantize(**options))]

    def trained() -> dict[str, torch.Tensor]:
        model = made()
        ready = torchopt.prepare(model, rules, (x[:1],)).train()
        optimizer = torch.optim.SGD(ready.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            ready(x).square().mean().backward()
            optimizer.step()
            torchopt.step(ready)
        return torchopt.finalize(ready).state_dict()

    start = made().state_dict()
    usual = trained()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Net, "__init__", _with_weights(Net.__init__, start))
            wide = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in wide.values()} == {t.dtype for t in usual.values()}
    torch.testing.assert_close(wide, usual, rtol=0, atol=0)


def _with_weights(make, state):
    """Random weights differ between dtypes; these are the same."""

    def made_of_them(self, wait: float = 0.0) -> None:
        make(self, wait)
        self.float().load_state_dict(state)

    return made_of_them


def _process() -> dict[str, object]:
    loggers = {n: found.level for n, found in logging.root.manager.loggerDict.items() if isinstance(found, logging.Logger)}
    return {
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), gc.isenabled()),
        "flags": (torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "places": (os.getcwd(), list(sys.path), dict(os.environ), sys.stdout, sys.stderr),
        "torch": {name: getattr(nn.Module, name) for name in PLAIN},
        "logs": {name: loggers.get(name, 0) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir", "torchopt")},
    }


def test_verbs_leave_the_process_as_it_was(tmp_path) -> None:
    x, file = pictures(), tmp_path / "net.onnx"
    labels = torch.zeros(len(x), dtype=torch.int64)
    data = Dataset(train_inputs=x, train_labels=labels, test_inputs=x, test_labels=labels, classes=("a", "b"))
    recipe = parse(
        "model: {kind: digits_net, classes: 10}\ndata: {kind: digits}\nstages: [{compress: [{match: '*', prune: {schedule: 0.5}}]}]"
    )
    ready = torchopt.prepare(made(), INTEGERS, (x[:1],))
    final = torchopt.finalize(torchopt.calibrate(ready, [x], progress=False))
    random_masks = [Rule("*", prune=Prune(schedule=0.5, score="random"), cluster=Cluster(n_clusters=8, init="random"))]
    verbs = {
        "one_shot": lambda: torchopt.one_shot(made_net, random_masks, [x], example_inputs=(x[:1],), progress=False),
        "prepare": lambda: torchopt.prepare(made_net, INTEGERS, (x[:1],)),
        "calibrate": lambda: torchopt.calibrate(ready, [x], progress=False),
        "export": lambda: torchopt.export(final, (x[:1],), file),
        "verify": lambda: torchopt.verify(final, file, [x], progress=False),
        "benchmark": lambda: torchopt.benchmark([file], repeats=3, progress=False),
        "train": lambda: train(made_net, data, Train(epochs=1, batch_size=8), progress=False),
        "check": lambda: matched(recipe.recipe),
    }
    made_net = made()
    for name, verb in verbs.items():
        before = _process()
        verb()
        after = _process()
        assert [part for part in before if before[part] != after[part]] == [], name


def test_a_single_tensor_or_dict_is_one_batch(tmp_path) -> None:
    x = pictures()
    one, several = shot(made(), x), torchopt.one_shot(made(), INTEGERS, x, example_inputs=x[:1], progress=False)
    torch.testing.assert_close(several.state_dict(), one, rtol=0, atol=0)
    ready = torchopt.calibrate(torchopt.prepare(made(), INTEGERS, x[:1]), {"x": x}, progress=False)
    torch.testing.assert_close(torchopt.finalize(ready).state_dict(), one, rtol=0, atol=0)
    model = made()
    assert torchopt.reestimate_batch_norm(model, x) == 1
    torch.testing.assert_close(model.norm.running_mean, model.conv(x).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    with pytest.raises(torchopt.DataError, match="batches: got ndarray; batches of tensors"):
        torchopt.one_shot(made(), INTEGERS, x.numpy(), example_inputs=(x[:1],), progress=False)
    with pytest.raises(torchopt.DataError, match=r"example_inputs: got ndarray; a tuple with one call's arguments"):
        torchopt.prepare(made(), INTEGERS, x.numpy())
