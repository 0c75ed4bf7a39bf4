"""Histograms as a `.safetensors` file beside the statistics they belong to.

One row of `counts` after another; a histogram that several records share is held once. The metadata tell which
record has which::

    {"version": 1, "layers": {"conv1": {"inputs": [0], "output": 1}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, save

from qlib.errors import StatsError
from qlib.files import write_whole
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import LayerStats

__all__ = ["content_hash", "histogram_bytes", "histogram_path", "read_histograms", "write_histograms"]

LayerHistograms: TypeAlias = "tuple[list[Histogram | None], Histogram | None]"

_KEY, _VERSION = "qlib_histograms", 1


def histogram_path(stats_path: Path) -> Path:
    """Where the histograms of a statistics file lie.

    >>> histogram_path(Path("stats/vgg11_imagenet.yaml")).name
    'vgg11_imagenet.safetensors'
    """
    return stats_path.with_suffix(".safetensors")


def histogram_bytes(layers: Mapping[str, LayerStats]) -> bytes | None:
    """The file's content; None where no record has a histogram. The same histograms give the same bytes."""
    rows: dict[Histogram, int] = {}

    def row(histogram: Histogram | None) -> int | None:
        return None if histogram is None else rows.setdefault(histogram, len(rows))

    index = {
        name: {"inputs": [row(record.histogram) for record in layer.inputs], "output": row(layer.output.histogram)}
        for name, layer in layers.items()
    }
    if not rows:
        return None
    table = [(each.first, each.exponent, len(each.counts), each.zeros) for each in rows]
    tensors = {
        "table": np.array(table, dtype=np.int64),
        "counts": np.concatenate([np.array(each.counts, dtype=np.int64) for each in rows]),
    }
    return save(tensors, {_KEY: json.dumps({"version": _VERSION, "layers": index})})


def content_hash(content: bytes) -> str:
    """The hash by which a statistics file names its histograms."""
    return hashlib.sha256(content).hexdigest()[:16]


def write_histograms(path: Path, content: bytes) -> None:
    """Writes the file whole or not at all; its folder is made. Raises OutputError where it cannot be written."""
    write_whole(path, lambda file: file.write_bytes(content), "histograms", parents=True)


def read_histograms(path: Path, expected: str, stats_path: Path) -> dict[str, LayerHistograms]:
    """Layer name -> the histograms of its inputs and of its output, from the file beside `stats_path`.

    Raises:
        StatsError: the file cannot be read, or is not the one whose hash is `expected`.
    """
    remedy = "collect both again with --qe-calibration and --qe-histograms"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StatsError(f"the histograms in {path} cannot be read: {error.strerror or error}; {remedy}") from None
    if content_hash(content) != expected:
        raise StatsError(f"{path} does not hold the histograms of {stats_path}, which names other ones; {remedy}")
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()[_KEY])
    if header["version"] != _VERSION:
        raise StatsError(f"{path} is of version {header['version']}; this program reads version {_VERSION}: update it")
    tensors = load(content)
    found, start = list[Histogram](), 0
    for first, exponent, bins, zeros in tensors["table"].tolist():
        found.append(Histogram.from_bins(first, exponent, tensors["counts"][start : start + bins], zeros))
        start += bins

    def histogram(row: int | None) -> Histogram | None:
        return None if row is None else found[row]

    return {
        name: ([histogram(row) for row in layer["inputs"]], histogram(layer["output"]))
        for name, layer in header["layers"].items()
    }
