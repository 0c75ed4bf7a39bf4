"""How active the channels of activation functions are: Distiller's summary statistics of activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlib.graph.ir import Graph, layers, name_of

__all__ = ["ACTIVATION_FUNCTIONS", "Activity", "ActivityCollector"]

ACTIVATION_FUNCTIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish)
"""The modules whose outputs are measured."""


@dataclass(frozen=True)
class Activity:
    """What an activation function puts out, over the images and for each of C channels ``[C]``.

    `zeros` is the share that is 0 (Distiller's APoZ, Hu et al. 2016), `l1` the mean over images of the L1 norm of the
    channel, `mean` the mean value.
    """

    zeros: Tensor
    l1: Tensor
    mean: Tensor

    @property
    def sparsity(self) -> float:
        """The share of all values that is 0: that of the output feature map, as channels are equally large."""
        return float(self.zeros.mean())


class ActivityCollector(fx.Interpreter):
    """Runs a captured graph and sums up what its activation functions put out, in float64.

    >>> from qlib.graph import capture
    >>> collector = ActivityCollector(capture(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.zeros(2, 1, 2)))
    >>> collector.run(torch.tensor([[[-1.0, 2.0]], [[-3.0, -4.0]]])).tolist()
    [[0.0, 2.0], [0.0, 0.0]]
    >>> collector.result()["1"]
    Activity(zeros=tensor([1.0000, 0.5000], dtype=torch.float64), l1=tensor([0., 1.], dtype=torch.float64), \
mean=tensor([0., 1.], dtype=torch.float64))
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._names = {
            node: name_of(node) for node, module in layers(graph) if isinstance(module, ACTIVATION_FUNCTIONS)
        }
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self.samples = 0

    def __len__(self) -> int:
        """How many activation functions there are."""
        return len(self._names)

    @torch.inference_mode()
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch of images."""
        self.samples += len(args[0])
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, which is measured on the way."""
        value = super().run_node(n)
        if n in self._names:
            rows = _by_channel(value).double()
            sums = torch.stack([(rows == 0).sum(1).double(), rows.abs().sum(1), rows.sum(1)])
            self._sums[self._names[n]] = self._sums.get(self._names[n], 0) + sums
            self._sizes[self._names[n]] = self._sizes.get(self._names[n], 0) + rows.shape[1]
        return value

    def result(self) -> dict[str, Activity]:
        """Layer name -> its activity, in execution order; at least one batch was seen."""
        return dict(self._results())

    def _results(self) -> Iterator[tuple[str, Activity]]:
        for name, (zeros, absolute, total) in self._sums.items():
            yield name, Activity(zeros / self._sizes[name], absolute / self.samples, total / self._sizes[name])


def _by_channel(value: Tensor) -> Tensor:
    """The values of each channel ``[C, ...]``: of axis 1, or of the last one of sequences ``[N, T, C]``."""
    return value.movedim(-1 if value.ndim == 3 else 1, 0).flatten(1)
