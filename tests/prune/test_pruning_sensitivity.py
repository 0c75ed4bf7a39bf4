"""--sense element, filter and channel: what is measured, Distiller's numbers, broken runs, the table and the files."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import SHARED, good, make_images, rows, run, user_model
from torch import Tensor, nn

from qlib.config.flags.groups import PRUNED_PARTS
from qlib.data.datasets import open_dataset
from qlib.data.loader import make_loader
from qlib.graph import LAYOUT, capture, lay_out
from qlib.metrics import evaluate
from qlib.models import create_model, find_model
from qlib.prune import sensitivity
from qlib.prune.removal import REMOVALS, Weight, weights_of
from qlib.prune.sensitivity import PruningStudy, sparsity_levels
from qlib.report.plots import plot_pruning


class Spellings(nn.Module):
    """Weights as models hold them: of layers, used twice, transposed, in groups, given to a function, in parts, and
    one from which another is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.free = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.scaled = nn.Parameter(torch.randn(5, 6, 1, 1))
        self.parts = nn.Parameter(torch.randn(2 * 5, 5))
        self.fc = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.twice(F.relu(self.twice(x)))
        x = F.relu(F.conv2d(self.up(x), self.free))
        x = F.conv2d(x, self.scaled / self.scaled.norm()).mean((2, 3))
        x = F.linear(x, self.parts[:5]) + F.linear(x, self.parts[5:])
        return self.fc(x)


IMAGES = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 7, (20,), generator=torch.Generator().manual_seed(2))
BATCHES = [(IMAGES[:12], LABELS[:12], 12), (IMAGES[12:], LABELS[12:], 8)]
LEVELS = (0.0, 0.1, 0.3, 0.9)


def model() -> nn.Module:
    torch.manual_seed(3)
    return Spellings().eval()


def study(built: nn.Module, what: str) -> PruningStudy:
    return PruningStudy(built, capture(built, IMAGES[:2], share=True).eval(), REMOVALS[what], LEVELS)


def test_what_is_removed_is_what_the_command_line_names() -> None:
    assert tuple(REMOVALS) == PRUNED_PARTS


@pytest.mark.parametrize("what", REMOVALS)
def test_each_row_is_a_model_without_that_part_of_one_weight(what: str) -> None:
    built = model()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    measured = study(built, what)
    for _ in measured.steps(BATCHES):
        pass
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert measured.left_out == []
    found = measured.results()
    names = [
        name for name, value in built.named_parameters() if value.ndim == 4 or (what, value.ndim) == ("element", 2)
    ]
    assert [(row.parameter, row.sparsity) for row in found] == list(itertools.product(names, LEVELS))
    for row in found:
        pruned = copy.deepcopy(built)
        (weight,) = (each for each in weights_of(pruned, REMOVALS[what]) if each.name == row.parameter)
        weight.parameter.data *= weight.mask(REMOVALS[what], row.sparsity)
        expected = evaluate(pruned, [(IMAGES, LABELS)])
        assert (row.top1, row.top5) == pytest.approx((expected.top1, expected.top5))
        assert row.loss == pytest.approx(expected.loss, rel=1e-5)
    assert measured.reference().loss == pytest.approx(evaluate(built, [(IMAGES, LABELS)]).loss, rel=1e-6)
    assert len({row.loss for row in found}) > len(names)


def test_only_what_comes_behind_the_weight_runs_again_and_equal_counts_run_once() -> None:
    built = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 7)).eval()
    measured, calls = study(built, "filter"), dict.fromkeys("013", 0)
    for name, module in measured._replay.graph.named_modules():
        if name in calls:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    assert len(measured) == 1 + 2 * 2  # 0.1 * 4 removes no filter, 0.3 * 4 one, 0.9 * 4 three
    assert list(measured.steps(BATCHES)) == [12] * 5 + [8] * 5
    # On each batch: as it is, without parts of the first (2), up to the second once, without parts of that (2).
    assert calls == {"0": 2 * (1 + 2 + 1), "1": 2 * (1 + 2 + 2), "3": 2 * 5}


@pytest.mark.parametrize("steps", [1, 4, 9, 13], ids=lambda steps: f"after {steps}")
def test_a_study_that_goes_on_gives_the_same_numbers(steps: int, tmp_path: Path) -> None:
    whole, path, key = study(model(), "channel"), tmp_path / "part.safetensors", {"of": "this"}
    total = len(list(whole.steps(BATCHES)))
    assert steps < total
    broken = study(model(), "channel")
    for _ in itertools.islice(broken.steps(BATCHES), steps):
        pass
    broken.save(path, key)
    again = study(model(), "channel")
    assert not again.load(path, {"of": "that"}, 20)
    assert again.load(path, key, 20)
    left = [batch for batch, end in zip(BATCHES, (12, 20), strict=True) if end > again.images_done]
    assert len(list(again.steps(left))) == total - steps
    assert again.results() == whole.results()


def test_a_damaged_file_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    study(model(), "filter").save(path, {})
    assert not study(model(), "element").load(path, {}, 20), "of other variants"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert not study(model(), "filter").load(path, {}, 20)
    assert not study(model(), "filter").load(tmp_path / "none", {}, 20)


def test_levels() -> None:
    assert sparsity_levels(0.0, 0.10, 0.05) == (0.0, 0.05)
    assert sparsity_levels(0.5, 0.6, 0.5) == (0.5,)
    assert len(sparsity_levels(0.0, 0.95, 0.05)) == 19


DISTILLER = [
    ("filter", 0.05, "layer2.0.conv1", "91.740 0.34126"),
    ("filter", 0.05, "layer2.0.downsample.0", "92.330 0.33741"),
    ("filter", 0.05, "layer1.2.conv2", "92.134 0.33626"),
    ("element", 0.5, "layer2.0.conv1", "91.249 0.36933"),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_distillers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlib.checkpoint.fit import load_state, model_state
    from qlib.checkpoint.read import read_checkpoint

    spec = find_model("resnet20_cifar")
    built = create_model(spec).eval()
    load_state(built, model_state(read_checkpoint(SHARED / "checkpoints/resnet20_cifar_dense.pth.tar")), "it", "")
    images = open_dataset("cifar10", SHARED / "data/cifar10", "val", spec.transform, num_classes=10)
    loader = make_loader(images, batch_size=64)
    batches = [(images.contiguous(memory_format=LAYOUT), labels, len(labels)) for images, labels in loader]
    graph, found = lay_out(capture(built, torch.zeros(2, 3, 32, 32), share=True)).eval(), {}
    for what, level in (("filter", 0.05), ("element", 0.5)):
        names = {f"{name}.weight" for each, _, name, _ in DISTILLER if each == what}
        monkeypatch.setattr(
            sensitivity,
            "weights_of",
            lambda model, removal, names=names: [each for each in weights_of(model, removal) if each.name in names],
        )
        measured = PruningStudy(built, graph, REMOVALS[what], (level,))
        for _ in measured.steps(batches):
            pass
        found |= {(what, row.parameter): f"{row.top1:.3f} {row.loss:.5f}" for row in measured.results()}
    assert found == {(what, f"{name}.weight"): numbers for what, _, name, numbers in DISTILLER}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    user_model(tmp_path)
    make_images(tmp_path / "images", train=3, val=96)
    return tmp_path


SENSE = "-a net.py:brightest images --sense filter --sense-range 0 1 0.25"
PARTIAL = Path("stats/net.py_brightest_imagefolder_sense_filter.partial.safetensors")


def test_a_run_as_a_user_runs_it(folder: Path) -> None:
    done = good(f"{SENSE} -n look", folder)
    found = rows(done.folder / "look_sensitivity.csv")
    assert list(found[0]) == ["parameter", "sparsity", "top1", "top5", "loss"]
    assert [(row["parameter"], row["sparsity"]) for row in found] == [
        ("conv.weight", level) for level in ("0.0", "0.25", "0.5", "0.75")
    ]
    assert [round(float(row["top1"])) for row in found] == [99, 99, 68, 34]  # the black filter is the smallest
    assert "Sensitivity: 1 weights, 3 variants, each on 96 test images" in done.lines
    (row,) = (line for line in done.lines if line.startswith("| conv.weight"))
    assert row.split("|")[-2].strip() == "50 %", "where it loses a point"
    assert not (folder / PARTIAL).exists()


def test_fewer_test_images(folder: Path) -> None:
    assert any("variants, each on 48 test images" in line for line in good(f"{SENSE} --etes 0.5", folder).lines)


def test_a_run_that_was_stopped_goes_on(folder: Path) -> None:
    whole = (good(SENSE, folder).folder / "sensitivity.csv").read_bytes()
    (folder / "stop").write_text("10")  # a red image, and red comes last
    broken = run(SENSE, folder)
    (folder / "stop").unlink()
    sentence = "sensitivity stopped after 64 of 96 images; run the same command again to go on"
    assert (broken.code, broken.err) == (130, f"compress.py: {sentence}\n")
    again = good(SENSE, folder)
    assert "Going on from a broken analysis: 64 of 96 images are done" in again.lines
    assert (again.folder / "sensitivity.csv").read_bytes() == whole
    assert not (folder / PARTIAL).exists()


def test_check_looks_at_no_image(folder: Path) -> None:
    lines = good(f"{SENSE} --check", folder).lines
    (row,) = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| conv.weight"))
    assert row == ["conv.weight", "4x3x1x1", "4", "1", "2", "3"]
    assert "Sensitivity: 1 weights, 3 variants" in lines


@pytest.mark.parametrize(
    ("arch", "sentence"),
    [
        pytest.param("net.py:broken", "the weights 'conv.weight' of net.py:broken hold NaN", id="NaN"),
        pytest.param("net.py:overflowing", "net.py:overflowing gives NaN or infinity for some", id="infinity"),
        pytest.param("flat.py:flat", "--sense filter finds nothing to measure: flat.py:flat has no", id="no filters"),
    ],
)
def test_what_is_refused(arch: str, sentence: str, folder: Path) -> None:
    (folder / "flat.py").write_text(
        "from torch import nn\nfrom net import Brightest\nclass Flat(nn.Module):\n"
        "    dataset, input_shape, transform = 'imagefolder', (3, 8, 8), staticmethod(Brightest.transform)\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(192, 4)\n"
        "    def forward(self, x):\n        return self.fc(x.flatten(1))\ndef flat():\n    return Flat()\n"
    )
    done = run(f"-a {arch} images --sense filter", folder)
    assert (done.code, done.err.startswith(f"compress.py: error: {sentence}")) == (2, True), done.err


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measured = study(model(), "filter")
    for _ in measured.steps(BATCHES):
        pass
    assert plot_pruning(tmp_path / "plot.png", measured.results(), measured.reference())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_weight_lies_as_its_parameter() -> None:
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2)
    weight = Weight("weight", layer.weight, layer)
    assert weight.count(REMOVALS["filter"]) == 6
    assert weight.count(REMOVALS["channel"]) == 2
    assert weight.mask(REMOVALS["filter"], 0.5).shape == layer.weight.shape
