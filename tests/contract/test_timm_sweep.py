"""The sweep over timm's families: what it counts as left in float, and the lines that it prints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm")

from timm_sweep import Row, left_in_float, read_list, side_of, summary, total_macs, write_page
from whole_path import plan_eight_bits

from qlib.graph import capture, fold_batch_norm


class Leaves(nn.Module):
    """A convolution that folds, a product that no layer kind knows, and one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.fc(torch.einsum("nchh,nkhh->nck", x, x).mean(2))


def test_what_is_left_in_float_has_its_name_and_reason() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    graph = capture(Leaves().eval(), images)
    folded = fold_batch_norm(graph)
    left = left_in_float(graph, plan_eight_bits(graph, folded, images))
    assert left == [("einsum", "computed in float between integer tensors: no integer form")]
    assert total_macs(graph, images[:1]) == 4 * 27 * 36 + 4 * 6 * 4 + 8


ROWS = [
    Row("a", "f", 1.0, 64, "exported", 10, 0.0, 1e-6, left="", macs_in_integers=1.0, macs_in_int8=0.98, codes=10),
    Row(
        "b",
        "g",
        2.0,
        64,
        "exported",
        10,
        0.0,
        1e-6,
        left="x: no",
        macs_in_integers=0.9,
        macs_in_int8=0.98,
        codes=10,
        differing=3,
    ),
    Row("c", "h", 3.0, 64, "folded", 10, 0.0, 1e-6, macs_in_integers=0.95, problems="no export"),
    Row("d", "i", problems="ModelError: it decides"),
]


def test_the_summary_has_the_lines_of_the_evidence() -> None:
    assert [measured for _, measured, _ in summary(ROWS)] == [
        "3 of 4 (75.0 %)",
        "2 of 3 (66.7 %)",
        "2 of 3 (66.7 %)",
        "1 of 2 (50.0 %)",
        "95.00 %",
        "98.00 %",
    ]


def test_the_page_names_what_fails(tmp_path: Path) -> None:
    write_page(tmp_path / "timm.md", ROWS, 88)
    text = " ".join((tmp_path / "timm.md").read_text(encoding="utf-8").split())
    for line in ("ModelError: it decides", "left in float: x: no", "3 of 0.0 M", "| a ", "4 of 88 families"):
        assert line in text
    assert math.isnan(ROWS[3].folded_error)


def test_the_list_has_one_model_a_family() -> None:
    models = read_list(Path(__file__).resolve().parents[2] / "benchmarks" / "timm_models.csv")
    assert len(set(models.values())) == len(models) > 80
    free = {"input_size": (3, 224, 224), "min_input_size": (3, 64, 64), "fixed_input_size": False}
    assert side_of(free, 128) == 64
    assert side_of({**free, "min_input_size": None}, 128) == 128
    assert side_of({**free, "min_input_size": None, "fixed_input_size": True}, 128) == 224
