"""Plan + graph -> a model that computes in integers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from qlib.graph import Graph
from qlib.lower.dynamic import lower_dynamic
from qlib.lower.exact import lower_exact
from qlib.quant.plan import Plan

__all__ = ["exact_arithmetic", "lower", "lower_dynamic", "lower_exact"]


def lower(graph: Graph, plan: Plan) -> fx.GraphModule:
    """The integer model of a plan, static or dynamic."""
    return lower_dynamic(graph, plan) if plan.dynamic else lower_exact(graph, plan)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """float32 as it is: on CUDA no TF32, and none of cuDNN's algorithms that transform weights (Winograd, FFT)."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        matmul.allow_tf32 = before
