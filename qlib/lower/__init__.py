"""Plan + graph -> a model that computes in integers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from qlib.graph import Graph
from qlib.graph.ir import name_of
from qlib.lower.dynamic import DynamicWeighted, dynamic_name, lower_dynamic
from qlib.lower.exact import lower_exact
from qlib.lower.ops.float_op import FloatOp
from qlib.lower.ops.weighted import ExactWeighted, FloatWeighted
from qlib.quant.plan import Plan

__all__ = ["bias_names", "exact_arithmetic", "lower", "lower_dynamic", "lower_exact"]


def lower(graph: Graph, plan: Plan) -> fx.GraphModule:
    """The integer model of a plan, static or dynamic."""
    return lower_dynamic(graph, plan) if plan.dynamic else lower_exact(graph, plan)


def bias_names(node: fx.Node, plan: Plan) -> set[str]:
    """What the state of the integer model may call the bias of the layer at `node` of the float graph."""
    if not plan.dynamic:
        return {f"{name_of(node)}.{form.BIAS}" for form in (ExactWeighted, FloatWeighted, FloatOp)}
    forms = {f"{dynamic_name(node)}.{form.BIAS}" for form in (DynamicWeighted, FloatWeighted, FloatOp)}
    return {f"{node.target}.bias", *forms}  # a layer in float stays as it is


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
