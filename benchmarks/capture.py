"""How long the capture of a model takes, beside torch.export alone, one float forward, and another checkout.

    python benchmarks/capture.py [MODEL ...] [--rounds 3] [--beside CHECKOUT]

Prints a Markdown table of seconds of CPU time on one thread, the least of the rounds, with random weights; the columns
with an x are ratios. Each round is a process of its own. CHECKOUT is another version of this repository, whose capture
is measured in turn with this one's.
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
from tabulate import tabulate
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


def apart(arch: str, root: Path) -> list[float]:
    """`measure` in a process of its own, with the code of a checkout."""
    command = [sys.executable, __file__, "--here", arch]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return [float(word) for word in out.split()]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(*measure(args.models[0]))
        return
    roots = [ROOT, *([args.beside.resolve()] if args.beside else [])]
    rows = []
    for arch in args.models:
        found = [[apart(arch, root) for root in roots] for _ in range(args.rounds)]
        least = [[min(row[i][j] for row in found) for j in range(3)] for i in range(len(roots))]
        captured, exported, forward = least[0]
        row = [arch, captured, exported, captured / exported, captured / forward]
        rows.append([*row, *(each for other in least[1:] for each in (other[0], captured / other[0]))])
    beside = ["the other capture", "capture / other x"] * (len(roots) - 1)
    headers = ["model", "capture", "torch.export", "capture / export x", "capture / forward x", *beside]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    main()
