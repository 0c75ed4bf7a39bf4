"""Passes over an exported program: what does nothing goes, and attention comes apart into products and a softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qlib.graph.aten import arguments_of
from qlib.graph.constants import make_constant, merge_equal, settle_softmax
from qlib.graph.edit import insert, sizes_of
from qlib.graph.moves import is_move
from qlib.graph.names import DROPOUTS, op_of, writes
from qlib.graph.norm_order import norm_before_moves
from qlib.graph.products import split_product
from qlib.graph.scatters import split_scatter
from qlib.graph.trace import Trace, depends_on

__all__ = ["simplify"]

aten = torch.ops.aten

_IDENTITIES = frozenset(["detach", "alias", "lift_fresh_copy", "contiguous"])


def simplify(trace: Trace, *, dropouts: bool = False) -> Trace:
    """The program without identities, in ops that have integer forms; with `dropouts` those stay, to train.

    Its graph is changed in place.
    """
    graph = trace.graph.graph
    kept = frozenset[str]() if not dropouts else DROPOUTS
    depending = depends_on(graph, trace.images)
    for node in list(graph.nodes):
        if node.op == "call_function" and not (op_of(node) in kept and _drops(node)) and not _stops(node, depending):
            _drop(graph, node)
    for node in list(graph.nodes):
        make_constant(graph, node)
        _give_sizes(graph, node)
        _drop_places(graph, node)
        _pad_for_maximum(graph, node)
    merge_equal(graph)
    for node in list(graph.nodes):
        split_scatter(graph, node)
        split_product(graph, node)
    tensors, paths = dict(trace.tensors), dict(trace.paths)
    trace = replace(trace, tensors=tensors, paths=paths)
    for node in list(graph.nodes):
        if op_of(node) == "scaled_dot_product_attention":
            _split_attention(trace, node)
        elif op_of(node) == "_native_batch_norm_legit_no_training":
            _restore_batch_norm(graph, node)
        elif op_of(node) == "linear":
            _split_projection(trace, node)
        elif op_of(node) == "linalg_vector_norm":
            _join_normalize(graph, node)
    for node in list(graph.nodes):
        if op_of(node) == "batch_norm":
            norm_before_moves(graph, node)
        elif op_of(node) == "softmax":
            settle_softmax(graph, node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or writes(node))
    return trace


def _stops(node: fx.Node, depending: frozenset[fx.Node]) -> bool:
    """Whether it stops a gradient within what is computed from parameters, as a straight-through estimator does."""
    return op_of(node) == "detach" and depending.isdisjoint(node.users)


def _drop(graph: fx.Graph, node: fx.Node) -> None:
    op = op_of(node)
    if op in ("_assert_tensor_metadata", "_assert_scalar") and not node.users:
        graph.erase_node(node)
    elif op in _IDENTITIES | DROPOUTS or (op == "cast" and _same(node, "dtype")) or _is_same_pool(node):
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)


def _give_sizes(graph: fx.Graph, node: fx.Node) -> None:
    """A reshape to the shape of another tensor does not need that tensor where the shape is known."""
    if op_of(node) in ("reshape_as", "view_as") and (sizes := sizes_of(node)) is not None:
        made = insert(graph, node, aten.reshape.default, node.args[0], sizes)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _drop_places(graph: fx.Graph, node: fx.Node) -> None:
    """A maximum along an axis of which nobody asks the places: ``x.max(1)[0]`` is ``x.amax(1)``."""
    found = {"max": aten.amax.default, "min": aten.amin.default}.get(op_of(node))
    asked = [user for user in node.users if user.users]
    if found is not None and "dim" in arguments_of(node) and all(user.args[1] == 0 for user in asked):
        given = arguments_of(node)
        for user in list(node.users):
            user.replace_all_uses_with(insert(graph, user, found, given["self"], [given["dim"]], given["keepdim"]))
            graph.erase_node(user)
        graph.erase_node(node)


def _pad_for_maximum(graph: fx.Graph, node: fx.Node) -> None:
    """Minus infinity around a max pool's input is never its maximum, nor more than the edge is, repeated.

    A window that reaches over an edge holds the edge's value: it has no gaps, and is wider than what is padded.
    """
    if op_of(node) not in ("pad", "constant_pad_nd") or node.meta["val"].ndim != 4:
        return
    given = arguments_of(node)
    pad, least = given["pad"], torch.finfo(torch.float32).min
    pools = [arguments_of(user) if op_of(user) == "max_pool2d" else None for user in node.users]
    widest = [max(pad[:2], default=0), max(pad[2:], default=0)]
    for pool in pools:
        if pool is None or any(step != 1 for step in pool["dilation"]) or any(pool["padding"]):
            return
        kernel = pool["kernel_size"] if len(pool["kernel_size"]) > 1 else 2 * pool["kernel_size"]
        if kernel[1] <= widest[0] or kernel[0] <= widest[1]:
            return
    value = given.get("value")
    if given.get("mode", "constant") == "constant" and value is not None and value <= least and min(pad) >= 0:
        edges = insert(graph, node, aten.replication_pad2d.default, given["self"], [*pad, 0, 0][:4])
        node.replace_all_uses_with(edges)
        graph.erase_node(node)


def _is_same_pool(node: fx.Node) -> bool:
    """An adaptive pool whose output has the size of its input does nothing (VGG and AlexNet at 224 x 224)."""
    return op_of(node) == "adaptive_avg_pool2d" and _same(node, "shape") and node.meta["val"].shape[-1] > 1


def _drops(node: fx.Node) -> bool:
    """Whether a dropout ever drops, and no batch-norm or ReLU that a layer computes with it reads it."""
    joined = any(op_of(user) in ("batch_norm", "relu", "relu6", "hardtanh") for user in node.users)
    return bool(arguments_of(node)["p"]) and not joined


def _same(node: fx.Node, what: str) -> bool:
    before, after = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and getattr(before, what) == getattr(after, what)


def _split_attention(trace: Trace, node: fx.Node) -> None:
    """``softmax(q k^T / sqrt(d) + mask) v``: a product, a softmax, a product (Vaswani et al. 2017, section 3.2.1)."""
    graph, given = trace.graph.graph, arguments_of(node)
    query, key, value, mask = given["query"], given["key"], given["value"], _mask(trace, given["attn_mask"])
    if given["dropout_p"]:
        return
    if given.get("enable_gqa"):
        key, value = (_for_each_query(graph, node, each, query) for each in (key, value))
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(query.meta["val"].shape[-1])
    scaled = insert(graph, node, aten.mul.Tensor, query, float(scale))
    turned = insert(graph, node, aten.transpose.int, key, -2, -1)
    scores = insert(graph, node, aten.matmul.default, scaled, turned)
    if given["is_causal"]:
        sizes = [int(size) for size in scores.meta["val"].shape[-2:]]
        every = insert(graph, node, aten.full.default, sizes, True, device=node.meta["val"].device)
        mask = insert(graph, node, aten.tril.default, every)
    if mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            mask = insert(graph, node, aten.where.Scalar, mask, 0.0, -math.inf)
        scores = insert(graph, node, aten.add.Tensor, scores, mask)
    weights = insert(graph, node, aten.softmax.int, scores, -1)
    node.replace_all_uses_with(insert(graph, node, aten.matmul.default, weights, value))
    graph.erase_node(node)


def _for_each_query(graph: fx.Graph, node: fx.Node, heads: fx.Node, query: fx.Node) -> fx.Node:
    """Keys or values of which several heads of queries share one (Ainslie et al. 2023): one for each."""
    times = int(query.meta["val"].shape[-3]) // int(heads.meta["val"].shape[-3])
    return heads if times == 1 else insert(graph, node, aten.repeat_interleave.self_int, heads, times, -3)


def _mask(trace: Trace, mask: fx.Node | None) -> fx.Node | None:
    """A mask as it is before it is expanded, which an addition does; None where nothing is masked."""
    while mask is not None and op_of(mask) in ("expand", "expand_as"):
        mask = mask.all_input_nodes[0]
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        known = _constant(trace, mask)
        return None if known is not None and bool(known.all()) else mask
    return mask


def _constant(trace: Trace, node: fx.Node) -> Any:
    """The value of a node that does not depend on the images; None for others, and for what is changed in place."""
    if any(writes(user) for each in (node, *node.users) for user in (each, *each.users)):
        return None
    if node in trace.tensors:
        return trace.tensors[node]
    inputs = {each: _constant(trace, each) for each in node.all_input_nodes}
    if node.op != "call_function" or any(value is None for value in inputs.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda each: inputs[each])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _restore_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """A batch-norm in evaluation, which decomposition spells as an op of three results."""
    given = arguments_of(node)
    for user in list(node.users):
        names = ("input", "weight", "bias", "running_mean", "running_var")
        norm = [*(given[name] for name in names), False, given["momentum"], given["eps"], False]
        user.replace_all_uses_with(insert(graph, user, aten.batch_norm.default, *norm))
        graph.erase_node(user)


def _split_projection(trace: Trace, node: fx.Node) -> None:
    """The packed projection of `nn.MultiheadAttention` as three linear layers: ``q_proj``, ``k_proj``, ``v_proj``."""
    graph, given = trace.graph.graph, arguments_of(node)
    weight, bias = given["weight"], given["bias"]
    if trace.paths.get(weight, "").rpartition(".")[2] != "in_proj_weight":
        return
    parts = [user for user in _through_moves(node) if op_of(user) == "select"]
    if len(parts) != 3 or any(part.args[1] != 0 for part in parts):
        return
    owner = trace.paths[weight].removesuffix("in_proj_weight")
    for index, letter in enumerate("qkv"):
        tensors = [_part(trace, tensor, index, f"{owner}{letter}_proj") for tensor in (weight, bias) if tensor]
        part = next(each for each in parts if each.args[2] == index)
        part.replace_all_uses_with(insert(graph, part, aten.linear.default, given["input"], *tensors))


def _through_moves(node: fx.Node) -> list[fx.Node]:
    """Where a tensor goes: the first ops that take parts of it, behind others that move it."""
    found: list[fx.Node] = []
    for user in node.users:
        found += [user] if op_of(user) == "select" or not is_move(user) else _through_moves(user)
    return found


def _part(trace: Trace, tensor: fx.Node, index: int, layer: str) -> fx.Node:
    """A third of a packed weight or bias, in the same memory, as if it were the model's own."""
    whole = trace.tensors[tensor]
    part = whole.detach().chunk(3)[index]
    graph = trace.graph.graph
    with graph.inserting_before(tensor):
        node = graph.placeholder(f"{tensor.name}_{index}")
    with tensor.meta["val"].fake_mode:
        node.meta["val"] = tensor.meta["val"].chunk(3)[index]
    trace.tensors[node] = nn.Parameter(part, requires_grad=whole.requires_grad)
    trace.paths[node] = f"{layer}.{'weight' if whole.ndim == 2 else 'bias'}"
    return node


def _join_normalize(graph: fx.Graph, node: fx.Node) -> None:
    """``x / max(|x|, eps)`` as the one function that the model calls."""
    given = arguments_of(node)
    source, dims = given["self"], given["dim"]
    (clamp,) = node.users if len(node.users) == 1 else (None,)
    if clamp is None or op_of(clamp) != "clamp_min" or len(clamp.users) != 1 or not given["keepdim"]:
        return
    (last,) = clamp.users
    if op_of(last) in ("expand", "expand_as") and len(last.users) == 1:
        (last,) = last.users
    if op_of(last) != "div" or last.args[0] is not source or not dims or len(dims) != 1:
        return
    joined = insert(graph, last, F.normalize, source, float(given["ord"]), dims[0], arguments_of(clamp)["min"])
    last.replace_all_uses_with(joined)
