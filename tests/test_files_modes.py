"""Who may read what is written: the umask says it, for every kind of file, and a file that is there keeps its own permissions."""

import os
import stat

import pytest
import torch
from torch import nn

import torchopt
from torchopt import Quantize, Rule
from torchopt.io.files import atomic_path, write_text


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_output_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.ones(2, 4)
    final = torchopt.one_shot(net, [Rule("*", quantize=Quantize(mode="weight_only"))], example_inputs=(x,), progress=False)
    torchopt.save(final, tmp_path / "m.safetensors")
    torchopt.export(final, (x,), tmp_path / "m.onnx")
    torchopt.pack(tmp_path / "m.onnx", tmp_path / "p.onnx")
    write_text(tmp_path / "t.txt", "text")
    assert {path.name: oct(mode(path)) for path in tmp_path.iterdir() if mode(path) != 0o666 & ~umask} == {}


def test_a_file_that_is_there_keeps_its_permissions(tmp_path):
    file = tmp_path / "m.safetensors"
    torchopt.save(nn.Linear(2, 2), file)
    for chosen in (0o600, 0o640, 0o664):
        file.chmod(chosen)
        torchopt.save(nn.Linear(2, 2), file)
        assert oct(mode(file)) == oct(chosen)


def test_a_writer_finds_no_file_in_its_place(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        assert not temporary.exists()
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
