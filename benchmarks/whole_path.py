"""One model through the whole path: capture, fold, calibrate, quantize, evaluate, save, reload, export, verify."""

from __future__ import annotations

import copy
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qlib.checkpoint.quantized import QuantizedHeader, read_header, restore_quantized, save_quantized
from qlib.checkpoint.read import read_checkpoint
from qlib.config.layers.settings import LayerSettings
from qlib.deploy.export import export_quantized
from qlib.deploy.placement import int8_share, placement
from qlib.deploy.session import open_session, run_session
from qlib.deploy.verify import Verification, verify
from qlib.graph import Graph, capture, fold_batch_norm
from qlib.graph.cost import layer_costs
from qlib.graph.ir import layers, name_of
from qlib.lower import exact_arithmetic, lower
from qlib.lower.fit import fit
from qlib.lower.ops.float_op import FloatOp
from qlib.lower.ops.weighted import FloatWeighted
from qlib.ptq.planner import plan_post_train_linear
from qlib.quant.plan import Plan
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats

TOLERANCE = 1e-4
"""How far, relative to the largest logit, the captured graph may be from the model."""

OPSET = 20
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """What was measured of one model; `problems` is empty where all is well. Sizes are in MB (10^6 bytes).

    `codes` and `differing` count the integer tensors of layers that ONNX Runtime computes in integers, `float_codes`
    and `float_differing` those of the others; `worst_share` is the largest share of one such tensor that differs.
    `fp32_ms` and `int8_ms` are for one image, in torch and in ONNX Runtime, `export_s` is how long the export took.
    """

    model: str
    side: int = 0
    layers: int = 0
    float_layers: int = 0
    float_kinds: str = ""
    captured_error: float = float("nan")
    folded_error: float = float("nan")
    sqnr_db: float = float("nan")
    fp32_mb: float = float("nan")
    int8_mb: float = float("nan")
    seconds: float = float("nan")
    peak_gb: float = float("nan")
    macs_in_int8: float = float("nan")
    codes: int = 0
    differing: int = 0
    float_codes: int = 0
    float_differing: int = 0
    worst_share: float = float("nan")
    onnx_mb: float = float("nan")
    export_s: float = float("nan")
    fp32_ms: float = float("nan")
    int8_ms: float = float("nan")
    problems: str = ""


@torch.no_grad()
def randomize(model: nn.Module, images: Tensor) -> None:
    """Makes a new model behave like a trained one, in place: no output is zero, no activation grows without bound.

    What starts at 0 or near it (heads, biases, layer scales) becomes random; batch-norms take the statistics of
    `images`, moved a little so that none is the identity.
    """
    for parameter in model.parameters():
        spread = float(parameter.abs().max())
        if spread < 1e-3:
            parameter.normal_(0.0, 0.02 if parameter.ndim == 2 else 0.2)
        elif parameter.ndim == 1 and bool((parameter == 1).all()):  # the weight of a normalization
            parameter.uniform_(0.5, 1.5)
    norms = [module for module in model.modules() if isinstance(getattr(module, "running_var", None), Tensor)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(images)
    for norm in norms:
        norm.eval()
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest magnitude of the reference.

    >>> relative_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
    0.25
    """
    return float((value - reference).abs().max() / reference.abs().max())


def sqnr_db(value: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise, in decibels: 10 log10(sum r^2 / sum (r - v)^2).

    >>> sqnr_db(torch.tensor([9.0, 0.0]), torch.tensor([10.0, 0.0]))
    20.0
    """
    noise = float((value - reference).double().square().sum())
    return 10 * float(torch.log10(reference.double().square().sum() / noise)) if noise else float("inf")


def float_kinds(graph: Graph, plan: Plan, lowered: nn.Module) -> tuple[Counter[str], list[str]]:
    """The classes of the layers that compute in float, and the names of those that the plan gives no reason for."""
    found: Counter[str] = Counter()
    unlisted = []
    modules = dict(lowered.named_modules())
    for node, module in layers(graph):
        name, note = name_of(node), plan.layers[name_of(node)].note
        if note or isinstance(modules.get(name), (FloatOp, FloatWeighted)):
            kind = module.extra_repr() if type(module).__name__ == "Function" else type(module).__name__
            found[kind] += 1
            if not note:
                unlisted.append(name)
    return found, unlisted


def plan_eight_bits(graph: Graph, folded: dict[str, str], images: Tensor) -> Plan:
    """8 bits for all layers: asym_u activations, sym weights per channel, ranges of `images`."""
    collector = Collector(graph)
    collector.update(images)
    settings = LayerSettings(mode_activations="asym_u", per_channel_wts=True)
    everywhere = {name_of(node): settings for node, _ in layers(graph)}
    plan = plan_post_train_linear(graph, everywhere, ModelStats(collector.result()), folded)
    return fit(graph, plan)[0]


def build(make: Callable[[], nn.Module], images: Tensor) -> nn.Module:
    """A new random model, in evaluation mode."""
    with torch.inference_mode(False):
        model = make().eval()
    randomize(model, images)
    return model


def folding_error_in_float64(model: nn.Module, images: Tensor) -> float:
    """The error of the folded graph where rounding plays no part: near 0 when folding is right."""
    graph = capture(model, images).double()
    with torch.inference_mode(False):
        model, images = copy.deepcopy(model).double(), images.double()
    fold_batch_norm(graph)
    return relative_error(graph(images), model(images))


@torch.no_grad()
def check(
    arch: str, make: Callable[[], nn.Module], images: Tensor, *, restore: bool = True, export: bool = True
) -> Row:
    """Takes a model through the whole path; `make` builds it anew, with other random weights each time.

    `restore`: whether the checkpoint is restored and compared as well, `export`: whether the model is exported.
    """
    start = time.perf_counter()
    model = build(make, images)
    reference = model(images)
    fp32_mb = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
    graph = capture(model, images[:2])
    captured = relative_error(graph(images[:2]), reference[:2])
    folded = fold_batch_norm(graph)
    after_folding = relative_error(graph(images[:2]), reference[:2])
    in_float64 = float("nan") if after_folding < TOLERANCE else folding_error_in_float64(model, images[:2])
    macs = {cost.name: cost.macs for cost in layer_costs(capture(model, images[:1]))}
    plan = plan_eight_bits(graph, folded, images)
    lowered = lower(graph, plan)
    kinds, unlisted = float_kinds(graph, plan, lowered)
    del graph
    with exact_arithmetic():
        logits = lowered(images)
        alone = lowered(images[:1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized_checkpoint.pth.tar"
        save_quantized(path, QuantizedHeader(arch, "imagenet", logits.shape[1], plan), lowered, {})
        int8_mb = path.stat().st_size / 1e6
        deployed: dict[str, float] = {}
        verification = Verification((), 0, 0, 0.0, faithful=True)
        if export:
            file = Path(folder) / "model.onnx"
            deployed, verification = deploy(lowered, images, macs, file)
            deployed |= times(model, file, images[:1])
        del model, lowered
        reloaded = reload(path, make, images) if restore else logits
    differing = [layer for layer in verification.layers if layer.verdict not in ("exact", "within a step")]
    places = ", ".join(f"{layer.layer} {layer.share:.1e}" for layer in differing[:4])
    problems = {
        "captured graph differs": not captured < TOLERANCE,
        f"folded graph differs (by {in_float64:.0e} in float64)": not after_folding < TOLERANCE,
        f"float without a reason: {', '.join(unlisted)}": bool(unlisted),
        "logits depend on the batch": not torch.equal(alone, logits[:1]),
        "reloaded model differs": not torch.equal(reloaded, logits),
        "logits do not depend on the image": torch.equal(logits[0], logits[1]),
        f"ONNX Runtime differs: {places}": bool(differing),
        "the inspected model differs from the shipped one": not verification.faithful,
    }
    return Row(
        arch,
        images.shape[-1],
        len(plan.layers),
        kinds.total(),
        ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()),
        captured,
        after_folding,
        sqnr_db(logits, reference),
        fp32_mb,
        int8_mb,
        time.perf_counter() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        problems="; ".join(problem for problem, is_so in problems.items() if is_so),
        **deployed,
    )


def deploy(
    lowered: fx.GraphModule, images: Tensor, macs: dict[str, int], path: Path
) -> tuple[dict[str, float], Verification]:
    """Exports and verifies the integer model: the fields of `Row`."""
    export_s = seconds(lambda: export_quantized(lowered, images[:2], path, opset=OPSET, metadata={}))
    verification = verify(lowered, path, images.split(1))  # one at a time: all its tensors are held at once
    share = int8_share(placement(path, lowered, macs))
    integer, others = ([each for each in verification.layers if each.integer == kind] for kind in (True, False))
    return {
        "macs_in_int8": share,
        "codes": sum(each.codes for each in integer),
        "differing": sum(each.differing for each in integer),
        "float_codes": sum(each.codes for each in others),
        "float_differing": sum(each.differing for each in others),
        "worst_share": max((each.share for each in others), default=0.0),
        "onnx_mb": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6,
        "export_s": export_s,
    }, verification


def times(model: nn.Module, path: Path, image: Tensor) -> dict[str, float]:
    """Milliseconds for one image, of the model in torch and of its integer form in ONNX Runtime: fields of `Row`."""
    session = open_session(path, exact=False)
    both = [(seconds(lambda: model(image)), seconds(lambda: run_session(session, image))) for _ in range(ROUNDS)]
    float_ms, int8_ms = (1000 * statistics.median(column) for column in zip(*both, strict=True))
    return {"fp32_ms": float_ms, "int8_ms": int8_ms}


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reload(path: Path, make: Callable[[], nn.Module], images: Tensor) -> Tensor:
    """The logits of a quantized checkpoint, rebuilt on a new model with weights of its own."""
    checkpoint = read_checkpoint(path)
    header = read_header(checkpoint, str(path))
    graph = capture(build(make, images), images[:2])
    fold_batch_norm(graph)
    restored = restore_quantized(checkpoint, header, graph, str(path))
    del graph, checkpoint
    with exact_arithmetic():
        logits: Tensor = restored(images)
    return logits
