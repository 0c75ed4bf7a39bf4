"""What a run looks at beside its scores: activity of channels, histograms of activations and parameters, masks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from runs import good, make_images, rows, run, user_model
from torch import Tensor, nn

from qlib.checkpoint.read import read_checkpoint
from qlib.checkpoint.write import write_checkpoint
from qlib.graph import capture
from qlib.stats.activity import ActivityCollector

IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A function, a module used twice, and one over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.mlp = nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.act(self.conv(x)))
        x = self.act(x - 1)
        return torch.relu(self.mlp(x.flatten(2).transpose(1, 2))).mean(1)


@torch.no_grad()
def test_activity_is_that_of_the_values_whatever_the_batches() -> None:
    net = Net().eval()
    collector = ActivityCollector(capture(net, IMAGES[:2]))
    for part in (IMAGES[:4], IMAGES[4:]):
        assert torch.allclose(collector.run(part), net(part), atol=1e-6)
    first = net.act(net.conv(IMAGES))
    second = net.act(first.relu() - 1)
    sequence = net.mlp(second.flatten(2).transpose(1, 2)).relu().transpose(1, 2)
    expected = {"act": first, "relu": first.relu(), "act_1": second, "relu_1": sequence}
    found = collector.result()
    assert list(found) == list(expected)
    for name, value in expected.items():
        by_channel = value.double().transpose(0, 1).flatten(1)
        assert torch.allclose(found[name].zeros, (by_channel == 0).double().mean(1)), name
        assert torch.allclose(found[name].l1, by_channel.abs().sum(1) / len(IMAGES)), name
        assert torch.allclose(found[name].mean, by_channel.mean(1)), name
        assert math.isclose(found[name].sparsity, float((value == 0).double().mean()), abs_tol=1e-9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    user_model(tmp_path)
    with (tmp_path / "net.py").open("a") as file:
        file.write("Brightest.train_transform = staticmethod(Brightest.transform)\n")
    make_images(tmp_path / "images", train=30, val=12)
    return tmp_path


MODEL = "-a net.py:brightest images"


def test_phases_and_parameters(folder: Path) -> None:
    done = good(f"{MODEL} -e --act-stats train valid --act-stats test --param-hist --vs 0.2 -n look", folder)
    counts = {phase: rows(done.folder / f"look_activation_stats_{phase}.csv") for phase in ("train", "valid", "test")}
    assert [list(each[0]) for each in counts.values()] == [["layer", "sparsity_ofm", "l1", "mean"]] * 3
    # Of the four channels black is 0 always, and each other one in the images of other colours but for a pixel.
    assert float(counts["test"][0]["sparsity_ofm"]) == pytest.approx(75, abs=1)
    channels = rows(done.folder / "look_activation_channels_test.csv")
    assert [row["channel"] for row in channels] == ["0", "1", "2", "3"]
    assert float(channels[0]["apoz_channels"]) == 100
    assert float(channels[2]["l1_channels"]) == pytest.approx(64 * 200 / 255 / 3, abs=1)
    bins = rows(done.folder / "look_parameter_histograms.csv")
    assert {row["parameter"] for row in bins} == {"conv.weight"}
    assert [int(row["count"]) for row in bins if row["count"] != "0"] == [9, 3]
    *_, row = (line for line in done.lines if line.startswith("| relu"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["4", "1"], "channels, and dead ones"


def test_histograms_of_activations(folder: Path) -> None:
    done = good(f"{MODEL} --act-hist 0.5", folder)
    found = rows(done.folder / "acts_histograms.csv")
    relu = [row for row in found if row["layer"] == "relu"]
    assert sum(int(row["count"]) for row in relu) == 6 * 4 * 64
    assert float(relu[0]["low"]) == 0
    assert {"acts_histograms.yaml", "acts_histograms.safetensors"} <= done.files
    assert not (folder / "stats").exists(), "later runs do not take them for calibration"


def test_masks(folder: Path) -> None:
    mask = torch.tensor([[0, 1, 1]]).expand(4, 3)[:, :, None, None].to(torch.uint8)
    weight = torch.rand(4, 3, 1, 1)
    path = folder / "pruned.pth.tar"
    write_checkpoint(path, {"state_dict": {"conv.weight": weight}, "masks": {"conv.weight": mask.contiguous()}})
    lines = good(f"{MODEL} --resume-from {path} -e --masks-sparsity", folder).lines
    (total,) = ([cell.strip() for cell in line.split("|")[3:-1]] for line in lines if line.startswith("| Total"))
    assert total == ["12", "8", "33.33333"]
    trained = good(f"{MODEL} --resume-from {path} --epochs 2 --lr 0.01 --vs 0 --masks-sparsity", folder).lines
    assert sum(line.startswith("| Total") for line in trained if "33.33333" in line and "sparsity" not in line) == 2, (
        "once an epoch"
    )
    lines = good(f"{MODEL} -e --masks-sparsity", folder).lines
    assert "Masks sparsity: there are no masks; --summary sparsity counts zeros" in lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param("-e --act-stats valid --vs 0", "--activation-stats valid finds no images with", id="no images"),
        pytest.param("-e --act-stats all", "--activation-stats 'all' is not allowed: it must be one of", id="a phase"),
    ],
)
def test_what_is_refused(words: str, sentence: str, folder: Path) -> None:
    done = run(f"{MODEL} {words}", folder)
    assert (done.code, done.err.startswith(f"compress.py: error: {sentence}")) == (2, True), done.err


@pytest.mark.parametrize("flag", ["--activation-stats test", "--param-hist", "--masks-sparsity", "--act-hist 1"])
def test_a_quantized_model_is_not_looked_at(flag: str, folder: Path) -> None:
    file = next(iter(folder.glob("logs/*/quantized_checkpoint.pth.tar")), None)
    if file is None:
        file = good(f"{MODEL} --qe --qe-calibration 1", folder).folder / "quantized_checkpoint.pth.tar"
    done = run(f"{MODEL} --resume-from {file} {flag}", folder)
    assert (done.code, "looks at a float model, but" in done.err) == (2, True), done.err


def test_the_model_before_training_is_kept(folder: Path) -> None:
    done = good(f"{MODEL} --epochs 1 --lr 0.5 --vs 0 --save-untrained-model -n look", folder)
    before = read_checkpoint(done.folder / "look_untrained_checkpoint.pth.tar")
    after = read_checkpoint(done.folder / "look_checkpoint.pth.tar")
    assert before["state_dict"]["conv.weight"].unique().tolist() == [0.0, 1.0], "as the model is made"
    assert not torch.equal(before["state_dict"]["conv.weight"], after["state_dict"]["conv.weight"])
    words = f"{MODEL} -e --exp-load-weights-from {done.folder / 'look_untrained_checkpoint.pth.tar'}"
    assert good(words, folder).score("fp32") == good(f"{MODEL} -e", folder).score("fp32")
