"""How much slower than the float model: collecting statistics, without and with histograms, and exact evaluation.

    python benchmarks/speed.py [MODEL ...] [--batch 32] [--rounds 7] [--layout channels_last|contiguous]

Every round runs the unfolded float model, both collections and the exact 8-bit evaluation, in turn, on the same
images; the table shows the median of the rounds' ratios. Only the ratios mean anything: machines differ and are shared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate

from qlib.config.layers.settings import LayerSettings
from qlib.graph import capture, fold_batch_norm
from qlib.graph.ir import layers, name_of
from qlib.lower import lower
from qlib.lower.fit import fit
from qlib.metrics import Meter, evaluate_together
from qlib.models import create_model, find_model
from qlib.ptq.planner import plan_post_train_linear
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(arch: str, batch: int, rounds: int, memory_format: torch.memory_format) -> list[object]:
    """Median ratios, and their range, for one model with random weights."""
    torch.manual_seed(0)
    spec = find_model(arch)
    model = create_model(spec).to(memory_format=memory_format)
    images = torch.randn(batch, *spec.input_shape).contiguous(memory_format=memory_format)
    labels = torch.zeros(batch, dtype=torch.long)
    graph = capture(model, images[:2])
    folded = fold_batch_norm(graph)
    collector = Collector(graph)
    collector.update(images)
    with_histograms = Collector(graph, histograms=True)
    settings = LayerSettings(mode_activations="asym_u", per_channel_wts=True)
    stats = ModelStats(collector.result())
    plan = plan_post_train_linear(graph, {name_of(node): settings for node, _ in layers(graph)}, stats, folded)
    exact = lower(graph, fit(graph, plan)[0])

    def whole() -> None:
        with torch.inference_mode():
            model(images)

    tasks: dict[str, Callable[[], object]] = {
        "float": whole,
        "collect": lambda: collector.update(images),
        "histograms": lambda: with_histograms.update(images),
        "exact": lambda: evaluate_together([exact], [Meter()], [(images, labels)]),
    }
    for task in tasks.values():
        task()
    times = [{name: seconds(task) for name, task in tasks.items()} for _ in range(rounds)]
    row: list[object] = [arch, f"{statistics.median(t['float'] for t in times):.3f}"]
    for name in ("collect", "histograms", "exact"):
        ratios = [t[name] / t["float"] for t in times]
        row += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} .. {max(ratios):.2f}"]
    return row


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layout", choices=["channels_last", "contiguous"], default="channels_last")
    args = parser.parse_args()
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    rows = [measure(arch, args.batch, args.rounds, layout) for arch in args.models]
    headers = ["model", "float s", "collect / float", "range", "with histograms / float", "range"]
    headers += ["exact / float", "range"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {args.batch}, {args.layout}")
    print(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
