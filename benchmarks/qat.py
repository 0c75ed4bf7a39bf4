"""Quantization-aware training of the resnet20 of CIFAR-10, through the command line and the files in schedules/.

    python benchmarks/qat.py ../shared [--cases lsq_4bit ...] [--seeds 3] [--results qat.csv]

Takes the folder that holds `data` and `checkpoints`. Each case trains on the 5,085 training images and is measured on
the 1,017 validation images after its last epoch, in integers; no epoch is chosen by them. A case that is in the
results file is not run again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from tabulate import tabulate

from qlib.cli import main as compress

SCHEDULES = Path(__file__).resolve().parents[1] / "schedules"
CASES = {
    "lsq_4bit": "--epochs 10 -b 128 --lr 0.01",
    "lsq_3bit": "--epochs 10 -b 64 --lr 0.002",
    "lsq_2bit": "--epochs 30 -b 64 --lr 0.002",
    "pact_4bit": "--epochs 10 -b 128 --lr 0.01",
    "dorefa_4bit": "--epochs 10 -b 128 --lr 0.01",
    "ternary_weights": "--epochs 10 -b 128 --lr 0.02",
    "binary_weights": "--epochs 20 -b 128 --lr 0.02",
}


def run(words: str) -> dict[str, str]:
    """Trains, and takes the last epoch's results from what is printed."""
    output, start = io.StringIO(), time.monotonic()
    with redirect_stdout(output):
        code = compress(words.split())
    text = output.getvalue()
    if code != 0:
        sys.exit(text)
    top1, loss = re.findall(r"==> Top1: ([\d.]+)    Top5: [\d.]+    Loss: ([\d.]+)", text)[-1]
    differ = re.findall(r"differ from those of training: ([\d.]+) %", text)[-1]
    return {"top1": top1, "loss": loss, "differ": differ, "seconds": f"{time.monotonic() - start:.0f}"}


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("qat.csv"))
    args = parser.parse_args()
    shared, results = args.shared.resolve(), args.results.resolve()
    before = csv.DictReader(results.open(newline="")) if results.exists() else ()
    done = {(row["case"], int(row["seed"])): row for row in before}
    asked = [(case, seed) for case in args.cases for seed in range(args.seeds)]
    checkpoint = shared / "checkpoints" / "resnet20_cifar_dense.pth.tar"
    base = f"-a resnet20_cifar --exp-load-weights-from {checkpoint} {shared / 'data' / 'cifar10'} --vs 0 --cpu -j 0"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case, seed in asked:
            if (case, seed) not in done:
                words = f"{base} {CASES[case]} --seed {seed} --compress {SCHEDULES / f'qat_{case}.yaml'} -p 1000"
                done[case, seed] = {"case": case, "seed": str(seed), **run(words)}
                with results.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(done[case, seed]))
                    writer.writeheader()
                    writer.writerows(done.values())
    rows = [list(done[each].values()) for each in asked]
    headers = ["schedule", "seed", "Top1", "loss", "integers differ from training %", "seconds"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
