"""The same network made int8 by several tools, and their files compared on the same images.

    python benchmarks/peers.py ../shared [--networks squeezenet1_1 ...] [--rows NAME ...] [--results peers.csv]

Every tool is given the same float network, the same 200 training images of `data/imagenet-sample` and two threads.
What each makes is run by ONNX Runtime on the 800 validation images, in the session that does not saturate (`exact`):
Top1, loss and how many predictions are those of the float network. The time to make a file and the peak of memory are
those of a process of its own; latency is the ratio of medians to the float file, both in ONNX Runtime's default
session, in turn, batch 1. A row that is in the results file is not made again. A tool that is not installed (`pip
install 'qlib-compress[peers]'`), or whose file does not open, is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from qlib.cli import main as compress
from qlib.data.datasets import Split, open_dataset
from qlib.deploy.export import INPUT
from qlib.deploy.session import open_session
from qlib.metrics import Meter, compare
from qlib.models import find_model

_ROOT = Path(__file__).resolve().parents[1]
THREADS = 2

NETWORKS: dict[str, tuple[str, ...]] = {
    "squeezenet1_1": ("-a", "squeezenet1_1", "--exp-load-weights-from", "{shared}/checkpoints/squeezenet1_1.pth"),
    "efficientnet_lite0": ("-a", f"{_ROOT}/examples/efficientnet_lite.py:lite0"),
}
"""Name -> the flags of its float model."""

MODE = ("--qe-mode-acts", "asym_u", "--qe-mode-wts", "sym")
"""Weights with zero points are slow in ONNX Runtime."""
W8A8 = (*MODE, "--qe-per-channel")
RANGES = ("--qe-histograms", "--qe-clip-acts", "auto")
CORRECTED = ("--ptq-rounding", "gptq", "--ptq-bias-correction", "empirical")
OURS: dict[str, tuple[str, ...]] = {
    "ours, no flags but the mode": MODE,
    "ours, per channel": W8A8,
    "ours, auto ranges": (*W8A8, *RANGES),
    "ours, bias correction": (*W8A8, "--ptq-bias-correction", "empirical"),
    "ours, gptq, bias correction": (*W8A8, *CORRECTED),
    "ours, auto ranges, gptq, bias correction": (*W8A8, *RANGES, *CORRECTED),
    "ours, brecq": (*W8A8, "--ptq-rounding", "brecq"),
    "ours W4A8, gptq, bias correction": (*W8A8, "--qe-bits-wts", "4", *CORRECTED),
    "ours W4A8, auto ranges, gptq, bias correction": (*W8A8, "--qe-bits-wts", "4", *RANGES, *CORRECTED),
    "ours W4A8, brecq": (*W8A8, "--qe-bits-wts", "4", "--ptq-rounding", "brecq"),
}
"""Row -> its flags."""


def ours(row: str) -> Callable[[argparse.Namespace, Path], None]:
    """This project, from the float weights to the file."""

    def make(args: argparse.Namespace, path: Path) -> None:
        quantize = ("--qe", "--qe-calibration", "1.0", *OURS[row], "--etes", "0.01", "--export-onnx", str(path))
        _compress((*_model(args), *quantize))

    return make


def onnxruntime(method: str) -> Callable[[argparse.Namespace, Path], None]:
    """ONNX Runtime's `quantize_static`, per channel."""

    def make(args: argparse.Namespace, path: Path) -> None:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        prepared = path.with_suffix(".prepared.onnx")
        quant_pre_process(str(args.folder / "float.onnx"), str(prepared))
        quantize_static(
            *(str(prepared), str(path), _Reader(np.load(args.folder / "calibration.npy"))),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )

    return make


def nncf(**options: bool) -> Callable[[argparse.Namespace, Path], None]:
    """NNCF on the float file."""

    def make(args: argparse.Namespace, path: Path) -> None:
        import nncf
        import onnx

        images = np.load(args.folder / "calibration.npy")
        dataset = nncf.Dataset([image[None] for image in images], lambda image: {INPUT: image})
        model = nncf.quantize(onnx.load(args.folder / "float.onnx"), dataset, subset_size=len(images), **options)
        onnx.save(model, path)

    return make


class _Reader:
    """Gives images one by one, as `quantize_static` wants them."""

    def __init__(self, images: np.ndarray) -> None:
        self._rest = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._rest, None)
        return None if image is None else {INPUT: image[None]}


ROWS: dict[str, tuple[str, Callable[[argparse.Namespace, Path], None]]] = {
    "ONNX Runtime MinMax": ("onnxruntime", onnxruntime("MinMax")),
    "ONNX Runtime Percentile": ("onnxruntime", onnxruntime("Percentile")),
    "ONNX Runtime Entropy": ("onnxruntime", onnxruntime("Entropy")),
    "NNCF": ("nncf", nncf()),
    "NNCF, accurate bias": ("nncf", nncf(fast_bias_correction=False)),
    **{row: ("qlib", ours(row)) for row in OURS},
}
"""Row -> the package that it needs, and what makes the file."""


def _model(args: argparse.Namespace) -> tuple[str, ...]:
    flags = (each.format(shared=args.shared) for each in NETWORKS[args.network])
    return (*flags, str(args.shared / "data" / "imagenet-sample"), "-j", "0", "--cpu", "-p", "100000")


def _compress(flags: tuple[str, ...]) -> None:
    code = compress(list(flags))
    if code != 0:
        sys.exit(code)


def prepare(args: argparse.Namespace) -> None:
    """Writes the float file and the images that all rows share."""
    os.chdir(args.folder)
    _compress((*_model(args), "--export-onnx", str(args.folder / "float.onnx")))
    spec = find_model(NETWORKS[args.network][1])
    data = args.shared / "data" / "imagenet-sample"
    splits: tuple[tuple[str, Split], ...] = (("calibration", "train"), ("test", "val"))
    for name, split in splits:
        dataset = open_dataset(spec.dataset, data, split, spec.transform, num_classes=1000)
        np.save(args.folder / f"{name}.npy", np.stack([dataset[index][0].numpy() for index in range(len(dataset))]))
        np.save(args.folder / f"{name}_labels.npy", np.array(dataset.labels))


def predict(path: Path, folder: Path) -> Meter:
    """What a file computes for the test images."""
    session, meter = open_session(path), Meter()
    images, labels = np.load(folder / "test.npy", mmap_mode="r"), torch.from_numpy(np.load(folder / "test_labels.npy"))
    for start in range(0, len(images), 16):
        part = np.ascontiguousarray(images[start : start + 16])
        (logits,) = session.run(None, {session.get_inputs()[0].name: part})
        meter.add(torch.from_numpy(logits), labels[start : start + 16])
    return meter


def latency(path: Path, folder: Path, rounds: int = 30) -> float:
    """Seconds of the file over seconds of the float file: medians of rounds in which both run in turn."""
    image = np.load(folder / "test.npy", mmap_mode="r")[:1].copy()
    sessions = [open_session(each, exact=False) for each in (folder / "float.onnx", path)]
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for session, times in zip(sessions, spent, strict=True):
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: image})
            times.append(time.perf_counter() - start)
    return statistics.median(spent[1]) / statistics.median(spent[0])


def make(args: argparse.Namespace, row: str) -> dict[str, Any]:
    """One row: the file is made in a process of its own."""
    package, _ = ROWS[row]
    if importlib.util.find_spec(package) is None:
        return {"note": f"{package} is not installed"}
    path = args.folder / f"{row.replace(' ', '_').replace(',', '')}.onnx"
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    command = [sys.executable, __file__, str(args.shared), "--networks", args.network, "--make", row, str(args.folder)]
    done = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        return {"note": f"failed: {done.stderr.strip().splitlines()[-1][:80]}"}
    spent = json.loads(done.stdout.strip().splitlines()[-1])
    try:
        reference, result = (predict(each, args.folder).result() for each in (args.folder / "float.onnx", path))
    except Exception as error:
        return {**spent, "note": f"its file does not run: {' '.join(str(error).split())[:80]}"}
    same = compare(reference.predictions, result)
    return {
        "top1": result.top1,
        "loss": result.loss,
        "agreement": same.agreement,
        "mcnemar_p": same.p_value,
        **spent,
        "mb": path.stat().st_size / 1e6,
        "latency": latency(path, args.folder),
    }


def make_file(args: argparse.Namespace, row: str, path: Path) -> None:
    """What the process of a row does; the last line it prints is what it cost."""
    os.chdir(args.folder)
    torch.set_num_threads(THREADS)
    start = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        ROWS[row][1](args, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": time.monotonic() - start, "peak_gb": peak}))


COLUMNS = ("network", "row", "top1", "loss", "agreement", "mcnemar_p", "seconds", "peak_gb", "mb", "latency", "note")
_SHOWN = ("", "", "{:.3f}", "{:.4f}", "{:.2f}", "{:.3g}", "{:.0f}", "{:.1f}", "{:.2f}", "{:.2f}", "")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def _cells(row: dict[str, str]) -> Iterator[str]:
    for column, form in zip(COLUMNS, _SHOWN, strict=True):
        text = row.get(column) or ""
        yield form.format(float(text)) if form and text else text


def main() -> None:
    """Makes the rows that are missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=lambda text: Path(text).resolve())
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--results", type=Path, default=Path("peers.csv"))
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        args.network, args.folder = args.networks[0], Path(args.make[1])
        make_file(args, args.make[0], Path(args.make[2]))
        return
    results = args.results.resolve()
    for network in args.networks:
        done = {each["row"] for each in _read(results) if each["network"] == network}
        missing = [row for row in args.rows if row not in done]
        with tempfile.TemporaryDirectory() as folder:
            args.network, args.folder = network, Path(folder)
            if missing:
                prepare(args)
            for row in missing:
                _append(results, {"network": network, "row": row, **make(args, row)})
    table = [list(_cells(row)) for row in _read(results) if row["network"] in args.networks and row["row"] in args.rows]
    print(tabulate(table, COLUMNS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
