"""Bytes that reach new branches of what reads pickles, or YAML: none may be answered by anything but a sentence.

    pip install atheris
    python benchmarks/fuzz_guided.py unpickle|yaml --minutes 10 [--failing FOLDER]

Guided by coverage (atheris, libFuzzer), where `fuzz.py` draws cases of a kind. A pickle is read as `data.pkl` of a
checkpoint whose storages are empty. It ends with libFuzzer's count of runs; what breaks the law, takes longer than five
seconds or more than 1.5 GB in all is written to the folder, and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["qlib.checkpoint.unpickle", "qlib.checkpoint.tensors", "qlib.yaml_tree"]):
    from qlib.checkpoint.tensors import Unsupported, with_tensors
    from qlib.checkpoint.unpickle import Refused, unpickle
    from qlib.errors import ConfigError
    from qlib.yaml_tree import parse_yaml


def read_pickle(data: bytes) -> None:
    """Reads a pickle and makes its tensors."""
    with contextlib.suppress(Refused, Unsupported, pickle.UnpicklingError):
        with_tensors(unpickle(io.BytesIO(data)), lambda *_: bytearray())


def read_yaml(data: bytes) -> None:
    """Reads a YAML file, decoded as one is."""
    with contextlib.suppress(ConfigError):
        parse_yaml(data.decode("utf-8", "replace"), "a.yaml")


READERS: dict[str, Callable[[bytes], None]] = {"unpickle": read_pickle, "yaml": read_yaml}


def seeds(kind: str, folder: Path) -> None:
    """Files to begin with: what torch writes, or the schedules."""
    if kind == "yaml":
        for file in (ROOT / "schedules").glob("*.yaml"):
            (folder / file.name).write_bytes(file.read_bytes()[:4000])
        return
    for number, value in enumerate([{"a": [1, (2.5, None)]}, {("b",): {"c"}}, [True, b"d" * 300, "e" * 300, 1 << 70]]):
        for protocol in (0, 2, 4):
            (folder / f"{number}-{protocol}").write_bytes(pickle.dumps(value, protocol))


def main() -> None:
    """Runs until the time is over; libFuzzer ends the process itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(READERS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--failing", type=Path, default=Path("failing"))
    args = parser.parse_args()
    args.failing.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        seeds(args.kind, Path(folder))
        limits = [f"-max_total_time={round(60 * args.minutes)}", "-timeout=5", "-rss_limit_mb=1500", "-max_len=8192"]
        atheris.Setup([sys.argv[0], folder, *limits, f"-artifact_prefix={args.failing}/"], READERS[args.kind])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
