"""The main job on scikit-learn's digits, without any download: `make demo`.

Calibrates a small network, evaluates it in FP32, in 8 bits, in 4 bits, and in 4 bits with a YAML file that keeps its
sensitive layers at 8; then exports the 8-bit one, proves that ONNX Runtime computes the same integers, and times it.
Every line that begins with $ can be typed as it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

from tabulate import tabulate

from qlib.cli import main

ROOT = Path(__file__).resolve().parent.parent
STATS = "stats/digits_cnn_digits.yaml"
FOUR_BITS = "--qe-bits-acts 4 --qe-bits-wts 4"
RUNS = {
    "FP32": "--evaluate",
    "8 bits": f"--quantize-eval --qe-mode asym_u --qe-stats-file {STATS}",
    "4 bits": f"--quantize-eval --qe-mode asym_u {FOUR_BITS} --qe-stats-file {STATS}",
    "4 bits, 8 where it matters": "--quantize-eval --qe-config-file schedules/digits_4bit.yaml",
}
DEPLOY = f"{RUNS['8 bits']} --export-onnx digits_int8.onnx --verify 500 --engine onnxruntime"
ROUNDS = 30


def compress(flags: str) -> tuple[str, dict[str, str]]:
    """Runs one command line; what it printed, and the last row of its metrics.csv, or nothing where it made none."""
    command = f"-a digits_cnn --pretrained -j 0 {flags}"
    print(f"$ python compress.py {command}", flush=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(shlex.split(command))
    printed = output.getvalue().strip()
    if code != 0:
        print(printed)
        sys.exit(code)
    metrics = Path(printed.rsplit("Log file for this run: ", 1)[1]).parent / "metrics.csv"
    if not metrics.exists():
        return printed, {}
    with metrics.open(newline="") as file:
        return printed, list(csv.DictReader(file))[-1]


def row(name: str, metrics: dict[str, str]) -> list[str]:
    """One line of the table."""
    top1, low, high, loss = (float(metrics[key]) for key in ("top1", "top1_low", "top1_high", "loss"))
    changed = f"{float(metrics['changed']):.1f} %" if metrics.get("changed") else ""
    return [name, f"{top1:.1f}", f"{low:.1f} to {high:.1f}", f"{loss:.4f}", changed]


def proof(printed: str) -> str:
    """What `--verify` found, without its line for each layer."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("integer layers:"))
    end = next(index for index, line in enumerate(lines) if line.startswith("verification:"))
    return "\n".join(lines[start : end + 1])


def speed_table() -> str:
    """Images a second, in turn: the float model in torch, and the exported file in ONNX Runtime."""
    import torch

    from qlib.data.datasets import open_dataset
    from qlib.deploy.session import open_session, run_session
    from qlib.models import create_model, find_model

    spec = find_model("digits_cnn")
    model = create_model(spec, pretrained=True)
    dataset = open_dataset("digits", None, "test", spec.transform, num_classes=10)
    images = torch.stack([dataset[index][0] for index in range(len(dataset))])
    session = open_session(Path("digits_int8.onnx"), exact=False)
    tasks = {"torch, FP32": lambda: model(images), "ONNX Runtime, int8": lambda: run_session(session, images)}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, task in tasks.items():
                start = time.perf_counter()
                task()
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    base = medians["torch, FP32"]
    rows = [[name, f"{len(images) / t:,.0f}", f"{base / t:.1f} x"] for name, t in medians.items()]
    return tabulate(rows, ["digits_cnn", "images / s", "speed"], tablefmt="psql", disable_numparse=True)


def demo() -> None:
    """Prints the commands, and tables of what they found."""
    os.chdir(ROOT)
    compress("--qe-calibration 0.2")
    rows = [row(name, compress(flags)[1]) for name, flags in RUNS.items()]
    headers = ["digits_cnn, 500 images", "Top1", "95 % interval", "Loss", "differs from FP32"]
    print("\n" + tabulate(rows, headers, tablefmt="psql", disable_numparse=True))
    print(
        "\nWhat each layer did: latest_log_dir/layer_quant_params.yaml. Edit it, pass it back with --qe-config-file.\n"
    )
    printed, metrics = compress(DEPLOY)
    print(f"\n{proof(printed)}\nTop1 in ONNX Runtime: {float(metrics['top1']):.1f}\n\n{speed_table()}")
    print("\nThe 8-bit model is digits_int8.onnx; what ran where: latest_log_dir/placement.csv, verify.csv.")


if __name__ == "__main__":
    demo()
