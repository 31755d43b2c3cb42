"""Every byte of a file is something, once; packed files are told apart into what their calls read."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from test_pack_smallest import bell, file_of, sparse

from torchopt.cli.commands import app
from torchopt.pack import pack
from torchopt.report.file_bytes import file_bytes


@pytest.mark.parametrize("smallest", [False, True])
def test_parts_add_up_to_the_file(smallest, tmp_path):
    rng = np.random.default_rng(0)
    source = file_of(tmp_path / "a.onnx", [bell(rng, (64, 1152), 4.0), sparse(rng, (64, 2304)), sparse(rng, (64, 2000))])
    report = pack(source, tmp_path / "b.onnx", smallest=smallest)
    found = file_bytes(tmp_path / "b.onnx")
    assert sum(found.values()) == (tmp_path / "b.onnx").stat().st_size
    assert all(size >= 0 for size in found.values())
    packed = found["codes"] + found["places"] + found["tables"]
    assert abs(packed - report.packed_bytes) <= 100  # tables that are equal are counted for each of their tensors there
    assert found["decoders"] > 0
    assert file_bytes(source)["dense weights"] == 64 * (1152 + 2304 + 2000)


def test_pack_says_what_the_bytes_are(tmp_path):
    source = file_of(tmp_path / "a.onnx", [sparse(np.random.default_rng(0), (64, 1000))])
    result = CliRunner().invoke(app, ["pack", str(source), str(tmp_path / "b.onnx"), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["bytes"] == file_bytes(tmp_path / "b.onnx")
