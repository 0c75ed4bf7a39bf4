"""Stable names of the ops in an exported program: what module and what tensor of the model an op belongs to.

The only place that reads what torch.export notes of modules: `nn_module_stack` is metadata, not a promise.
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import fx, nn

__all__ = ["DROPOUTS", "NORMED_BY", "attribute_name", "name_ops", "op_of", "owner_of", "writes"]

NORMED_BY = {"batch_norm": 3}
"""Ops that are named by another argument than their second, the weight: the position of that one."""

_WEIGHTED = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "batch_norm", "group_norm"),
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)
DROPOUTS = frozenset(["dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"])
"""Ops that do nothing in evaluation; they do not count as the op of a module, so that names are those of evaluation."""

_SPELLED = {"bmm": "matmul", "true_divide": "div", "to": "cast", "_to_copy": "cast"}  # every module has a `to`


def op_of(node: fx.Node) -> str:
    """The ATen name without overload and trailing ``_``: ``add`` for `aten.add_.Tensor`; empty for other nodes."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", "")
    name = str(name).rstrip("_") if node.op == "call_function" else ""
    return _SPELLED.get(name, name)


def writes(node: fx.Node) -> bool:
    """Whether an op changes a tensor in place."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def owner_of(node: fx.Node) -> str:
    """The path of the module whose forward method runs the op; empty for the model itself."""
    stack = [entry for key, entry in (node.meta.get("nn_module_stack") or {}).items() if not key.startswith("_empty")]
    return str(stack[-1][0]) if stack else ""


def name_ops(
    ops: Iterable[fx.Node], model: nn.Module, paths: Mapping[fx.Node, str], moves: frozenset[fx.Node]
) -> dict[fx.Node, str]:
    """The name of each op that changes values, in order of execution; `moves` are those among `ops` that do not.

    1. An op with a weight has the path of the layer that holds it, whoever computes with it.
    2. The op of a module of torch.nn has its path, and so has the only op of a module without state and children.
    3. Others have the path of their module, and the name of the op: ``layer1.0.add``.

    A name that is taken gets ``_1``, ``_2``, ... in order; one that no code can spell as an attribute ends in ``_``.
    """
    ops = list(ops)
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in reversed(modules.items())}
    alone = Counter(owner_of(node) for node in ops if op_of(node) not in DROPOUTS)
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    for node in ops:
        if node in moves:
            continue
        name = attribute_name(_name(node, modules, first, paths, alone))
        free, suffix = name, 0
        while free in taken:
            suffix += 1
            free = f"{name}_{suffix}"
        taken.add(free)
        names[node] = free
    return names


def attribute_name(path: str) -> str:
    """The path as code can spell it: a part that is a keyword of Python, or a method of each module, ends in ``_``.

    >>> attribute_name("blocks.if.conv"), attribute_name("to"), attribute_name("blocks.0")
    ('blocks.if_.conv', 'to_', 'blocks.0')
    """
    parts = path.split(".")
    return ".".join(f"{part}_" if keyword.iskeyword(part) or hasattr(nn.Module, part) else part for part in parts)


def _name(
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    first: Mapping[int, str],
    paths: Mapping[fx.Node, str],
    alone: Mapping[str, int],
) -> str:
    if op_of(node) == "getitem":  # one of the results of an op with several: parts of one are moves
        (node,) = node.all_input_nodes
    op, owner = op_of(node), owner_of(node)
    if op in _WEIGHTED:
        position = NORMED_BY.get(op, 1)
        tensor = node.args[position] if len(node.args) > position else None
        path = paths.get(tensor, "") if isinstance(tensor, fx.Node) else ""
        if path:
            return path.rpartition(".")[0] or op
        if isinstance(modules.get(owner), (nn.modules.conv._ConvNd, nn.Linear)):  # its weight is computed from others
            return first[id(modules[owner])]
    module = modules.get(owner)
    if module is not None and owner:
        owner = first[id(module)]
        plain = type(module).__module__.startswith("torch.nn.") and not isinstance(module, _CONTAINERS)
        only = alone[owner_of(node)] == (op not in DROPOUTS)
        bare = only and not any(module.children()) and not module.state_dict()
        if plain or bare:
            return owner
    return f"{owner}.{op}" if owner else op
