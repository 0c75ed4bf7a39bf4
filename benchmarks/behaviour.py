"""What a fixed list of command lines answers, to the last digit: the same before and after code was moved.

    python benchmarks/behaviour.py --root OTHER_CHECKOUT --out before
    python benchmarks/behaviour.py --out after
    diff -r before after

For each command line, `--out` gets a file with its exit code, what it printed (without times and names of folders),
the scores in `metrics.csv`, and hashes of the plan, of the other tables and of all weights that it wrote. All run on
the digits that come with scikit-learn, with one thread. `--only` names some of them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
STATS = "--qe-stats-file stats/digits_cnn_digits.yaml"
HISTOGRAMS = "--qe-stats-file ../calibrate_histograms/stats/digits_cnn_digits.yaml"
FOUR = "--qe-bits-acts 4 --qe-bits-wts 4 --qe-mode asym_u --qe-per-channel"
TRAIN = "--epochs 1 --lr 0.01 -b 64"

CASES = {
    "calibrate": "--qe-calibration 0.2",
    "calibrate_histograms": "--qe-calibration 0.2 --qe-histograms",
    "evaluate": "--evaluate --confusion",
    "8_bits_sym": f"--qe {STATS}",
    "8_bits_asym_u": f"--qe --qe-mode asym_u {STATS}",
    "8_bits_per_channel": f"--qe --qe-mode asym_u --qe-per-channel {STATS}",
    "8_bits_dynamic": "--qe --qe-dynamic --qe-mode asym_u",
    "12_bits": "--qe --qe-calibration 0.2 --qe-bits-acts 12 --qe-mode asym_u",
    "4_bits": f"--qe {FOUR} {STATS}",
    "4_bits_yaml": "--qe --qe-config-file schedules/digits_4bit.yaml",
    "4_bits_clipped": f"--qe {FOUR} --qe-clip-acts auto --qe-clip-wts mse {HISTOGRAMS}",
    "4_bits_no_clip": f"--qe {FOUR} --qe-clip-acts n_std --qe-clip-n-stds 3 --qe-no-clip-layers fc {STATS}",
    "4_bits_pow2": f"--qe {FOUR} --qe-clip-acts kl --qe-scale pow2 {HISTOGRAMS}",
    "4_bits_brecq": f"--qe {FOUR} {STATS} --ptq-rounding brecq --ptq-iterations 20 --ptq-images 64",
    "4_bits_gptq": f"--qe {FOUR} {STATS} --ptq-rounding gptq --ptq-bias-correction empirical --ptq-images 64",
    "4_bits_qdrop": f"--qe {FOUR} {STATS} --ptq-rounding qdrop --ptq-iterations 20 --ptq-images 64"
    " --ptq-bn-reestimation",
    "data_free": "--qe --qe-mode asym_u --ptq-data-free --ptq-equalize --ptq-absorb-bias"
    " --ptq-bias-correction analytic",
    "equalized": "--qe --qe-calibration 0.2 --ptq-equalize --ptq-smooth 0.5 --qe-scale-approx-bits 12",
    "reduce_range": f"--qe --qe-reduce-range all {STATS}",
    "budget": f"--qe {FOUR} --qe-budget 4.5bits --sense-images 64 {HISTOGRAMS}",
    "lapq": f"--qe {FOUR} --qe-lapq --lapq-maxiter 1 --lapq-maxfev 20 --lapq-images 64 {HISTOGRAMS}",
    "sensitivity": f"--sense quant --sense-images 64 --sense-bits 2,4 --qe-mode asym_u {STATS}",
    "check": f"--check --qe --qe-mode asym_u {STATS}",
    "check_yaml": "--check --qe --qe-config-file schedules/digits_4bit.yaml",
    "check_schedule": "--check --compress schedules/qat_lsq_4bit.yaml",
    "summary_compute": "--summary compute",
    "summary_modules": "--summary sparsity --summary modules",
    "encodings": f"--qe --qe-mode asym_u {STATS} --export-encodings ort,tensorrt,aimet",
    "export": f"--qe --qe-mode asym_u {STATS} --export-onnx int8.onnx --verify 200 --engine onnxruntime",
    "export_4_bits": f"--qe {FOUR} {STATS} --export-onnx int4.onnx --verify 64",
    "export_float": "--export-onnx float.onnx --engine onnxruntime --evaluate",
    "train": TRAIN,
    "train_lsq": f"--compress schedules/qat_lsq_4bit.yaml {TRAIN}",
    "train_linear": f"--compress schedules/qat_linear_8bit.yaml {TRAIN}",
    "train_binary": f"--compress schedules/qat_binary_weights.yaml {TRAIN}",
    "train_distilled": f"--compress schedules/qat_lsq_3bit.yaml {TRAIN}",
    "train_teacher": f"--kd-teacher self --kd-temp 4 {TRAIN}",
    "wrong_flag": "--qe --qe-clip-act auto",
    "wrong_value": "--qe --qe-clip-acts otto",
    "wrong_together": "--qe --qe-dynamic --qe-clip-acts kl --ptq-rounding brecq",
    "wrong_yaml": "--qe --qe-config-file schedules/qat_lsq_4bit.yaml",
}

_CHANGING = (
    (r"\d{4}\.\d\d\.\d\d-\d{6}(-\d+)?|\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d\S*", "DATE"),
    (r"/\S*/logs/", "LOGS/"),
    (r"\b\d+(\.\d+)? s\b|\bTime \d+\.\d+|\d+\.\d+ seconds|[\d,.]+ images/s|ETA \S+|\d+:\d\d(:\d\d)?", "T"),
    (r"git \S+|commit \S+|checkout \S+", "GIT"),
)


def steady(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, word in _CHANGING:
        text = re.sub(pattern, word, text)
    return text


def onnx_hash(path: Path) -> str:
    """The hash of a file's initializers, by name."""
    import onnx
    from onnx import numpy_helper

    digest = hashlib.sha256()
    for tensor in sorted(onnx.load(path).graph.initializer, key=lambda each: each.name):
        digest.update(tensor.name.encode() + numpy_helper.to_array(tensor).tobytes())
    return digest.hexdigest()[:16]


def tensors_hash(path: Path) -> str:
    """The hash of all tensors in a checkpoint, by their places."""
    import torch
    from safetensors.torch import load_file

    digest = hashlib.sha256()

    def add(place: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{place} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{place}.{key}", item)

    add("", load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True))
    return digest.hexdigest()[:16]


def scores(path: Path) -> list[str]:
    """The rows of `metrics.csv`, without seconds."""
    with path.open(newline="") as file:
        return [
            " ".join(f"{key}={value}" for key, value in row.items() if "second" not in key)
            for row in csv.DictReader(file)
        ]


def left_behind(folder: Path) -> list[str]:
    """A line for each file of a run that says what it computed."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        name = steady(str(path.relative_to(folder)))
        if path.name in ("metrics.csv", "training.csv"):
            lines += [f"{name}: {line}" for line in scores(path)]
        elif path.suffix == ".onnx":
            lines.append(f"{name}: weights {onnx_hash(path)}")
        elif path.suffix in (".csv", ".json", ".cache", ".flatbuffers", ".encodings", ".yaml"):
            text = steady(path.read_text())
            lines.append(f"{name}: {hashlib.sha256(text.encode()).hexdigest()[:16]}")
        elif path.suffix in (".tar", ".safetensors"):
            lines.append(f"{name}: tensors {tensors_hash(path)}")
        elif path.suffix not in (".log", ".txt") and "schedules" not in path.parts:
            lines.append(name)
    return sorted(lines)


def answer(root: Path, folder: Path, flags: str) -> str:
    """Runs one command line in its own folder."""
    folder.mkdir()
    shutil.copytree(root / "schedules", folder / "schedules")
    if STATS in flags or "digits_4bit.yaml" in flags:
        (folder / "stats").symlink_to(folder.parent / "calibrate" / "stats")
    words = ["-a", "digits_cnn", "--pretrained", "-j", "0", "--cpu", *shlex.split(flags)]
    done = subprocess.run(
        [sys.executable, str(root / "compress.py"), *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    text = f"$ {flags}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
    return steady(text.replace(str(folder), "FOLDER")) + "\n" + "\n".join(left_behind(folder)) + "\n"


def main() -> None:
    """Runs the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout whose compress.py runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the answers")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help="some of the command lines")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in CASES.items():
            needed = name.startswith("calibrate")  # the others read their statistics
            if args.only and name not in args.only and not needed:
                continue
            text = answer(args.root.resolve(), Path(scratch) / name, flags)
            (args.out / f"{name}.txt").write_text(text)
            print(f"{name}: {hashlib.sha256(text.encode()).hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main()
