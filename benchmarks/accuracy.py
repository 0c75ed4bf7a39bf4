"""The accuracy of post-training methods on the resnet20 of CIFAR-10, through the command line.

    python benchmarks/accuracy.py ../shared [--cases W4A4-ends8 ...] [--seeds 0 1 2] [--results accuracy.csv]

Takes the folder that holds `data` and `checkpoints`. Each seed collects statistics (with histograms) on 1,024 other
training images; the evaluation is always that of all 1,017 validation images. A row that is in the results file is not
run again. Prints a Markdown table of means over the seeds, with the lowest and the highest Top1.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ranges import YAML, run
from tabulate import tabulate

BASE = ("--qe-mode-acts", "asym_u", "--qe-mode-wts", "sym", "--qe-per-channel")


def uniform(acts: int, wts: int, clip: str, *more: str) -> tuple[str, ...]:
    """The flags of a case with the same bits in all layers."""
    return ("--qe-bits-acts", str(acts), "--qe-bits-wts", str(wts), "--qe-clip-acts", clip, *BASE, *more)


def ends8(bits: int, clip: str, *more: str) -> tuple[str, ...]:
    """The flags of a case with the first and the last layer at 8 bits: `bits` and `clip` go into a YAML file."""
    return ("ends8", str(bits), clip, *more)


CASES: dict[str, tuple[str, ...]] = {
    "W8A8 auto": uniform(8, 8, "auto"),
    "W6A6 auto": uniform(6, 6, "auto"),
    "W6A6 auto, re-estimated": uniform(6, 6, "auto", "--ptq-bn-reestimation"),
    "W6A6 auto, brecq": uniform(6, 6, "auto", "--ptq-rounding", "brecq"),
    "W6A6 auto, brecq, re-estimated": uniform(6, 6, "auto", "--ptq-rounding", "brecq", "--ptq-bn-reestimation"),
    "W5A5 auto": uniform(5, 5, "auto"),
    "W5A5 auto, re-estimated": uniform(5, 5, "auto", "--ptq-bn-reestimation"),
    "W5A5 auto, brecq": uniform(5, 5, "auto", "--ptq-rounding", "brecq"),
    "W5A5 auto, brecq, re-estimated": uniform(5, 5, "auto", "--ptq-rounding", "brecq", "--ptq-bn-reestimation"),
    "W4A32": uniform(0, 4, "none"),
    "W4A32 gptq": uniform(0, 4, "none", "--ptq-rounding", "gptq"),
    "W4A32 gptq, corrected": uniform(0, 4, "none", "--ptq-rounding", "gptq", "--ptq-bias-correction", "empirical"),
    "W4A32 brecq": uniform(0, 4, "none", "--ptq-rounding", "brecq"),
    "W4A4 auto": uniform(4, 4, "auto"),
    "W4A4 auto, brecq": uniform(4, 4, "auto", "--ptq-rounding", "brecq"),
    "W4A4 auto, qdrop": uniform(4, 4, "auto", "--ptq-rounding", "qdrop"),
    "W4A4-ends8 auto": ends8(4, "auto"),
    "W4A4-ends8 auto, re-estimated": ends8(4, "auto", "--ptq-bn-reestimation"),
    "W4A4-ends8 auto, adaround": ends8(4, "auto", "--ptq-rounding", "adaround"),
    "W4A4-ends8 auto, brecq": ends8(4, "auto", "--ptq-rounding", "brecq"),
    "W4A4-ends8 auto, qdrop": ends8(4, "auto", "--ptq-rounding", "qdrop"),
    "W3A3-ends8 auto": ends8(3, "auto"),
    "W3A3-ends8 auto, brecq": ends8(3, "auto", "--ptq-rounding", "brecq"),
    "W3A3-ends8 auto, qdrop": ends8(3, "auto", "--ptq-rounding", "qdrop"),
    "W8A8 without images": uniform(8, 8, "none", "--ptq-data-free"),
}


def command(case: Sequence[str], model: Sequence[str], stats: Path) -> list[str]:
    """The command line of a case with the statistics in a file."""
    if case[0] != "ends8":
        given = [] if "--ptq-data-free" in case else ["--qe-stats-file", str(stats)]
        return [*model, "--quantize-eval", *given, *case]
    file = Path(f"ends8_{case[1]}_{case[2]}.yaml")
    file.write_text(YAML.format(bits=case[1], acts=case[2], wts="none", stats=stats))
    return [*model, "--quantize-eval", "--qe-config-file", str(file), *case[3:]]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("accuracy.csv"))
    args = parser.parse_args()
    shared, results = args.shared.resolve(), args.results.resolve()
    done = _read(results)
    checkpoint = shared / "checkpoints" / "resnet20_cifar_dense.pth.tar"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for seed in args.seeds:
            flags = ["-a", "resnet20_cifar", "--resume-from", str(checkpoint), str(shared / "data" / "cifar10")]
            model = [*flags, "--seed", str(seed), "--cpu", "-j", "0", "-p", "100000"]
            missing = [case for case in args.cases if (case, seed) not in done]
            if missing:
                run([*model, "--qe-calibration", "0.2014", "--qe-histograms"])
            for case in missing:
                start = time.monotonic()
                row = run(command(CASES[case], model, Path("stats/resnet20_cifar_cifar10.yaml").resolve()))
                done[case, seed] = {**row, "seconds": time.monotonic() - start}
                _append(results, case, seed, done[case, seed])
    _print(args.cases, args.seeds, done)


def _read(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row.pop("case"), int(row.pop("seed"))): {key: float(value) for key, value in row.items()} for row in rows}


def _append(path: Path, case: str, seed: int, row: dict[str, float]) -> None:
    fields = {"case": case, "seed": seed, **row}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(fields))
        if new:
            writer.writeheader()
        writer.writerow(fields)


def _print(cases: Sequence[str], seeds: Sequence[int], done: dict[tuple[str, int], dict[str, float]]) -> None:
    table = []
    for case in cases:
        rows = [done[case, seed] for seed in seeds if (case, seed) in done]
        top1 = [row["top1"] for row in rows]
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        agree = 100 - mean["changed"]
        cells = [f"{mean['top1']:.2f}", f"{min(top1):.2f} .. {max(top1):.2f}", f"{mean['loss']:.4f}", f"{agree:.2f}"]
        table.append([case, len(rows), *cells, f"{mean['seconds']:.0f}"])
    headers = ["case", "seeds", "Top1", "lowest .. highest", "loss", "agrees with FP32 %", "seconds"]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(main())
