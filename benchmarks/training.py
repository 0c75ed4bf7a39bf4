"""What a step of quantization-aware training costs, next to one in float: resnet20 of CIFAR-10, random images.

    python benchmarks/training.py [--batch-size 128] [--rounds 10] [--methods LSQQuantizer ...]

Each round times one step of each method and one in float, forward, backward and optimizer; the ratio is that of the
medians. Weights and activations have 4 bits, where the method has such.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from qlib.config.schedule.types import Component, PolicySpec
from qlib.graph import LAYOUT, FoldedGraph, Graph, capture, fold_batch_norm
from qlib.models import create_model, find_model
from qlib.qat.base import TRAINING_QUANTIZERS
from qlib.qat.quantization import Quantization
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

EXTRA = {"DorefaQuantizer": {"bits_gradients": 8}}


def quantized(model: nn.Module, cls: str, images: Tensor) -> nn.Module:
    """The trainable graph of `model` with the quantizers of a class."""
    graph = capture(model, images[:2], share=True).to(memory_format=LAYOUT)
    folded = capture(model, images[:2])
    names = fold_batch_norm(folded)
    settings = {"bits_activations": 4, "bits_weights": 4, "edges": "all", **EXTRA.get(cls, {})}
    spec = PolicySpec(Component("quantizers", "q", cls, settings), 0, 1)

    def calibrate(graph: Graph, _: int) -> ModelStats:
        collector = Collector(graph, histograms=True)
        collector.update(images[:16], consumed=16)
        return ModelStats(collector.result(), {})

    quantization = Quantization(graph, FoldedGraph(folded, names), [spec], calibrate)
    quantization.on_epoch_begin(0)
    return quantization.module.train()


def stepper(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    """One step of training, which answers its seconds."""
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        loss = F.cross_entropy(model(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Times the steps and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=list(TRAINING_QUANTIZERS), choices=list(TRAINING_QUANTIZERS))
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32).contiguous(memory_format=LAYOUT)
    labels = torch.randint(0, 10, (args.batch_size,))
    spec = find_model("resnet20_cifar")
    model = create_model(spec).to(memory_format=LAYOUT).train()
    steps = {"float": stepper(model, images, labels)}
    steps |= {cls: stepper(quantized(create_model(spec), cls, images), images, labels) for cls in args.methods}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            times[name].append(step())
    base = statistics.median(times["float"])
    rows = [
        [name, f"{statistics.median(each):.3f}", f"{statistics.median(each) / base:.2f}"]
        for name, each in times.items()
    ]
    print(tabulate(rows, ["method", "seconds a step", "of float"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
