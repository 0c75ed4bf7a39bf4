"""Our results beside those of the ancestor, under the same flags and statistics, through the command line.

    python benchmarks/reference.py ../shared

Takes the folder that holds `data`, `checkpoints` and `reference`; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import shlex
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

from qlib.cli import main as compress


def run(command: list[str], out_dir: Path) -> dict[str, float]:
    """Runs one command line; the last row of its metrics."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = compress([*command, "--out-dir", str(out_dir)])
    if code != 0:
        sys.exit(code)
    folder = Path(output.getvalue().strip().rsplit("Log file for this run: ", 1)[1]).parent
    with (folder / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {key: float(value) for key, value in last.items() if key not in ("what", "arch") and value}


def tolerance(flags: str) -> float:
    """How far the loss may be from the ancestor's."""
    if "n_std" in flags:
        return 0.05
    for bits, allowed in (("4", 0.10), ("5", 0.05), ("6", 0.02)):
        if f"--qe-bits-wts {bits}" in flags:
            return allowed
    return 0.015 if "--qe-dynamic" in flags else 0.006


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    shared: Path = parser.parse_args().shared.resolve()
    with (shared / "reference" / "distiller_results.csv").open(newline="") as file:
        cases = list(csv.DictReader(file))
    base = ["-a", "resnet20_cifar", str(shared / "data" / "cifar10"), "-j", "0", "--resume-from"]
    base.append(str(shared / "checkpoints" / "resnet20_cifar_dense.pth.tar"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            flags = case["flags"].replace("STATS", str(shared / "reference" / "resnet20_cifar_stats.yaml"))
            ours, theirs = run([*base, *shlex.split(flags)], Path(folder)), float(case["loss"])
            allowed, low = tolerance(flags), case["top1_lo"]
            inside = not low or float(low) - 0.4 <= ours["top1"] <= float(case["top1_hi"]) + 0.4
            difference = ours["loss"] - theirs
            met = inside and abs(difference) <= allowed
            interval = f"{float(low):.2f} to {float(case['top1_hi']):.2f}" if low else ""
            differs = f"{ours['changed']:.2f} %" if "changed" in ours else ""
            loss = f"{ours['loss']:.5f}"
            rows.append([case["name"], f"{ours['top1']:.3f}", interval, loss, f"{theirs:.5f}", f"{difference:+.4f}",
                         f"{allowed:g}", differs, "yes" if met else "NO"])  # fmt: skip
            print(case["name"], file=sys.stderr)
    headers = ["case", "Top1", "ancestor's Top1", "loss", "ancestor's loss", "difference", "allowed"]
    headers += ["differs from FP32", "met"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
