"""The captured model: a graph in which every op that changes values is a named module."""

from qlib.graph.capture import capture
from qlib.graph.fold_bn import fold_batch_norm
from qlib.graph.folded import LAYOUT, FoldedGraph, fold, fold_copy, lay_out
from qlib.graph.fuse import activation_bounds, fused_activations
from qlib.graph.identities import drop_dropouts
from qlib.graph.ir import Graph
from qlib.graph.kinds import kind_of
from qlib.graph.norms import NormStatistics, after_folding, norm_statistics
from qlib.graph.recapture import deployed_copy

__all__ = [
    "LAYOUT",
    "FoldedGraph",
    "Graph",
    "NormStatistics",
    "activation_bounds",
    "after_folding",
    "capture",
    "deployed_copy",
    "drop_dropouts",
    "fold",
    "fold_batch_norm",
    "fold_copy",
    "fused_activations",
    "kind_of",
    "lay_out",
    "norm_statistics",
]
