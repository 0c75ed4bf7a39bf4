"""Every kind of file that a run reads, truncated at 20 places and with 200 random flips of a byte.

    python benchmarks/damage.py [--cuts 20] [--flips 200] [--seed 0]

A damaged file is to be refused in one sentence, or to be read as what it was. The readers are called in this process.
Exit code 1 where a file is read as something else though its kind has a checksum, or where an exception is not ours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from damaged import CUTS, FLIPS, kinds, measure  # noqa: E402


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--cuts", CUTS), ("--flips", FLIPS), ("--seed", 0)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, good = [], True
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in kinds(Path(folder)).items():
            counts = measure(kind, args.cuts, args.flips, args.seed)
            known = [counts.pop(key, 0) for key in ("refused", "same", "other")]
            good &= not counts and not (kind.checked and known[2])
            rows.append([name, *known, sum(counts.values()), "; ".join(counts) or kind.why])
    headers = ["file", "refused", "read, the same", "read, another", "other exceptions", ""]
    print(tabulate(rows, headers, tablefmt="github"))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
