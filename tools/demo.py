"""The main job on scikit-learn's digits, without any download: `make demo`.

Calibrates a small network, then evaluates it in FP32, in 8 bits, in 4 bits, and in 4 bits with a YAML file that keeps
its sensitive layers at 8. Every line that begins with $ can be typed as it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
import sys
from pathlib import Path

from tabulate import tabulate

from qlib.cli import main

ROOT = Path(__file__).resolve().parent.parent
STATS = "stats/digits_cnn_digits.yaml"
FOUR_BITS = "--qe-bits-acts 4 --qe-bits-wts 4"
RUNS = {
    "FP32": "--evaluate",
    "8 bits": f"--quantize-eval --qe-mode asym_u --qe-stats-file {STATS}",
    "4 bits": f"--quantize-eval --qe-mode asym_u {FOUR_BITS} --qe-stats-file {STATS}",
    "4 bits, 8 where it matters": "--quantize-eval --qe-config-file schedules/digits_4bit.yaml",
}


def compress(flags: str) -> dict[str, str]:
    """Runs one command line; the last row of its metrics.csv, or nothing where it made none."""
    command = f"-a digits_cnn --pretrained -j 0 {flags}"
    print(f"$ python compress.py {command}", flush=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(shlex.split(command))
    if code != 0:
        print(output.getvalue())
        sys.exit(code)
    log = output.getvalue().strip().rsplit("Log file for this run: ", 1)[1]
    metrics = Path(log).parent / "metrics.csv"
    if not metrics.exists():
        return {}
    with metrics.open(newline="") as file:
        return list(csv.DictReader(file))[-1]


def row(name: str, metrics: dict[str, str]) -> list[str]:
    """One line of the table."""
    top1, low, high, loss = (float(metrics[key]) for key in ("top1", "top1_low", "top1_high", "loss"))
    changed = f"{float(metrics['changed']):.1f} %" if metrics.get("changed") else ""
    return [name, f"{top1:.1f}", f"{low:.1f} to {high:.1f}", f"{loss:.4f}", changed]


def demo() -> None:
    """Prints the commands and one table."""
    os.chdir(ROOT)
    compress("--qe-calibration 0.2")
    rows = [row(name, compress(flags)) for name, flags in RUNS.items()]
    headers = ["digits_cnn, 500 images", "Top1", "95 % interval", "Loss", "differs from FP32"]
    print("\n" + tabulate(rows, headers, tablefmt="psql", disable_numparse=True))
    print("\nWhat each layer did: latest_log_dir/layer_quant_params.yaml. Edit it, pass it back with --qe-config-file.")


if __name__ == "__main__":
    demo()
