"""A graph computed node by node over all calibration images: each layer's inputs are at hand when it is corrected."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qlib.files import reserve, scratch_folder
from qlib.progress import track

__all__ = ["Buffer", "Stream", "track_nodes"]

MEMORY_LIMIT = 2 * 2**30
"""Bytes of activations that stay in memory; what is above it goes to disk."""


class Buffer:
    """Keeps tensors in memory up to `limit` bytes, and those above it in files that are gone when it is left."""

    def __init__(self, folder: Path, limit: int = MEMORY_LIMIT) -> None:
        self.limit, self.held, self.files = limit, 0, 0
        self._parent = folder
        self._folder: Path | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def keep(self, value: Any) -> Any:
        """The same values, in memory or mapped from a file. Raises OutputError where the disk has no room for it."""
        if not isinstance(value, Tensor) or self.held + value.nbytes <= self.limit or not value.numel():
            self.held += value.nbytes if isinstance(value, Tensor) else 0
            return value
        self.files += 1
        self._folder = self._folder or self._stack.enter_context(scratch_folder(self._parent))
        file, value = self._folder / f"{self.files}.bin", value.contiguous()
        reserve(file, value.nbytes, "activations")
        kept = torch.from_file(str(file), shared=True, size=value.numel(), dtype=value.dtype)  # on the CPU
        return kept.view(value.shape).copy_(value)

    def drop(self, value: Any) -> None:
        """Counts `value` out, if it was kept in memory."""
        if isinstance(value, Tensor) and not value.untyped_storage().filename:
            self.held -= value.nbytes


class Stream:
    """The values of a graph's nodes for a list of image batches, computed as far as `advance` was called.

    Values are kept until the last node that uses them has been computed.
    """

    def __init__(self, graph: fx.GraphModule, batches: Iterable[Tensor], buffer: Buffer) -> None:
        self.graph, self.buffer = graph, buffer
        self.nodes = {node.name: node for node in graph.graph.nodes}
        self._interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        image = next(node for node in graph.graph.nodes if node.op == "placeholder")
        self._device = next((t.device for t in graph.state_dict().values()), torch.device("cpu"))
        self._batches: list[dict[fx.Node, Any]] = [{image: buffer.keep(batch)} for batch in batches]
        self._last_use = {source: node for node in graph.graph.nodes for source in node.all_input_nodes}

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, node: fx.Node) -> list[Any]:
        """The values of a node that was computed and is still to be used; one for each batch."""
        own = self.nodes[node.name]
        return [self._at_hand(values[own]) for values in self._batches]

    def _at_hand(self, value: Any) -> Any:
        """What lies on disk is on the CPU."""
        return value.to(self._device) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def advance(self, node: fx.Node) -> None:
        """Computes the next node, which is known by its name, and forgets what no later node uses."""
        own = self.nodes[node.name]
        if own.op in ("placeholder", "output"):
            return
        for values in self._batches:
            self._interpreter.env = {each: self._at_hand(values[each]) for each in own.all_input_nodes}
            values[own] = self.buffer.keep(self._interpreter.run_node(own))
            for source in own.all_input_nodes:
                if self._last_use[source] is own:
                    self.buffer.drop(values.pop(source))


def track_nodes(graph: fx.GraphModule, description: str) -> Iterator[fx.Node]:
    """The nodes of a graph in order, with a progress bar."""
    nodes = list(graph.graph.nodes)
    return track(
        nodes,
        total_images=len(nodes),
        batch_size=1,
        description=description,
        print_freq=len(nodes),
        count=lambda _: 1,
        unit="nodes",
    )
