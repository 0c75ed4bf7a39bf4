"""Every torchvision classifier through the whole path: capture, fold, calibrate, quantize, evaluate, save, reload.

    python benchmarks/zoo.py [MODEL ...] [--data IMAGEFOLDER] [--results zoo.csv] [--table PAGE]

Weights are random (the path is tested, not accuracy). Each model runs in a process of its own. A model that is in the
results file is not run again, so a broken sweep goes on where it stood. The exit code is 1 when a model failed.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision
from rows import apart, append_row, read_rows, start_processes_with
from tabulate import tabulate
from torch import Tensor
from whole_path import ROUNDS, Row, check

from qlib.data.datasets import open_dataset
from qlib.models import ModelSpec, create_model, find_model, model_names
from qlib.models.names import family_of

IMAGES = 4
"""Images for calibration and for the integer model; the float graphs are compared on the first two."""

_ROOT = Path(__file__).resolve().parents[1]


def images_for(spec: ModelSpec, data: Path) -> Tensor:
    """The first images of an ImageFolder's validation split, or random ones where there is no such folder."""
    if not data.is_dir():
        return torch.randn(IMAGES, *spec.input_shape)
    dataset = open_dataset("imagefolder", data, "val", spec.transform, num_classes=None)
    return torch.stack([dataset[index][0] for index in range(IMAGES)])


def check_one(arch: str, data: Path, restore: bool) -> Row:
    """Checks one model."""
    torch.manual_seed(0)
    spec = find_model(arch)
    return check(arch, lambda: create_model(spec), images_for(spec, data), restore=restore)


def write_table(path: Path, rows: Iterable[Row], wanted: int) -> None:
    """Writes the table as Markdown."""
    rows = list(rows)
    good = [row for row in rows if not row.problems]
    cells = [
        [
            row.model,
            row.side,
            row.layers,
            f"{row.float_layers}: {row.float_kinds}" if row.float_layers else "0",
            f"{row.folded_error:.0e}",
            f"{row.sqnr_db:.1f}",
            f"{100 * row.macs_in_int8:.1f}",
            f"{row.differing} of {row.codes / 1e6:.1f} M",
            f"{row.float_differing} of {row.float_codes / 1e6:.1f} M" if row.float_codes else "",
            f"{row.fp32_mb:.1f} / {row.onnx_mb:.1f}",
            f"{row.fp32_ms:.0f} / {row.int8_ms:.0f}",
            row.problems or "ok",
        ]
        for row in rows
    ]
    headers = [
        *("model", "side", "layers", "in float", "folded", "SQNR dB", "% MACs int8", "codes that differ"),
        *("in float layers", "MB FP32 / int8", "ms FP32 / int8", "result"),
    ]
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    text = _INTRODUCTION.format(good=len(good), rows=len(rows), wanted=wanted, versions=versions, rounds=ROUNDS)
    table = tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    path.write_text(f"{text}\n{table}\n", encoding="utf-8")


_INTRODUCTION = """\
# All torchvision classifiers

{good} of {rows} models pass ({wanted} in all). Written by `python benchmarks/zoo.py`; {versions}, CPU.

Each model is captured, folded, quantized to 8 bits (asym_u activations, sym weights per channel, ranges of 4 images),
evaluated, saved, restored, exported to ONNX and verified against ONNX Runtime on the 4 images.
Weights are random, batch-norms and whatever starts at zero are randomized too: the table shows that the path works, and
says nothing of accuracy.

- *side*: height and width of the images. *layers*: after folding. *in float*: layers computed in float between integer
  tensors, by kind; `--check` and the log give the reason of each.
- *folded*: largest difference of the logits of the captured and folded graph from those of the model itself, relative
  to the largest logit (allowed: 1e-4). *SQNR*: of the logits of the 8-bit model against float; no part of *ok*.
- *% MACs int8*: multiply-accumulates that ONNX Runtime computes in integers.
- *codes that differ*: between our exact model and ONNX Runtime, in all tensors of layers that both compute in integers,
  each layer given the same input codes. *in float layers*: the same for layers that ONNX Runtime computes in float,
  where one step is allowed on at most 1e-3 of a layer's codes.
- *MB*: float weights and buffers; the ONNX file. *ms*: one image, torch eager in float and ONNX Runtime in int8, one
  thread each, medians of {rounds} on a shared machine (AVX2 without VNNI): an impression, not a benchmark.

*ok*: errors and codes are within these bounds; every layer in float is listed with its reason; images have different
logits; an image alone gives the same logits, to the last bit, as in a batch of 4; so does the saved checkpoint,
restored on a model with other weights (unless the sweep ran with `--no-restore`); the model whose codes are looked at
gives the very logits of the one that ships.

A folded graph beyond 1e-4 is compared again in float64, which tells wrong folding from rounding. There is one such
model: resnet152 (1.4e-4 in float32, 3e-13 in float64). With these weights it amplifies rounding: its own float32 logits
are 8e-5 from its float64 ones, and a change of the last bit of the input moves them as far. With torchvision's initial
weights and batch-norm statistics that are only moved a little, its folded graph is within 9e-7.

Low SQNR: deep random networks amplify the noise of 8 bits as they do rounding: a separate simulation in float, which
rounds to the same grids, loses as much (efficientnet_b0: 11.7 dB against 11.4 here; efficientnet_b5: 2.4 against 3.3).
"""


def main() -> int:
    """Runs the sweep, or one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in model_names() if family_of(name) == "torchvision_models"]
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all where none is given, which writes docs/zoo.md")
    parser.add_argument("--data", type=Path, default=_ROOT / "../shared/data/imagenet-sample", help="an ImageFolder")
    parser.add_argument("--results", type=Path, default=Path("zoo.csv"), help="results so far; delete it to start anew")
    parser.add_argument("--table", type=Path, help="where the table is written")
    parser.add_argument("--no-restore", action="store_true", help="do not restore and compare the saved checkpoint")
    args = parser.parse_args()
    page = args.table or (None if args.models else _ROOT / "docs/zoo.md")
    start_processes_with("torch", "whole_path")
    rows = read_rows(args.results, Row(""))
    for arch in args.models or names:
        if arch not in rows:
            row = apart(check_one, arch, args.data, not args.no_restore)
            rows[arch] = row if isinstance(row, Row) else Row(arch, problems=row)
            append_row(args.results, rows[arch])
            print(f"{len(rows)} {arch}: {rows[arch].problems or 'ok'}, {rows[arch].seconds:.0f} s", file=sys.stderr)
            if page is not None:
                write_table(page, (rows[name] for name in sorted(rows)), len(names))
    return int(any(row.problems for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
