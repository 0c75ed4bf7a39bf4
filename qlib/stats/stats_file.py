"""Activation statistics as a YAML file, in Distiller's format with a header of our own.

::

    qlib_stats: {version: 1, arch: resnet20_cifar, weights: <hash>, hash: <hash>, ...}    absent in a file of Distiller
    conv1:
      inputs:
        0: {min: ., max: ., avg_min: ., avg_max: ., mean: ., std: ., b: ., shape: (128, 3, 32, 32), total_numel: .,
            samples: .}
      output: {min: ., ...}

The hash is that of the file without it, so that no number changes in silence; a file from before it has none.
Histograms, where they were collected, lie in a `.safetensors` file beside it, which the header names by its hash.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from qlib.errors import ConfigError, StatsError, did_you_mean
from qlib.files import write_text
from qlib.stats.histogram import Histogram
from qlib.stats.histogram_file import content_hash, histogram_bytes, histogram_path, read_histograms, write_histograms
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats
from qlib.values import whole
from qlib.yaml_tree import Node, load_yaml

__all__ = ["check_fingerprint", "check_layers", "read_stats", "write_stats"]

_HEADER = "qlib_stats"
_HISTOGRAMS, _HASH = "histograms", "hash"
_VERSION = 1
_HEADER_KEYS = ("version", "arch", "weights", "dataset", "split", "samples", "corrections", _HISTOGRAMS, _HASH)
_FLOATS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")
_KEYS = (*_FLOATS, "shape", "total_numel", "samples")
_COUNT = whole(0)
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[a-z_][\w.]*", re.IGNORECASE | re.ASCII)


def write_stats(path: str | Path, stats: ModelStats) -> None:
    """Writes the file, whole or not at all; its folder is made.

    Histograms go to a file beside it, first. The same statistics give the same bytes, and every number reads back as
    the same number.

    Raises:
        StatsError: a value is NaN or infinite; the sentence names the layer.
        OutputError: the file cannot be written.
    """
    path, histograms = Path(path), histogram_bytes(stats.layers)
    text = _text_of(stats, None if histograms is None else content_hash(histograms))
    if histograms is not None:
        write_histograms(histogram_path(path), histograms)
    write_text(path, text, "statistics", parents=True)


def _text_of(stats: ModelStats, histograms: str | None) -> str:
    """The file's text, with the hash of what it would be without one."""
    return "".join(_lines(stats, histograms, _own_hash(stats, histograms)))


def _own_hash(stats: ModelStats, histograms: object) -> str:
    return content_hash("".join(_lines(stats, histograms)).encode())


def _lines(stats: ModelStats, histograms: object, own_hash: str | None = None) -> Iterator[str]:
    yield f"{_HEADER}:\n  version: {_VERSION}\n"
    named: dict[str, object] = {} if histograms is None else {_HISTOGRAMS: histograms}
    named |= {} if own_hash is None else {_HASH: own_hash}
    for key, value in {**stats.fingerprint, **named}.items():
        yield f"  {_text(key)}: {value if isinstance(value, int) else json.dumps(value, ensure_ascii=False)}\n"
    for name, layer in stats.layers.items():
        yield f"{_text(name)}:\n  inputs:{'' if layer.inputs else ' {}'}\n"
        for index, record in enumerate(layer.inputs):
            yield f"    {index}:\n"
            yield from _record_lines(f"input {index} of layer {name!r}", record, " " * 6)
        yield "  output:\n"
        yield from _record_lines(f"the output of layer {name!r}", layer.output, " " * 4)


def _record_lines(what: str, record: TensorStats, indent: str) -> Iterator[str]:
    for key in _FLOATS:
        value = getattr(record, key)
        if value is None:
            continue
        if not math.isfinite(value):
            raise StatsError(
                f"{key} of {what} is {value}; statistics must be finite: look for a broken weight or image"
            )
        yield f"{indent}{key}: {_number(value)}\n"
    yield f"{indent}shape: {tuple(record.shape)}\n"
    yield f"{indent}total_numel: {record.count}\n"
    yield f"{indent}samples: {record.samples}\n"


def _number(value: float) -> str:
    """The shortest text that reads back as the same number, as YAML 1.1 wants it: with a point.

    >>> _number(0.1), _number(1e-05), _number(-3)
    ('0.1', '1.0e-05', '-3.0')
    """
    text = repr(float(value))
    return text if "." in text else text.replace("e", ".0e")


def _text(key: str) -> str:
    """A key, quoted where YAML would not take it for text.

    >>> print(_text("layer1.0.conv1"), _text("0"), _text("on"))
    layer1.0.conv1 "0" "on"
    """
    return key if _PLAIN.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def read_stats(path: str | Path) -> ModelStats:
    """Reads our files and Distiller's.

    What a Distiller file does not hold is derived: `samples` from total_numel and shape; without total_numel, `count`
    and `samples` are those of the first batch. A module that Distiller saw but never ran is left out. Where the file
    of the histograms is gone, the statistics are without them.

    Raises:
        StatsError: the file cannot be read or is not of this format, or holds NaN or infinity; with `file:line`. Or
            the histograms beside it are not those it names.
    """
    try:
        root = load_yaml(path)
    except ConfigError as error:
        raise StatsError(f"{error}; collect the statistics again with --qe-calibration") from None
    layers = dict(_mapping(root, "the file"))
    header = layers.pop(_HEADER, None)
    read = {name: _layer(name, node) for name, node in layers.items()}
    found = {name: layer for name, layer in read.items() if layer is not None}
    if not found:
        raise StatsError(f"{root.where}: the file holds no statistics; collect them with --qe-calibration")
    fingerprint = {} if header is None else _fingerprint(header)
    written = fingerprint.pop(_HASH, None)
    expected, beside = fingerprint.pop(_HISTOGRAMS, None), histogram_path(Path(path))
    stats = ModelStats(found, fingerprint)
    if written is not None and written != _own_hash(stats, expected):
        raise StatsError(
            f"the statistics in {path} were changed after they were collected; collect them again with"
            f" --qe-calibration, or delete the line {_HASH!r} in their header to use them as they are"
        )
    if expected is not None and beside.exists():
        return replace(stats, layers=_with_histograms(found, read_histograms(beside, str(expected), Path(path))))
    return stats


def _with_histograms(
    layers: Mapping[str, LayerStats], histograms: Mapping[str, tuple[list[Histogram | None], Histogram | None]]
) -> dict[str, LayerStats]:
    """The records with their histograms; a layer that was added by hand has none."""
    joined = dict(layers)
    for name, (inputs, output) in histograms.items():
        layer = layers.get(name)
        if layer is not None and len(inputs) == len(layer.inputs):
            records = (replace(each, histogram=one) for each, one in zip(layer.inputs, inputs, strict=True))
            joined[name] = LayerStats(tuple(records), replace(layer.output, histogram=output))
    return joined


def check_layers(stats: ModelStats, known: Collection[str], source: str) -> None:
    """Checks that statistics are of layers that the model has, those `known`. Raises StatsError naming others.

    >>> from qlib.stats.tensor_stats import EMPTY
    >>> check_layers(ModelStats({"conv": LayerStats((), EMPTY)}), ["conv1"], "a.yaml")
    Traceback (most recent call last):
    qlib.errors.StatsError: a.yaml holds statistics of 1 layer that the model does not have (conv); give those of this \
model, or collect them again with --qe-calibration
    """
    unknown = [name for name in stats.layers if name not in known]
    if unknown:
        listed = ", ".join(unknown[:3]) + ", ..." * (len(unknown) > 3)
        count = f"{len(unknown)} layer{'s' * (len(unknown) > 1)}"
        raise StatsError(
            f"{source} holds statistics of {count} that the model does not have ({listed}); give those of this model,"
            " or collect them again with --qe-calibration"
        )


def check_fingerprint(stats: ModelStats, arch: str, weights_hash: str, corrections: str = "") -> None:
    """Checks that statistics are of this model; those without a fingerprint (Distiller's) pass.

    `corrections` are those of the float model, with which the statistics were collected.

    >>> check_fingerprint(ModelStats({}, {"arch": "vgg11"}), "vgg11", "c0ffee")
    >>> check_fingerprint(ModelStats({}, {"arch": "vgg11"}), "resnet18", "c0ffee")
    Traceback (most recent call last):
    qlib.errors.StatsError: the statistics are of another model (arch 'vgg11', this one is 'resnet18'); collect them \
again with --qe-calibration

    Raises:
        StatsError: naming what differs.
    """
    this = {"arch": arch, "weights": weights_hash}
    if stats.fingerprint.get("corrections", "") != corrections:
        raise StatsError(
            f"the statistics were collected with the corrections {stats.fingerprint.get('corrections', 'none')!r}, and"
            f" this run has {corrections or 'none'!r}; collect them again with --qe-calibration and these --ptq flags"
        )
    different = [
        f"{key} {stats.fingerprint[key]!r}, this one is {value!r}"
        for key, value in this.items()
        if stats.fingerprint.get(key, value) != value
    ]
    if different:
        reason = "; ".join(different)
        raise StatsError(f"the statistics are of another model ({reason}); collect them again with --qe-calibration")


def _fingerprint(header: Node) -> dict[str, str | int]:
    entries = dict(_mapping(header, _HEADER))
    _known(header, _HEADER_KEYS, _HEADER)
    version = entries.pop("version", None)
    if version is None or version.value != _VERSION:
        where = (version or header).where
        raise StatsError(f"{where}: {_HEADER} version is {version}; this program reads version {_VERSION}: update it")
    fingerprint: dict[str, str | int] = {}
    for key, node in entries.items():
        if isinstance(node.value, bool) or not isinstance(node.value, (str, int)):
            raise StatsError(f"{node.where}: {key} is {node}; allowed: text or a whole number")
        fingerprint[key] = node.value
    return fingerprint


def _layer(name: str, node: Node) -> LayerStats | None:
    """The statistics of a layer; None if it was never run."""
    entries = _mapping(node, f"layer {name!r}")
    _known(node, ("inputs", "output"), f"layer {name!r}")
    if "output" not in entries:
        raise StatsError(f"{node.where}: layer {name!r} lacks 'output'; collect the statistics again")
    output = _record(f"the output of layer {name!r}", entries["output"])
    inputs = _mapping(entries["inputs"], f"inputs of layer {name!r}") if "inputs" in entries else {}
    for index, key in enumerate(inputs):
        if key != str(index):
            where = entries["inputs"].where_key(key)
            raise StatsError(f"{where}: input {key!r} of layer {name!r} is out of order; inputs are numbered 0, 1, ...")
    records = tuple(_record(f"input {key} of layer {name!r}", record) for key, record in inputs.items())
    return None if output.min == sys.float_info.max == -output.max else LayerStats(records, output)


def _record(what: str, node: Node) -> TensorStats:
    entries = _mapping(node, what)
    _known(node, _KEYS, what)
    values = {key: _float(f"{key} of {what}", entries[key]) for key in _FLOATS if key in entries}
    for key in ("min", "max"):
        if key not in values:
            raise StatsError(f"{node.where}: {what} lacks {key!r}; collect the statistics again")
    unused = values["min"] == sys.float_info.max == -values["max"]
    if values["min"] > values["max"] and not unused:
        where = node.where_key("min")
        raise StatsError(f"{where}: min {values['min']} of {what} is above max {values['max']}; collect again")
    for key in ("std", "b"):
        if values.get(key, 0.0) < 0:
            raise StatsError(f"{node.where_key(key)}: {key} of {what} is {values[key]}; it cannot be negative")
    shape = _shape(what, entries["shape"]) if "shape" in entries else ()
    count = _count(what, "total_numel", entries, math.prod(shape))
    samples = _count(what, "samples", entries, count // max(1, math.prod(shape[1:])))
    minimum, maximum = values.pop("min"), values.pop("max")
    record = TensorStats(count=count, samples=samples, min=minimum, max=maximum, shape=shape)
    return replace(record, **values)  # type: ignore[arg-type]


def _float(what: str, node: Node) -> float:
    value = node.value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise StatsError(f"{node.where}: {what} is {node}; it must be a number")
    if not math.isfinite(value):
        raise StatsError(f"{node.where}: {what} is {value}; statistics must be finite: collect them again")
    return float(value)


def _count(what: str, key: str, entries: Mapping[str, Node], absent: int) -> int:
    if key not in entries:
        return absent
    node = entries[key]
    try:
        return int(_COUNT.read(node.value))
    except ValueError:
        raise StatsError(f"{node.where}: {key} of {what} is {node}; it must be {_COUNT.allowed}") from None


def _shape(what: str, node: Node) -> tuple[int, ...]:
    """`(128, 3, 32, 32)`; empty text where a module was never run."""
    text = "" if node.value is None else node.value
    if not isinstance(text, str) or not re.fullmatch(r"(\((\d+(, ?\d+)*,?)?\))?", text, re.ASCII):
        raise StatsError(f"{node.where}: shape of {what} is {node}; it must be like (128, 3, 32, 32)")
    return tuple(int(size) for size in re.findall(r"\d+", text))


def _mapping(node: Node, what: str) -> Mapping[str, Node]:
    if node.mapping is None:
        raise StatsError(f"{node.where}: {what} is {node}, not a mapping; this is no statistics file")
    return node.mapping


def _known(node: Node, allowed: tuple[str, ...], what: str) -> None:
    for key in node.mapping or {}:
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            raise StatsError(
                f"{node.where_key(key)}: unknown key {key!r} in {what}; allowed: {', '.join(allowed)}{hint}"
            )
