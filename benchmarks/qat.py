"""Quantization-aware training of the resnet20 of CIFAR-10, through the command line and the files in schedules/.

    python benchmarks/qat.py ../shared [--cases lsq_4bit ...] [--results qat.csv]

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
    "lsq_4bit": "--epochs 10 --lr 0.01",
    "lsq_3bit": "--epochs 10 --lr 0.01",
    "pact_4bit": "--epochs 10 --lr 0.01",
    "dorefa_4bit": "--epochs 10 --lr 0.01",
    "ternary_weights": "--epochs 10 --lr 0.02",
    "binary_weights": "--epochs 20 --lr 0.02",
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
    parser.add_argument("--results", type=Path, default=Path("qat.csv"))
    args = parser.parse_args()
    shared, results = args.shared.resolve(), args.results.resolve()
    done = {row["case"]: row for row in csv.DictReader(results.open(newline=""))} if results.exists() else {}
    checkpoint = shared / "checkpoints" / "resnet20_cifar_dense.pth.tar"
    base = (
        f"-a resnet20_cifar --exp-load-weights-from {checkpoint} {shared / 'data' / 'cifar10'} -b 128 --vs 0 --cpu -j 0"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case in args.cases:
            if case not in done:
                schedule = SCHEDULES / f"qat_{case}.yaml"
                done[case] = {"case": case, **run(f"{base} {CASES[case]} --compress {schedule} -p 1000")}
                with results.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(done[case]))
                    writer.writeheader()
                    writer.writerows(done.values())
    rows = [[each, *list(done[each].values())[1:]] for each in args.cases]
    headers = ["schedule", "Top1", "loss", "integers differ from training %", "seconds"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
