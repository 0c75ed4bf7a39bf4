"""Clip methods side by side: one collection, then each method at each bit-width, through the command line.

    python benchmarks/ranges.py ../shared [--bits 8 6 5 4] [--acts none kl auto] [--wts none mse] [--seeds 0 1 2]

Takes the folder that holds `data` and `checkpoints`; prints a Markdown table of means over the calibration seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

from qlib.cli import main as compress

METHODS = ("none", "percentile", "kl", "mse", "lp", "auto")
YAML = """\
quantizers:
  q:
    class: PostTrainLinearQuantizer
    bits_activations: {bits}
    bits_weights: {bits}
    mode: {{activations: asym_u, weights: sym}}
    per_channel_wts: true
    clip_acts: {acts}
    clip_wts: {wts}
    model_activation_stats: {stats}
    overrides:
      conv1: {{bits_weights: 8, bits_activations: 8}}
      fc: {{bits_weights: 8, bits_activations: 8}}
"""


def run(command: list[str]) -> dict[str, float]:
    """Runs one command line in the current folder; the last row of its metrics, empty where there is none."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = compress(command)
    if code != 0:
        sys.exit(code)
    metrics = Path(output.getvalue().strip().rsplit("Log file for this run: ", 1)[1]).parent / "metrics.csv"
    if not metrics.exists():
        return {}
    with metrics.open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    print(" ".join(command[-8:]), last["top1"], file=sys.stderr)
    return {key: float(last[key]) for key in ("top1", "loss", "changed")}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4])
    parser.add_argument("--acts", nargs="+", default=METHODS)
    parser.add_argument("--wts", nargs="+", default=["none", "mse"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fraction", default="0.2")
    args = parser.parse_args()
    shared: Path = args.shared.resolve()
    base = ["-a", "resnet20_cifar", str(shared / "data" / "cifar10"), "-j", "0", "--cpu", "--resume-from"]
    base.append(str(shared / "checkpoints" / "resnet20_cifar_dense.pth.tar"))
    flags = ["--quantize-eval", "--qe-mode-acts", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel"]
    results: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        stats = Path(folder, "stats", "resnet20_cifar_cifar10.yaml")
        for seed in args.seeds:
            run([*base, "--seed", str(seed), "--qe-calibration", args.fraction, "--qe-histograms"])
            for bits in args.bits:
                for wts in args.wts:
                    for acts in args.acts:
                        given = [*base, *flags, "--qe-stats-file", str(stats), "--qe-bits-acts", str(bits)]
                        given += ["--qe-bits-wts", str(bits), "--qe-clip-acts", acts, "--qe-clip-wts", wts]
                        results.setdefault((f"W{bits}A{bits}", wts, acts), []).append(run(given))
                        if bits < 8:
                            Path("ends.yaml").write_text(YAML.format(bits=bits, acts=acts, wts=wts, stats=stats))
                            ends = run([*base, "--quantize-eval", "--qe-config-file", "ends.yaml"])
                            results.setdefault((f"W{bits}A{bits}, ends at 8", wts, acts), []).append(ends)
    rows = []
    for case, each in results.items():
        means = {key: statistics.mean(result[key] for result in each) for key in each[0]}
        rows.append([*case, f"{means['top1']:.2f}", f"{means['loss']:.4f}", f"{means['changed']:.2f} %"])
    headers = ["case", "clip of weights", "clip of activations", "Top1", "loss", "differs from FP32"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
