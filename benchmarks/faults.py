"""Faults at each call that changes the disk, of a calibration, an epoch of training and an export: how each run ends.

    python benchmarks/faults.py [--every 1]

For each call of each run: the disk is full, read-only or broken from there on, no file can be opened, or the run is
killed. Each file that is left is whole, and the same command then makes the same bytes, else this ends with what is
wrong. `tests/cli/test_faults.py` has a part of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from faults import FAULTS, WORDS, Case, quick


def main() -> None:
    """Prints a row for each run and fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="calls from one that is tried to the next")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with quick():
        for name in WORDS:
            with tempfile.TemporaryDirectory() as folder:
                case = Case.of(name, Path(folder))
                for what, fault in FAULTS.items():
                    calls = range(1, case.calls(fault) + 1, args.every)
                    ends = Counter(case.check(fault, at) for at in calls)
                    rows.append([name, what, len(calls), ends["told"], ends["done"], ends["killed"]])
                print(
                    f"{name}: {len(case.same)} states from which the same command made the same bytes", file=sys.stderr
                )
    headers = ["run", "fault", "calls", "one sentence, exit code 2", "no harm, exit code 0", "killed"]
    print(tabulate(rows, headers, tablefmt="github"))


if __name__ == "__main__":
    main()
