"""Reconstruction: the rounding of weights, and the scales of activations, that change a part's output least.

Part after part: ``min |f(x) - f_q(x_q)|^2``, where f is the float part on the float model's activations, and f_q the
quantized part on what the quantized parts before it give.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qlib.correct._base import CalibrationImages
from qlib.correct._pairs import shared_layers
from qlib.correct._soft_rounding import SoftRounding
from qlib.correct._stream import Buffer, Stream
from qlib.correct._units import Unit, unit_module
from qlib.correct._write_back import write_back
from qlib.graph import Graph
from qlib.lower.fake import FakeLayer, FakeQuantize, FakeWeight, lower_fake
from qlib.progress import track
from qlib.quant.plan import Plan
from qlib.tensor_file import read_tensors, write_tensors

__all__ = ["Options", "reconstruct"]

_log = logging.getLogger(__name__)

POSITIONS = 32 * 32 * 32
"""Of a map in one step: 32 images of 32 x 32, or ten of 55 x 55. More cost time, and hardly change a gradient."""

_BETA = (20.0, 2.0)
"""Exponent of the rounding regularizer, at its beginning and at its end: first only roundings near a half are free."""


@dataclass(frozen=True)
class Options:
    """How a part is optimized, in `iterations` steps of one batch each.

    `learn_scales`: the scales of activations are learned as well. `drop`: share of the activations that are left as
    they are, and of the part's inputs that are the float model's, drawn anew in each step. After a share `warmup` of
    the steps a rounding regularizer of weight `regularizer` brings undecided roundings to 0 or 1.
    """

    iterations: int
    learn_scales: bool
    drop: float = 0.0
    rounding_rate: float = 1e-2
    scale_rate: float = 1e-3
    regularizer: float = 1e-2
    warmup: float = 0.2


def reconstruct(graph: Graph, plan: Plan, units: Sequence[Unit], images: CalibrationImages, options: Options) -> Plan:
    """Sets the weights of `graph` to the codes chosen, part after part; returns the plan with their grids.

    The parts that are done are kept in a file of `images.folder`; the same call in another run goes on from there.
    """
    fake = lower_fake(graph, plan)
    partial = _Partial(images.folder, fake, (plan, options, images.seed, images.count))
    done = partial.load()
    shared = _shared_modules(graph, fake)
    starts, inside = {unit.nodes[0]: unit for unit in units}, {node for unit in units for node in unit.nodes}
    progress = _Progress(options.iterations, len(units), len(done))
    with Buffer(images.folder) as buffer:
        batches = list(images.batches())
        floats, fakes = Stream(graph, batches, buffer), Stream(fake, batches, buffer)
        for node in graph.graph.nodes:
            if node not in starts:
                for stream in (floats, fakes) if node not in inside else ():
                    stream.advance(node)
                continue
            unit = starts[node]
            torch.manual_seed(images.seed + units.index(unit))  # so that an interrupted run ends in the same weights
            inputs = [list(zip(floats[source], fakes[source], strict=True)) for source in unit.inputs]
            for each in unit.nodes:
                floats.advance(each)
            if unit.name not in done:
                try:
                    part, targets = unit_module(fake, unit), floats[unit.output]
                    _optimize(part, inputs, targets, shared, options, progress.of(unit.name))
                except KeyboardInterrupt:
                    raise partial.interrupted(len(units)) from None
                partial.save(unit)
            for each in unit.nodes:
                fakes.advance(each)
    progress.close()
    partial.remove()
    return write_back(graph, fake, plan)


def _optimize(
    part: fx.GraphModule,
    inputs: list[list[tuple[Tensor, Tensor]]],
    targets: list[Tensor],
    shared: Collection[int],
    options: Options,
    steps: Iterator[dict[str, float]],
) -> None:
    """Learns the part's roundings and scales. `inputs` holds, for each input and batch, the float and the fake one.

    A layer that others share (`shared` holds its module's id) keeps the nearest codes: no use of it can choose alone.
    """
    part_layers = [layer for layer in part.modules() if isinstance(layer, FakeLayer)]
    roundings = _soften([layer for layer in part_layers if id(layer.module) not in shared])
    grids = [m for m in part.modules() if isinstance(m, FakeQuantize)] if options.learn_scales else []
    drop = RandomMask(options.drop) if options.drop else None
    for grid in (m for m in part.modules() if isinstance(m, FakeQuantize)):
        grid.drop = drop
    rates: list[dict[str, object]] = [{"params": [r.v for r in roundings], "lr": options.rounding_rate}]
    rates += [{"params": [grid.scale], "lr": options.scale_rate * float(grid.scale)} for grid in grids]
    if not roundings and not grids:  # nothing here is rounded
        return
    for grid in grids:
        grid.scale.requires_grad_()
    optimizer = torch.optim.Adam([rate for rate in rates if rate["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations)
    size = sum(float(target.square().sum()) for target in targets) / sum(len(target) for target in targets)
    order: list[int] = []
    for step, shown in zip(range(options.iterations), steps, strict=False):
        order = order or torch.randperm(len(targets)).tolist()
        batch = order.pop()
        chosen = _some_images([targets[batch], *(values[batch][1] for values in inputs)])
        mixed = [_mix(in_float[chosen], fake[chosen], drop) for in_float, fake in (values[batch] for values in inputs)]
        target = targets[batch][chosen]
        error = (part(*mixed) - target).square().sum() / len(target) / max(size, 1e-12)
        loss = error + options.regularizer * _undecided(roundings, step / options.iterations, options.warmup)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        shown["Error"] = float(error.detach())
    _harden(part_layers, part)


def _some_images(tensors: Sequence[Tensor]) -> Tensor | slice:
    """Which images of a batch a step looks at: all, or of large maps as many as have `POSITIONS`, drawn at random."""
    count = len(tensors[0])
    alike = all(len(tensor) == count for tensor in tensors)
    positions = max(math.prod(tensor.shape[2:]) if tensor.ndim > 3 else 1 for tensor in tensors)
    some = max(1, POSITIONS // positions)
    return torch.randperm(count)[:some] if alike and some < count else slice(None)


def _shared_modules(graph: Graph, fake: fx.GraphModule) -> set[int]:
    """The ids of the modules in `fake` that stand for layers called more than once, or with weights of others."""
    targets = {node.name: str(node.target) for node in fake.graph.nodes}
    fakes = [fake.get_submodule(targets[node.name]) for node in shared_layers(graph)]
    return {id(layer.module) for layer in fakes if isinstance(layer, FakeLayer)}


def _soften(part_layers: Sequence[FakeLayer]) -> list[SoftRounding]:
    """Gives each weight of the part a rounding that can be learned."""
    roundings = []
    for layer in part_layers:
        if isinstance(layer.weight, FakeWeight):
            weight = layer.module.weight
            assert isinstance(weight, Tensor)
            layer.weight = rounding = SoftRounding(layer.weight, weight)
            roundings.append(rounding)
    return roundings


def _harden(part_layers: Sequence[FakeLayer], part: nn.Module) -> None:
    """Puts the weights where their roundings were decided; rounding to nearest gives the same codes from now on."""
    for layer in part_layers:
        if isinstance(layer.weight, SoftRounding):
            layer.weight.hard = True
            weight = layer.module.weight
            assert isinstance(weight, Tensor)
            weight.data = layer.weight(weight).detach()
            layer.weight = layer.weight.rounding
    for grid in (m for m in part.modules() if isinstance(m, FakeQuantize)):
        grid.drop = None
        grid.scale.requires_grad_(False).clamp_(min=torch.finfo(torch.float32).tiny)


def _undecided(roundings: Sequence[SoftRounding], done: float, warmup: float) -> Tensor:
    """The rounding regularizer, for a share `done` of all steps: the exponent falls from 20 to 2 along a cosine."""
    if done < warmup or not roundings:
        return torch.zeros(())
    beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2
    return torch.stack([rounding.undecided(beta) for rounding in roundings]).sum()


def _mix(in_float: Tensor, quantized: Tensor, drop: RandomMask | None) -> Tensor:
    """The quantized input, with a share of the float one's elements in it."""
    return quantized if drop is None else torch.where(drop(quantized), in_float, quantized)


class RandomMask:
    """Masks with a share of their elements set: cut from one long mask at random places, as drawing anew is slow."""

    def __init__(self, share: float) -> None:
        self.share, self.pool = share, torch.empty(0, dtype=torch.bool)

    def __call__(self, like: Tensor) -> Tensor:
        """A mask of the shape, device and memory layout of a dense tensor."""
        count = like.numel()
        if len(self.pool) < 2 * count or self.pool.device != like.device:
            self.pool = torch.rand(4 * count, device=like.device) < self.share
        start = int(torch.randint(len(self.pool) - count, ()))
        return self.pool[start : start + count].as_strided(like.shape, like.stride(), start)


class _Progress:
    """One bar over the steps of all parts."""

    def __init__(self, iterations: int, parts: int, done: int) -> None:
        self.shown: dict[str, float] = {}
        self._iterations = iterations
        self._steps = track(
            iter(lambda: self.shown, None),
            total_images=iterations * parts,
            batch_size=1,
            description="Reconstruction",
            print_freq=iterations,
            fields=lambda: self.shown,
            count=lambda step: 1,
            images_done=iterations * done,
            unit="steps",
        )

    def of(self, name: str) -> Iterator[dict[str, float]]:
        """The steps of one part; what it writes into them is shown."""
        _log.debug("Reconstructing %s", name)
        for _ in range(self._iterations):
            yield next(self._steps)

    def close(self) -> None:
        """Ends the bar."""
        self._steps.close()  # type: ignore[attr-defined]


class _Partial:
    """The file of the parts that are done; of use only to a run of the same model, plan and options."""

    def __init__(self, folder: Path, fake: fx.GraphModule, settings: object) -> None:
        self.fake, self.done, self.state = fake, [], {}
        digest = hashlib.sha256(repr(settings).encode())
        for value in fake.state_dict().values():
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.key = digest.hexdigest()
        self.path = folder / f"reconstruction-{self.key[:12]}.partial.safetensors"

    done: list[str]
    state: dict[str, Tensor]

    def load(self) -> list[str]:
        """The names of the parts that are done, whose weights and scales are put into the model."""
        try:
            state, header = read_tensors(self.path, ours=True)
        except OSError:
            return self.done
        if header.get("key") == self.key:
            self.done, self.state = header["done"].split("\n"), state
            self.fake.load_state_dict(self.state, strict=False)
            _log.info("Going on from a broken reconstruction: %d parts are done", len(self.done))
        return self.done

    def save(self, unit: Unit) -> None:
        """Adds a part that is done. Raises OutputError where the file cannot be written."""
        self.done.append(unit.name)
        targets = {str(self._node(node.name).target) for node in unit.nodes}
        state = self.fake.state_dict()
        self.state |= {
            key: value.clone().contiguous()
            for key, value in state.items()
            if any(key.startswith(f"{t}.") for t in targets)
        }
        header = {"key": self.key, "done": "\n".join(self.done)}
        write_tensors(self.path, self.state, "the parts that are done", header, parents=True)

    def _node(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.fake.graph.nodes if node.name == name)
        return found

    def remove(self) -> None:
        """Deletes the file."""
        self.path.unlink(missing_ok=True)

    def interrupted(self, parts: int) -> KeyboardInterrupt:
        """What to tell a user who stopped here."""
        return KeyboardInterrupt(
            f"reconstruction stopped after {len(self.done)} of {parts} parts; run the same command again to go on"
        )
