"""The table and the page of a run: every number stands there, nothing is fetched from the network."""

import re

import numpy as np
import pytest

from torchopt.errors import FileError
from torchopt.report import histogram, summary_table, write_html


def run() -> dict:
    weight = np.tile(np.array([0, 0, 0, 0.5, -0.25], np.float32), 100)
    layer = {"name": "body.weight", "shape": [20, 25], "sparsity": 0.6, "distinct_values": 3, "bits": 1.5, "bytes": 94}
    layer |= {"entropy_bits": 1.37, "techniques": ["pruned"], "histogram": histogram(weight)}
    kernel = {"name": "body.weight", "kernel": "QLinearConv", "integer": True, "reason": "", "weight_bytes": 94}
    return {
        "recipe": "digits.yaml",
        "seconds": 12.0,
        "score": {"name": "accuracy", "baseline": 0.99, "final": 0.985, "stages": [
            {"name": "float", "epoch": 1, "score": 0.9}, {"name": "float", "epoch": 2, "score": 0.99},
            {"name": "compressed", "epoch": 1, "score": 0.985},
        ]},
        "size_bytes": {"baseline": 1200, "final": 100, "baseline_gzip": 1100, "final_gzip": 90},
        "latency_ms": {"baseline": 0.2, "final": 0.1, "threads": 1},
        "layers": [layer],
        "placement": {"integer": ["body.weight"], "float": [], "layers": [kernel], "kernels": {"QLinearConv": 1}},
        "verify": {"weights_equal": True, "max_steps": 0.5, "top1_agreement": 1.0},
        "skipped": [{"name": "dw.weight", "technique": "prune", "reason": "<depthwise>"}],
    }  # fmt: skip


def test_histogram_counts_the_nonzeros_and_lists_the_values():
    found = run()["layers"][0]["histogram"]
    assert sum(found["counts"]) == 200
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert found["values"] == [-0.25, 0.0, 0.5]


def test_summary_table():
    table = summary_table(run())
    for text in ("99.00%", "98.50%", "-0.50 points", "1,200", "÷ 12.0", "× 0.50", "1 of 1", "bit for bit", "60.0%"):
        assert text in table, text


def test_removed_channels_show_in_both():
    shrunken = run() | {"macs": {"baseline": 37_156_608, "final": 11_029_288}}
    assert "−70%" in summary_table(shrunken)
    assert "−" not in summary_table(run() | {"macs": {"baseline": 1000, "final": 1000}})


def test_the_page_is_whole_and_self_contained(tmp_path):
    write_html(run(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in ("÷ 12.0", "× 0.50", "-0.50", "1 / 1", "body.weight", "QLinearConv", "bit for bit", "&lt;depthwise&gt;"):
        assert text in page, text
    assert page.count("<svg") == 2
    links = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", page)
    assert links == []
    assert "@import" not in page


def test_the_same_run_draws_the_same_page(tmp_path):
    write_html(run(), tmp_path / "a.html")
    write_html(run(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileError, match="the folder .* does not exist"):
        write_html(run(), tmp_path / "none" / "report.html")
