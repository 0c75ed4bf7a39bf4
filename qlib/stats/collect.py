"""Activation statistics in one pass over the data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from qlib.errors import OutputError, StatsError
from qlib.graph.ir import Graph, attribute, is_constant, is_layer, is_move, layer_inputs, layers, name_of
from qlib.stats.tensor_stats import LayerStats, TensorStats

__all__ = ["MICRO_BATCH", "Collector"]

MICRO_BATCH = 8
"""Images in one forward pass: small enough that an activation is still in cache when its statistics are taken."""

_SAME_VALUES = frozenset("view reshape flatten permute transpose contiguous unsqueeze squeeze swapaxes".split())


@dataclass(frozen=True)
class _State:
    """What is kept for each of E tensors: float64, sums over all elements seen, with a running pivot p.

    `reference` is the mean of the first batch: s1 = sum(x - r) and s2 = sum((x - r)^2) do not cancel.
    `absolute` = sum|x - p|, `sign` = sum sgn(x - p), `sign_pivot` = sum p sgn(x - p).
    """

    min: Tensor
    max: Tensor
    avg_min: Tensor
    avg_max: Tensor
    reference: Tensor
    s1: Tensor
    s2: Tensor
    absolute: Tensor
    sign: Tensor
    sign_pivot: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.reference + self.s1 / self.count

    def add(self, batch: _State) -> _State:
        """The sums of both; the reference of `self` stays."""
        shift = batch.reference - self.reference
        sums = {
            name: getattr(self, name) + getattr(batch, name)
            for name in ("avg_min", "avg_max", "absolute", "sign", "sign_pivot", "count")
        }
        return _State(
            min=torch.minimum(self.min, batch.min),
            max=torch.maximum(self.max, batch.max),
            reference=self.reference,
            s1=self.s1 + batch.s1 + batch.count * shift,
            s2=self.s2 + batch.s2 + shift * (2 * batch.s1 + batch.count * shift),
            **sums,
        )


class Collector:
    """Runs a captured float graph and keeps, for each activation tensor, what `TensorStats` needs.

    The mean absolute deviation takes one pass as well: ``sum |x - m| ~= sum (x - m) sgn(x - p)``, with the running
    mean p when the batch arrived for the final mean m; the error is of second order in ``p - m``.
    Memory is one row of numbers for each tensor, whatever the number of images.
    """

    def __init__(self, graph: Graph) -> None:
        self.samples = 0
        self._graph = graph
        self._nodes = self._measured()
        self._shapes: dict[str, list[int]] = {}
        self._state: _State | None = None
        self._observer = _Observer(graph, self._nodes)

    def _measured(self) -> list[fx.Node]:
        """The tensors to measure: model inputs, layer outputs, and the parts of such that are layer inputs."""
        found: set[fx.Node] = set()
        for node in self._graph.graph.nodes:
            if node.op == "placeholder" or is_layer(self._graph, node):
                found.add(node)
            if is_layer(self._graph, node):
                found.update(self._origin(source) for source in layer_inputs(node))
        return [node for node in self._graph.graph.nodes if node in found and not is_constant(node)]

    def _origin(self, node: fx.Node) -> fx.Node:
        """The first node that held exactly these values."""
        while is_move(self._graph, node) and node.op != "call_module" and _operation(node) in _SAME_VALUES:
            node = layer_inputs(node)[0]
        return node

    @torch.inference_mode()
    def update(self, images: Tensor) -> None:
        """Adds a batch ``[N, ...]``, in micro-batches. Raises StatsError, naming the layer, for a NaN or infinity."""
        for part in images.split(MICRO_BATCH):
            pivots = None if self._state is None else self._state.mean.float()
            raw, counts, shapes = self._observer.measure(part, pivots)
            if not bool(torch.isfinite(raw).all()):
                self._refuse(raw)
            batch = _batch_state(raw, counts, len(part))
            self._state = batch if self._state is None else self._state.add(batch)
            self._shapes = self._shapes or shapes
            self.samples += len(part)

    def _refuse(self, raw: Tensor) -> None:
        bad = (~torch.isfinite(raw)).any(0).tolist()
        node = next(node for node, is_bad in zip(self._nodes, bad, strict=True) if is_bad)
        raise StatsError(
            f"the output of {name_of(node)!r} holds NaN or infinity, in images {self.samples} to"
            f" {self.samples + MICRO_BATCH - 1} of the calibration set; check the weights and these images"
        )

    def result(self) -> dict[str, LayerStats]:
        """Layer name -> statistics, in execution order. Raises StatsError when no image was seen."""
        if self._state is None:
            raise StatsError("no image was seen, so there are no statistics; calibrate on at least one image")
        columns = {name: values.tolist() for name, values in vars(self._state).items()}
        measured = {
            node: self._tensor_stats({name: values[i] for name, values in columns.items()}, self._shapes[node.name])
            for i, node in enumerate(self._nodes)
        }

        def stats_of(node: fx.Node) -> TensorStats:
            origin = self._origin(node)
            return _constant_stats(attribute(self._graph, origin)) if is_constant(origin) else measured[origin]

        return {
            name_of(node): LayerStats(tuple(map(stats_of, layer_inputs(node))), measured[node])
            for node, _ in layers(self._graph)
        }

    def _tensor_stats(self, row: Mapping[str, float], shape: list[int]) -> TensorStats:
        n = row["count"]
        offset = row["s1"] / n
        mean = row["reference"] + offset
        return TensorStats(
            count=int(n),
            samples=self.samples,
            min=row["min"],
            max=row["max"],
            avg_min=row["avg_min"] / self.samples,
            avg_max=row["avg_max"] / self.samples,
            mean=mean,
            std=max(row["s2"] / n - offset**2, 0.0) ** 0.5,
            b=max(row["absolute"] + row["sign_pivot"] - mean * row["sign"], 0.0) / n,
            shape=tuple(shape),
        )

    def save(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Writes all that `load` needs to go on from here, atomically."""
        assert self._state is not None
        header = {"fingerprint": fingerprint, "samples": self.samples, "shapes": self._shapes}
        temporary = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: value.cpu() for name, value in vars(self._state).items()},
                temporary,
                metadata={"qlib": json.dumps(header, sort_keys=True)},
            )
            os.replace(temporary, path)
        except (OSError, safetensors.SafetensorError) as error:
            raise OutputError(f"cannot write {path}: {error}; choose a folder that can be written") from error

    def load(self, path: Path, fingerprint: Mapping[str, Any]) -> bool:
        """Goes on from a file of `save`; False, and nothing changed, where it is absent or of another calibration."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("qlib", "{}"))
            tensors = load_file(path)
        except (OSError, safetensors.SafetensorError):
            return False
        if header.get("fingerprint") != json.loads(json.dumps(fingerprint)):
            return False
        device = self._observer.device
        self._state = _State(**{name: value.to(device) for name, value in tensors.items()})
        self.samples, self._shapes = header["samples"], header["shapes"]
        return True


def _operation(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class _Observer(fx.Interpreter):
    """Runs the graph and measures the tensors of `nodes` as they are computed."""

    def __init__(self, graph: Graph, nodes: list[fx.Node]) -> None:
        super().__init__(graph)
        self.index = {node: i for i, node in enumerate(nodes)}
        self.device = next((t.device for t in graph.state_dict().values()), torch.device("cpu"))

    def measure(self, images: Tensor, pivots: Tensor | None) -> tuple[Tensor, list[int], dict[str, list[int]]]:
        """``[9, E]`` raw sums (see `_measure`), the number of elements, and the shape of each tensor."""
        self.samples = len(images)
        self.pivots = pivots.unbind() if pivots is not None else None
        self.rows: list[Tensor | None] = [None] * len(self.index)
        self.counts = [0] * len(self.index)
        self.shapes: dict[str, list[int]] = {}
        self.run(images)
        rows = [row for row in self.rows if row is not None]
        assert len(rows) == len(self.rows)
        return torch.stack(rows, 1).double(), self.counts, self.shapes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        index = self.index.get(n)
        if index is not None:
            self.shapes[n.name] = list(value.shape)
            self.counts[index] = value.numel()
            self.rows[index] = _measure(value, self.samples, None if self.pivots is None else self.pivots[index])
        return value


def _samples(x: Tensor, samples: int) -> Tensor:
    """``[samples, elements]``, a view where possible; ``[1, elements]`` where the samples cannot be told apart."""
    x = x.float() if x.dtype != torch.float32 else x
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(samples if x.shape[0] % samples == 0 else 1, -1)


def _measure(x: Tensor, samples: int, pivot: Tensor | None) -> Tensor:
    """min, max, mean over samples of min and of max, pivot p, and the sums of d, d^2, |d|, sgn(d) for ``d = x - p``."""
    flat = _samples(x, samples)
    low, high = flat.amin(1), flat.amax(1)
    pivot = flat.mean() if pivot is None else pivot
    d = (flat - pivot).view(-1)
    s1, s2 = d.sum(), torch.dot(d, d)
    sign = torch.sign(d).sum()
    absolute = d.abs_().sum()
    return torch.stack([low.min(), high.max(), low.mean(), high.mean(), pivot, s1, s2, absolute, sign])


def _batch_state(raw: Tensor, counts: list[int], samples: int) -> _State:
    low, high, avg_low, avg_high, pivot, s1, s2, absolute, sign = raw.unbind()
    count = torch.tensor(counts, dtype=torch.float64, device=raw.device)
    return _State(low, high, avg_low * samples, avg_high * samples, pivot, s1, s2, absolute, sign, pivot * sign, count)


def _constant_stats(value: Tensor) -> TensorStats:
    """Statistics of a tensor that does not depend on the images."""
    x = value.detach().double()
    mean = float(x.mean())
    low, high = float(x.min()), float(x.max())
    deviation = x - mean
    return TensorStats(
        count=x.numel(), samples=1, min=low, max=high, avg_min=low, avg_max=high, mean=mean,
        std=float(deviation.square().mean().sqrt()), b=float(deviation.abs().mean()), shape=tuple(x.shape),
    )  # fmt: skip
