"""One layer kind a file; importing the package registers them all."""

from qlib.lower.base import LOWERINGS, Edge, Site
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
