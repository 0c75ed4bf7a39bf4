"""How long the capture of a model takes, beside torch.export alone, one float forward, and another checkout.

    python benchmarks/capture.py [MODEL ...] [--rounds 3] [--beside CHECKOUT]

Prints a Markdown table of seconds of CPU time on one thread, the least of the rounds, with random weights; the columns
with an x are ratios. CHECKOUT is another version of this repository, whose capture is measured in turn with this one's,
in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export import Dim, export

from qlib.graph import capture
from qlib.models import find_model

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x1_0", "swin_t", "efficientnet_b0", "vit_b_16")


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(arch: str) -> list[float]:
    """Seconds of capture, export and one forward of a model, in this process."""
    torch.set_num_threads(1)
    spec = find_model(arch)
    model, images = spec.build(spec.num_classes).eval(), torch.randn(2, *spec.input_shape)
    sizes = ({0: Dim("batch")},)
    export(torch.nn.ReLU(), (images,), strict=False, dynamic_shapes=sizes)  # what torch imports on the first call
    with torch.no_grad():
        model(images[:1])
        forward = seconds(lambda: model(images[:1]))
    exported = seconds(lambda: export(model, (images,), strict=False, dynamic_shapes=sizes))
    return [seconds(lambda: capture(model, images)), exported, forward]


def worker(root: Path) -> subprocess.Popen[str]:
    """A process with the code of a checkout, which measures the models that it is told."""
    command, environment = [sys.executable, __file__, "--here"], {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def told(process: subprocess.Popen[str], arch: str) -> list[float]:
    """What a worker measures."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(arch, file=process.stdin, flush=True)
    return [float(word) for word in process.stdout.readline().split()]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        for line in sys.stdin:
            print(*measure(line.strip()), flush=True)
        return
    workers = [worker(root) for root in (ROOT, *([args.beside.resolve()] if args.beside else []))]
    beside = ["the other capture", "capture / other x"] * (len(workers) - 1)
    headers = ["model", "capture", "torch.export", "capture / export x", "capture / forward x", *beside]
    print(f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}", flush=True)
    for arch in args.models:
        found = [[told(each, arch) for each in workers] for _ in range(args.rounds)]
        (captured, exported, forward), *others = [
            [min(each[i][j] for each in found) for j in range(3)] for i in range(len(workers))
        ]
        row = [captured, exported, captured / exported, captured / forward]
        row += [number for other in others for number in (other[0], captured / other[0])]
        print(f"| {arch} | {' | '.join(f'{number:.2f}' for number in row)} |", flush=True)
    for each in workers:
        each.communicate()


if __name__ == "__main__":
    main()
