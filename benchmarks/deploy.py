"""The exported model against torch in float, and against the int8 file of ONNX Runtime's own `quantize_static`.

    python benchmarks/deploy.py [MODEL ...] [--rounds 9] [--images 200] [--data IMAGEFOLDER]

Both files are per channel, MinMax, of the same model and the same calibration images. In every round all contestants
run in turn; the table shows medians of the rounds' ratios. Only the ratios mean anything: machines differ and are
shared. `exact` is the session that this project uses for evaluation: on x86 without VNNI it makes ONNX Runtime add
products without saturation, elsewhere it changes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tabulate import tabulate
from torch import Tensor, nn
from whole_path import build, seconds

from qlib.config.layers.settings import LayerSettings
from qlib.data.datasets import open_dataset
from qlib.deploy.export import INPUT, export_float, export_quantized
from qlib.deploy.session import open_session, run_session
from qlib.graph import LAYOUT, capture, fold_batch_norm
from qlib.graph.ir import layers, name_of
from qlib.lower import lower
from qlib.lower.fit import fit
from qlib.models import ModelSpec, create_model, find_model
from qlib.ptq.planner import plan_post_train_linear
from qlib.stats.collect import MICRO_BATCH, Collector
from qlib.stats.tensor_stats import ModelStats

_ROOT = Path(__file__).resolve().parents[1]
OPSET = 20


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Gives images one by one, as `quantize_static` wants them."""

    def __init__(self, images: Tensor) -> None:
        self.rest = iter(images.split(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.rest, None)
        return None if image is None else {INPUT: image.numpy()}


def ours(model: nn.Module, images: Tensor, path: Path) -> None:
    """Float model -> calibrated, quantized, exported."""
    graph = capture(model, images[:2])
    folded = fold_batch_norm(graph)
    graph = graph.to(memory_format=LAYOUT)
    collector = Collector(graph)
    for batch in images.split(MICRO_BATCH):
        collector.update(batch.contiguous(memory_format=LAYOUT))
    settings = LayerSettings(mode_activations="asym_u", per_channel_wts=True)
    stats = ModelStats(collector.result())
    plan = plan_post_train_linear(graph, {name_of(node): settings for node, _ in layers(graph)}, stats, folded)
    export_quantized(lower(graph, fit(graph, plan)[0]), images[:2], path, opset=OPSET, metadata={})


def theirs(float_file: Path, images: Tensor, path: Path) -> None:
    """Float file -> pre-processed, calibrated, quantized."""
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def ratios(tasks: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Seconds of each task in each round, after one round that does not count."""
    for task in tasks.values():
        task()
    return [{name: seconds(task) for name, task in tasks.items()} for _ in range(rounds)]


def shown(times: list[dict[str, float]], over: str, under: str) -> str:
    """The median ratio of two tasks, and its range."""
    each = [t[over] / t[under] for t in times]
    return f"{statistics.median(each):.2f} ({min(each):.2f} .. {max(each):.2f})"


def images_of(spec: ModelSpec, data: Path, count: int) -> Tensor:
    """The first training images of an ImageFolder, or random ones where there is none."""
    if not data.is_dir():
        return torch.randn(count, *spec.input_shape)
    dataset = open_dataset("imagefolder", data, "train", spec.transform, num_classes=None)
    return torch.stack([dataset[index][0] for index in range(min(count, len(dataset)))])


@torch.no_grad()
def measure(arch: str, rounds: int, data: Path, count: int, folder: Path) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    spec = find_model(arch)
    images = images_of(spec, data, count)
    model = build(lambda: create_model(spec), images[:16])
    float_file, our_file, their_file = (folder / f"{arch}_{kind}.onnx" for kind in ("float", "ours", "theirs"))
    export = seconds(lambda: export_float(capture(model, images[:2]), images[:2], float_file, opset=OPSET, metadata={}))
    spent = {
        "ours": seconds(lambda: ours(model, images, our_file)),
        "theirs": seconds(lambda: theirs(float_file, images, their_file)),
    }
    our_exact, our_fast = open_session(our_file), open_session(our_file, exact=False)
    their_fast = open_session(their_file, exact=False)
    batch, one = images[:32], images[:1]

    def eager() -> None:
        with torch.inference_mode():
            model(batch)

    times = ratios(
        {
            "eager": eager,
            "exact": lambda: run_session(our_exact, batch),
            "ours": lambda: run_session(our_fast, batch),
            "theirs": lambda: run_session(their_fast, batch),
            "ours 1": lambda: run_session(our_fast, one),
            "theirs 1": lambda: run_session(their_fast, one),
        },
        rounds,
    )
    return [
        arch,
        shown(times, "eager", "ours"),
        shown(times, "eager", "exact"),
        shown(times, "ours", "theirs"),
        shown(times, "ours 1", "theirs 1"),
        f"{spent['ours']:.1f} / {spent['theirs']:.1f} = {spent['ours'] / spent['theirs']:.2f}",
        f"{export:.1f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["resnet18", "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x1_0"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--data", type=Path, default=_ROOT / "../shared/data/imagenet-sample", help="an ImageFolder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(arch, args.rounds, args.data, args.images, Path(folder)) for arch in args.models]
    headers = [
        "model",
        "faster than eager",
        "exact, faster than eager",
        "time / quantize_static, 32",
        "time / quantize_static, 1",
        "seconds to make, ours / theirs",
        "their float export",
    ]
    print(tabulate(rows, headers, disable_numparse=True))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


if __name__ == "__main__":
    main()
