"""One layer kind a file; importing the package registers them all."""

from qlib.lower.ops import (
    add,
    avg_pool,
    concat,
    embedding,
    float_op,
    global_avg_pool,
    matmul,
    mul,
    passing,
    softmax,
    weighted,
)
from qlib.lower.ops.base import LOWERINGS, Edge, Site

__all__ = [
    "LOWERINGS",
    "Edge",
    "Site",
    "add",
    "avg_pool",
    "concat",
    "embedding",
    "float_op",
    "global_avg_pool",
    "matmul",
    "mul",
    "passing",
    "softmax",
    "weighted",
]
