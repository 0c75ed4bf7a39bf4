"""Model -> the ATen ops that it runs in evaluation, by torch.export, with the paths of its modules and tensors."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torchvision.ops import FrozenBatchNorm2d

from qlib.errors import ModelError
from qlib.graph.any_batch import images_of, is_fixed, with_any_batch
from qlib.graph.names import DROPOUTS, op_of, writes
from qlib.users_code import definition_of, layer_of, line_of, reason_of

__all__ = ["DROP_PATHS", "Trace", "check_inputs", "depends_on", "is_view", "pads_values", "trace"]

DROP_PATHS = frozenset({"DropPath", "StochasticDepth"})
"""Classes of stochastic depth: torchvision's, and what others call it."""


@dataclass(frozen=True, eq=False)
class Trace:
    """An exported program: `graph` of ATen ops whose placeholders are the model's tensors and one batch of images.

    `tensors`: placeholder -> the model's own tensor, `paths`: placeholder -> its path in the model, "" for a tensor
    that is no parameter or buffer. `images` is the placeholder of the batch.
    """

    graph: fx.GraphModule
    images: fx.Node
    tensors: dict[fx.Node, Tensor]
    paths: dict[fx.Node, str]


def trace(model: nn.Module, example: Tensor) -> Trace:
    """Exports the model in evaluation mode, with any number of images in a batch; the model itself stays as it is.

    Stochastic depth, which does nothing in evaluation, is there as a dropout of its probability.

    Raises:
        ModelError: the model cannot be exported, with the reason and the line of its source.
    """
    check_inputs(model)
    images = example[:1].expand(2, *example.shape[1:])  # a batch of one would be taken for a constant
    with _evaluating(model), _quiet():
        program = _exported(model, images, tuple(example.shape))
        _inline(program.graph_module)
        if _writes_into_views(program):
            program = program.run_decompositions({})
            _inline(program.graph_module)
    return _read(model, program)


def depends_on(graph: fx.Graph, images: fx.Node) -> frozenset[fx.Node]:
    """The nodes whose values depend on the images, or on how many there are."""
    found = {images}
    for node in graph.nodes:
        if node not in found and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def check_inputs(model: nn.Module) -> None:
    """A model of images takes one tensor. Raises ModelError for one that needs more, takes none, or is TorchScript."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"layer {path!r}" if path else "the model"
            raise ModelError(f"{what} is TorchScript, which cannot be captured; give the module that was scripted")
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each.name for each in parameters if each.default is each.empty and each.kind in positional]
    takes_any = any(each.kind is inspect.Parameter.VAR_POSITIONAL or each.kind in positional for each in parameters)
    if len(needed) > 1 or not takes_any:
        found = f"{len(needed)} inputs ({', '.join(needed)})" if needed else "no input"
        raise ModelError(
            f"the forward method of {type(model).__name__} takes {found}; images are one: wrap the model in a module"
            " whose forward method takes them alone"
        )


def _inline(graph: fx.GraphModule) -> None:
    """Puts what runs under `torch.no_grad` or autocast, which torch.export sets apart, back into its place."""
    for node in list(graph.graph.nodes):
        wrapped = next((arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"), None)
        if wrapped is None or not str(node.target).startswith("wrap_with_"):
            continue
        inner = getattr(graph, str(wrapped.target))
        _inline(inner)
        operands = node.args[node.args.index(wrapped) + 1 :]
        places = inner.graph.find_nodes(op="placeholder")
        with graph.graph.inserting_before(node):
            outputs: Any = graph.graph.graph_copy(inner.graph, dict(zip(places, operands, strict=True)))
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)


def _writes_into_views(program: ExportedProgram) -> bool:
    """Whether an op changes, in place, a tensor that depends on the images and shares its memory with another one."""
    own = {*program.graph_signature.user_inputs}
    depending: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in own or any(source in depending for source in node.all_input_nodes):
            depending.add(node)
            changed = node.args[0] if writes(node) and op_of(node) not in DROPOUTS else None
            if isinstance(changed, fx.Node) and (is_view(changed) or any(map(is_view, changed.users))):
                return True
    return False


def is_view(node: fx.Node) -> bool:
    """Whether a tensor lies in the memory of another one."""
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and not schema.is_mutable and any(each.alias_info for each in schema.returns)
    return aliases or getattr(node.target, "__name__", "") == "getitem"


def _exported(model: nn.Module, images: Tensor, shape: tuple[int, ...]) -> ExportedProgram:
    refusals: list[ModelError] = []
    for size in (Dim("batch"), Dim.AUTO):
        try:
            program = export(model, (images,), strict=False, dynamic_shapes=({0: size},))
            if not is_fixed(images_of(program).meta["val"].shape[0]):
                return program
            more = export(model, (torch.cat([images, images[:1]]),), strict=False)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the model's own code may raise anything
            refusals.append(_refusal(error, model, shape))
            continue
        return with_any_batch(program, more)
    raise refusals[0]


_ON_VALUES = ("GuardOnDataDependentSymNode", "UserError", "DataDependentOutputException", "DynamicOutputShapeException")


def _refusal(error: BaseException, model: nn.Module, shape: tuple[int, ...]) -> ModelError:
    """Where and why a model cannot be exported."""
    while isinstance(error, ModelError):
        if error.__cause__ is None:  # it has its sentence already
            return error
        error = error.__cause__
    path, line = layer_of(error, model), line_of(error) or definition_of(type(model).forward)
    place = f"{path!r} ({line})" if path and line else repr(path) if path else line or "its forward method"
    if type(error).__name__ in _ON_VALUES:
        refusal = _on_values(place)
    else:
        refusal = ModelError(
            f"the model cannot be captured: it fails at {place} on an input of shape {shape}, with"
            f" {reason_of(error)}; correct it there"
        )
    refusal.__cause__ = error
    return refusal


def _on_values(place: str) -> ModelError:
    return ModelError(
        "the model cannot be captured: it decides on the values of a tensor, or on how many images there are, at"
        f" {place}; rewrite that without control flow on tensor values, or put it into a module of torch.nn"
    )


def _output(program: ExportedProgram) -> fx.Node:
    (output,) = program.graph.find_nodes(op="output")
    values: Any = output.args[0]
    first: fx.Node = values[0] if isinstance(values[0], fx.Node) else output
    return first


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its modules with plain forward methods."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    plain = {module: forward for module in modes if (forward := _plain_forward(module)) is not None}
    own = {module: module.__dict__["forward"] for module in plain if "forward" in module.__dict__}
    try:
        for module, forward in plain.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in plain:
            del module.__dict__["forward"]
        for module, forward in own.items():
            module.__dict__["forward"] = forward
        for module, training in modes.items():
            module.training = training


def pads_values(module: nn.Module | None) -> bool:
    """Whether a convolution pads with values of its input, which is a part of it and no op of its own."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.padding_mode != "zeros"  # type: ignore[union-attr]


def _plain_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """For a module whose ops do not tell what it is, a forward method whose one op does."""
    if type(module).__name__ in DROP_PATHS:
        p = float(getattr(module, "p", None) or getattr(module, "drop_prob", None) or 0.0)
        return lambda x: torch.dropout(x, p, False)
    if isinstance(module, FrozenBatchNorm2d):
        norm = module  # its tensors are looked up when it runs: then they are those of the program
        return lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    if pads_values(module):
        conv: Any = module
        function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[type(module)]  # type: ignore[index]
        return lambda x: function(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export says on stderr about a model that it refuses."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _read(model: nn.Module, program: ExportedProgram) -> Trace:
    spec = program.call_spec.out_spec
    if spec is None or not spec.is_leaf() or not isinstance(_output(program).meta.get("val"), Tensor):
        raise ModelError("the model must return one tensor of logits in evaluation mode; wrap it so that it does")
    graph, signature = program.graph_module, program.graph_signature
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first_path = {id(value): path for path, value in reversed(own.items())}
    path_of = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    tensors: dict[fx.Node, Tensor] = {}
    paths: dict[fx.Node, str] = {}
    images: list[fx.Node] = []
    for node in graph.graph.find_nodes(op="placeholder"):
        path = path_of.get(node.name)
        if path is not None:
            tensors[node] = own[path]
            paths[node] = first_path[id(own[path])]
        elif node.name in constants:
            value = program.constants[constants[node.name]]
            assert isinstance(value, Tensor)
            tensors[node], paths[node] = value, ""
        else:
            images.append(node)
    assert len(images) == 1
    return Trace(graph, images[0], tensors, paths)
