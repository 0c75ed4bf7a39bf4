"""What equalization and bias correction give back on a depthwise network whose weights have one range a tensor.

    python benchmarks/depthwise.py [--bits 8 6] [--epochs 60] [--seeds 0 1 2]

Trains, on scikit-learn's digits, a network of depthwise-separable blocks with batch-norm and ReLU (less than a minute
a seed on one core), the way such networks are trained: RMSprop with weight decay. Nothing is rescaled by hand: the
channels differ because training makes them. Prints a Markdown table of each correction, a mean over the seeds, and what
ten epochs under schedules/qat_linear_8bit.yaml give, still with one range a tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from qlib.cli import main as compress
from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import LayerSettings, PtqConfig
from qlib.correct._base import CalibrationImages
from qlib.correct.absorb_bias import absorb_bias
from qlib.correct.bias_correction import analytic_bias_correction, bias_correction
from qlib.correct.bn_reestimation import bn_reestimation
from qlib.correct.equalize import equalize
from qlib.data.datasets import Split, open_dataset
from qlib.graph import Graph, NormStatistics, after_folding, capture, fold_batch_norm, norm_statistics
from qlib.lower import exact_arithmetic, lower
from qlib.lower.fit import fit
from qlib.metrics import evaluate
from qlib.models import find_model
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.data_free import data_free_stats, image_range_of
from qlib.stats.tensor_stats import ModelStats

BATCH, RATE, DECAY, WIDTH = 64, 0.01, 1e-4, 24
CALIBRATION = 512


def network() -> nn.Sequential:
    """A convolution, four depthwise-separable blocks and a linear classifier, for one-channel images."""
    wide = 2 * WIDTH
    stem = [nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    blocks = [*block(WIDTH, WIDTH), *block(WIDTH, wide, stride=2), *block(wide, wide), *block(wide, wide)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10))


def digits_network() -> nn.Sequential:
    """The network as the command line takes it."""
    model = network()
    model.dataset = "digits"  # type: ignore[assignment]
    return model


def block(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    """A depthwise convolution and a pointwise one."""
    depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    pointwise = nn.Conv2d(channels, out, 1, bias=False)
    return [depthwise, nn.BatchNorm2d(channels), nn.ReLU(), pointwise, nn.BatchNorm2d(out), nn.ReLU()]


def load(split: Split) -> tuple[Tensor, Tensor]:
    """All images and labels of a split."""
    spec = find_model("digits_cnn")
    dataset = open_dataset(spec.dataset, None, split, spec.transform, num_classes=spec.num_classes)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def shifted(images: Tensor) -> Tensor:
    """The images, all moved by up to one pixel in each direction."""
    dy, dx = (int(torch.randint(-1, 2, ())) for _ in range(2))
    return torch.roll(F.pad(images, (1, 1, 1, 1), value=float(images.min())), (dy, dx), (2, 3))[..., 1:-1, 1:-1]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """RMSprop with momentum and weight decay under one cycle of the learning rate."""
    steps = len(images) // BATCH
    optimizer = torch.optim.RMSprop(model.parameters(), RATE, weight_decay=DECAY, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps, cycle_momentum=False)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: steps * BATCH].reshape(-1, BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(shifted(images[batch])), labels[batch]))
            optimizer.step()
            cycle.step()
    model.eval()


@dataclass
class Trial:
    """One trained network on its way to integers; corrections change it in place."""

    graph: Graph
    norms: dict[str, NormStatistics]
    folded: dict[str, str]
    images: CalibrationImages
    bits: int
    per_channel: bool = False
    free: bool = False
    plan: Plan | None = None

    def make_plan(self) -> None:
        """From the calibration images, or from batch-norms alone."""
        settings = LayerSettings(
            bits_activations=8, bits_weights=self.bits, mode_activations="asym_u", mode_weights="sym",
            per_channel_wts=self.per_channel,
        )  # fmt: skip
        if self.free:
            transform = find_model("digits_cnn").transform
            stats = data_free_stats(self.graph, self.norms, image_range_of(*map(transform, extremes())))
        else:
            collector = Collector(self.graph)
            for batch in self.images.batches():
                collector.update(batch)
            stats = ModelStats(collector.result())
        resolved = resolve(PtqConfig(settings, ()), layer_infos(self.graph))
        self.plan = fit(self.graph, plan_post_train_linear(self.graph, resolved, stats, self.folded))[0]

    def planned(self) -> Plan:
        assert self.plan is not None
        return self.plan


def extremes() -> tuple[object, object]:
    """A black and a white image."""
    from PIL import Image

    return Image.new("RGB", (8, 8), (0, 0, 0)), Image.new("RGB", (8, 8), (255, 255, 255))


def reestimated(trial: Trial) -> None:
    trial.plan = bn_reestimation(trial.graph, trial.planned(), trial.images)


def equalized(trial: Trial) -> None:
    equalize(trial.graph, trial.norms)


def absorbed(trial: Trial) -> None:
    absorb_bias(trial.graph, trial.norms)


def empirical(trial: Trial) -> None:
    bias_correction(trial.graph, trial.planned(), trial.images)


def analytic(trial: Trial) -> None:
    analytic_bias_correction(trial.graph, trial.planned(), trial.norms)


Step = Callable[[Trial], None]

ROWS: dict[str, tuple[list[Step], list[Step], bool, bool]] = {
    "nothing": ([], [], False, False),
    "a range for each channel": ([], [], True, False),
    "bias correction": ([], [empirical], False, False),
    "equalization": ([equalized], [], False, False),
    "equalization, analytic bias correction": ([equalized], [analytic], False, False),
    "equalization, bias correction": ([equalized], [empirical], False, False),
    "equalization, absorption, bias correction": ([equalized, absorbed], [empirical], False, False),
    "equalization, re-estimation": ([equalized], [reestimated], False, False),
    "no images: nothing": ([], [], False, True),
    "no images: equalization, absorption, analytic": ([equalized, absorbed], [analytic], False, True),
}
"""Name -> corrections of the float graph, corrections of the plan, a range a channel, no images."""


def measure(model: nn.Module, bits: list[int], folder: Path) -> tuple[float, list[list[float]]]:
    """Top1 of the float network, and of each row under each of the bits: Top1 and loss."""
    images, _ = load("train")
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION]]
    calibration = CalibrationImages(lambda: iter(chosen.split(32)), len(chosen), torch.device("cpu"), folder)
    validation = [load("val")]
    results = []
    for before, after, per_channel, free in ROWS.values():
        row = []
        for each in bits:
            graph = capture(copy.deepcopy(model), images[:2])
            norms = norm_statistics(graph)
            folded = fold_batch_norm(graph)
            trial = Trial(graph, after_folding(norms, folded), folded, calibration, each, per_channel, free)
            for step in before:
                step(trial)
            trial.make_plan()
            for step in after:
                step(trial)
            with exact_arithmetic(), torch.no_grad():
                result = evaluate(lower(graph, trial.planned()), validation)
            row += [result.top1, result.loss]
        results.append(row)
    with torch.no_grad():
        return evaluate(model, validation).top1, results


def retrained(model: nn.Module, folder: Path) -> float:
    """Top1, in integers, after quantization-aware training at 8 bits with one range a tensor."""
    weights, output = folder / "float.pth", io.StringIO()
    torch.save({"state_dict": model.state_dict()}, weights)
    schedule = Path(__file__).resolve().parents[1] / "schedules" / "qat_linear_8bit.yaml"
    words = f"-a {Path(__file__).resolve()}:digits_network --exp-load-weights-from {weights} --out-dir {folder}"
    training = f"--compress {schedule} --epochs 10 --lr 0.01 -b 64 --vs 0 --cpu -j 0"
    with contextlib.redirect_stdout(output):
        code = compress([*words.split(), *training.split()])
    assert code == 0, output.getvalue()
    return float(re.findall(r"==> Top1: ([\d.]+)", output.getvalue())[-1])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6], help="of the weights; activations have 8")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    floats, tables = [], []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = network()
        train(model, *load("train"), args.epochs)
        with tempfile.TemporaryDirectory() as folder:
            top1, rows = measure(model, args.bits, Path(folder))
            after = retrained(model, Path(folder))
        floats.append(top1)
        tables.append(rows)
        print(f"seed {seed}: float Top1 {top1:.2f}, {after:.2f} after ten epochs of training at 8 bits", flush=True)
    means = torch.tensor(tables).mean(0).tolist()
    headers = ["", *(f"{what} W{bits}A8" for bits in args.bits for what in ("Top1", "loss"))]
    print(f"float Top1 {sum(floats) / len(floats):.2f}")
    rows = [[name, *row] for name, row in zip(ROWS, means, strict=True)]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=["", *(".2f", ".3f") * len(args.bits)]))


if __name__ == "__main__":
    main()
