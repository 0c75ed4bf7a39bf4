"""Costs of layers against counts made by hand, and the texts and files of `--summary`."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlib.cli import parse
from qlib.errors import ModelError, OutputError, QlibError
from qlib.graph import capture
from qlib.graph.cost import LayerCost, layer_costs
from qlib.models import create_model, find_model
from qlib.report.summary import SUMMARIES, summary


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.transpose(1, 2)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.conv(x)
        second: Tensor = self.conv(first)
        return second + x


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        pytest.param(nn.Conv2d(3, 8, 3, stride=2), (3, 7, 7), [("k=(3, 3)", 3 * 9 * 8, 72 * 27)], id="conv"),
        pytest.param(nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5), [("k=(3, 3)", 72, 200 * 9)], id="depthwise"),
        pytest.param(nn.Conv1d(2, 4, 5), (2, 9), [("k=(5,)", 40, 20 * 10)], id="conv1d"),
        pytest.param(nn.Conv3d(1, 2, (1, 2, 3)), (1, 2, 3, 4), [("k=(1, 2, 3)", 12, 16 * 6)], id="conv3d"),
        pytest.param(nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 5, 5), [("k=(2, 2)", 48, 75 * 16)], id="transposed"),
        pytest.param(nn.Linear(6, 5), (7, 6), [("", 30, 7 * 5 * 6)], id="linear over positions"),
        pytest.param(Product(), (3, 4), [("", 0, 3 * 3 * 4)], id="matmul"),
        pytest.param(Twice(), (2, 3, 3), [("k=(1, 1)", 4, 36), ("k=(1, 1)", 4, 36), ("", 0, 0)], id="used twice"),
        pytest.param(nn.BatchNorm2d(3), (3, 2, 2), [("", 0, 0)], id="batch-norm has no weight"),
    ],
)
def test_costs(model: nn.Module, shape: tuple[int, ...], expected: list[tuple[str, int, int]]) -> None:
    costs = layer_costs(capture(nn.Sequential(model), torch.zeros(1, *shape)))
    assert [(cost.attrs, cost.weights, cost.macs) for cost in costs] == expected
    assert costs[0].ifm == (1, *shape)


def test_names_types_and_volumes() -> None:
    first, second, third = layer_costs(capture(Twice(), torch.zeros(1, 2, 3, 3)))
    assert (first.name, second.name, third.name) == ("conv", "conv_1", "add")
    assert (first.type, third.type) == ("Conv2d", "Add")
    assert (first.ifm_volume, first.ofm_volume) == (18, 18)
    assert LayerCost("x", "Split", "", (), (), 0, 0).ofm_volume == 0


@pytest.mark.parametrize(
    ("arch", "macs"),
    [("resnet20_cifar", "40,813,184"), ("mobilenet_v2", "300,774,272"), ("squeezenet1_1", "349,151,936")],
)
def test_compute_of_known_models(arch: str, macs: str, tmp_path: Path) -> None:
    spec = find_model(arch)
    text = summary("compute", create_model(spec), torch.zeros(2, *spec.input_shape), tmp_path)
    assert text.endswith(f"\nTotal MACs: {macs}")
    rows = list(csv.DictReader((tmp_path / "compute.csv").read_text().splitlines()))
    assert sum(int(row["MACs"]) for row in rows) == int(macs.replace(",", ""))


def test_compute_table(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    lines = summary("compute", model, torch.zeros(4, 1, 4, 4), tmp_path).splitlines()
    assert [_columns(line) for line in (lines[1], *lines[3:5])] == [
        ["Name", "Type", "Attrs", "IFM", "IFM volume", "OFM", "OFM volume", "Weights volume", "MACs"],
        ["0", "Conv2d", "k=(3, 3)", "(1, 1, 4, 4)", "16", "(1, 2, 2, 2)", "8", "18", "72"],
        ["3", "Linear", "", "(1, 8)", "8", "(1, 10)", "10", "80", "80"],
    ]
    assert lines[2].startswith("|--------+--------+"), "psql"
    assert lines[6:] == ["Total MACs: 152"]


def _columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_sparsity_counts_blocks_that_are_zero(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, 2))
    conv, linear = model[0].weight, model[2].weight
    with torch.no_grad():
        conv.fill_(1.0)
        conv[0] = 0.0  # a filter
        conv[:, 1] = 0.0  # a channel
        conv[3, 0, 0, 0] = 0.0
        linear.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, -4.0]]))
    lines = summary("sparsity", model, torch.zeros(1), tmp_path).splitlines()
    assert _columns(lines[1]) == [
        *("Name", "Shape", "NNZ (dense)", "NNZ (sparse)", "Cols (%)", "Rows (%)", "Ch (%)", "2D (%)", "3D (%)"),
        *("Fine (%)", "Std", "Mean", "Abs-Mean"),
    ]
    mean = 11 / 32
    assert _columns(lines[3]) == [
        *("0.weight", "(4, 2, 2, 2)", "32", "11", "0.00000", "0.00000", "50.00000", "62.50000", "25.00000", "65.62500"),
        *(f"{value:.5f}" for value in ((mean * (1 - mean)) ** 0.5, mean, mean)),
    ]
    assert _columns(lines[4]) == [
        *("2.weight", "(2, 4)", "8", "3", "25.00000", "50.00000", "0.00000", "0.00000", "0.00000", "62.50000"),
        *("1.73205", "0.00000", "1.00000"),
    ]
    assert _columns(lines[5])[:4] + _columns(lines[5])[9:10] == ["Total sparsity:", "-", "40", "14", "65.00000"]
    assert lines[-1] == "Total sparsity: 65.00"
    assert (tmp_path / "weights_sparsity.csv").read_text().splitlines() == [
        "parameter,shape,volume,sparse volume,sparsity level",
        '0.weight,"(4, 2, 2, 2)",32,11,65.625',
        '2.weight,"(2, 4)",8,3,62.5',
    ]


def test_sparsity_of_resnet20(tmp_path: Path) -> None:
    text = summary("sparsity", create_model(find_model("resnet20_cifar")), torch.zeros(1), tmp_path)
    assert "| Total sparsity:              | -              |        270896 |         270896 |" in text


def test_modules_and_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(), nn.Sequential(nn.Linear(4, 2), nn.Sequential(nn.ReLU())))
    rows = [_columns(line) for line in summary("modules", model, torch.zeros(1, 4), tmp_path).splitlines()[3:-1]]
    assert rows == [["0", "Sequential"], ["1.0", "Linear"], ["1.1.0", "ReLU"]]
    assert summary("model", model, torch.zeros(1, 4), tmp_path) == str(model)
    assert not list(tmp_path.iterdir())


def test_channels(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5))
    model.append(nn.Linear(5, 2))
    text = summary("channels", model, torch.zeros(1, 3, 2, 2), tmp_path)
    rows = [_columns(line) for line in text.splitlines()[3:-2]]
    assert rows == [["0 out, 1, 3 in x4", "4", "32", "26", ""], ["3 out, 4, 5 in", "5", "18", "21", "yes"]]
    assert text.endswith("Total classes: 9")
    with (tmp_path / "channels.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["0 out, 1, 3 in x4", "4", "32", "26", ""]
    assert summary("channels", nn.Sequential(nn.ReLU()), torch.zeros(1, 4), tmp_path).endswith("Total classes: 0")


def test_a_model_without_weights_or_products(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU())
    assert summary("compute", model, torch.zeros(1, 4), tmp_path).endswith("Total MACs: 0")
    assert summary("sparsity", model, torch.zeros(1, 4), tmp_path).endswith("Total sparsity: 0.00")


def test_mistakes(tmp_path: Path) -> None:
    model, example = nn.Sequential(nn.Conv2d(1, 1, 3)), torch.zeros(1, 1, 4, 4)
    with pytest.raises(QlibError, match=r"unknown summary 'computes'; allowed: sparsity, .*; did you mean compute?"):
        summary("computes", model, example, tmp_path)
    with pytest.raises(
        OutputError, match=r"cannot write table '.*none/compute\.csv' \(No such file or directory\); give"
    ):
        summary("compute", model, example, tmp_path / "none")
    with pytest.raises(ModelError, match="it fails at '0' on an input of shape"):
        summary("compute", model, torch.zeros(1, 3, 4, 4), tmp_path)


@pytest.mark.parametrize("what", SUMMARIES)
def test_the_command_line_knows_every_summary(what: str) -> None:
    assert parse(["--summary", what]).summary == (what,)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.fc((y + torch.relu(y)).flatten(1))


def test_a_drawing_has_each_layer_and_each_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without Graphviz
    text = summary("png_w_params", Branches(), torch.zeros(2, 3, 4, 4), tmp_path)
    assert text == (
        f"Graph of the model saved to {tmp_path / 'model.dot'}; Graphviz, which draws it, is not installed: apt install"
        " graphviz, or open the file in a viewer of DOT files"
    )
    lines = (tmp_path / "model.dot").read_text().splitlines()
    edges = [line.strip().partition(" [")[0] for line in lines if "->" in line]
    assert edges == [
        *('"input" -> "conv"', '"conv" -> "relu"', '"conv" -> "add"', '"relu" -> "add"', '"add" -> "flatten"'),
        '"flatten" -> "fc"',
    ]
    assert '  "conv" [label="conv\\nConv2d\\nweight 4x3x3x3\\nbias 4"];' in lines
    assert '  "input" -> "conv" [label="3x4x4"];' in lines


@pytest.mark.parametrize(
    ("what", "script", "expected"),
    [
        pytest.param("png", 'echo "$1 drawn"', "-Tpng drawn\n", id="png"),
        pytest.param("svg", 'echo "$1 drawn"', "-Tsvg drawn\n", id="svg"),
        pytest.param("svg", "echo no font >&2; exit 1", None, id="Graphviz fails"),
    ],
)
def test_graphviz_draws(
    what: str, script: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dot = tmp_path / "dot"
    dot.write_text(f"#!/bin/sh\n{script}\n")
    dot.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    text, picture = summary(what, Branches(), torch.zeros(2, 3, 4, 4), tmp_path), tmp_path / f"model.{what}"
    if expected is None:
        assert text.endswith("; Graphviz could not draw it (no font)")
        assert not picture.exists()
    else:
        assert (text, picture.read_text()) == (f"Drawing of the model saved to {picture}", expected)
