"""Feature matching for distillation: layers of a student learn the outputs of layers of its teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qlib.config.layers.aliases import spellings_of
from qlib.errors import ConfigError, ModelError, did_you_mean
from qlib.graph.ir import name_of

__all__ = ["MATCHES", "Matching", "ForwardHooks", "attention_loss", "feature_loss", "named_outputs"]


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart two layers look at an image: ``mean_n || Q_s / |Q_s| - Q_t / |Q_t| ||^2``, from 0 to 2.

    ``Q[n, h, w] = sum_c x[n, c, h, w]^2`` is the attention map of ``x [N, C, H, W]``; the channels may differ.

    References:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, section 3.1. They give a mean over the
        positions the weight 1000, which is the weight 1000 / (H * W) here.

    >>> left, right = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]])
    >>> attention_loss(left, 2 * left).item(), attention_loss(left, right).item()
    (0.0, 2.0)
    """
    return (_attention(student) - _attention(teacher)).pow(2).sum(1).mean()


def _attention(x: Tensor) -> Tensor:
    """``[N, C, ...] -> [N, positions]``, of length 1; all 0 where the layer is."""
    return F.normalize(x.pow(2).sum(1).flatten(1))


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two tensors of one shape.

    References:
        Romero et al.: FitNets, ICLR 2015, equation 3, without the regressor that changes the shape.

    >>> feature_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 5.0]])).item()
    4.5
    """
    return F.mse_loss(student, teacher)


MATCHES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"attention": attention_loss, "feature": feature_loss}
"""`match_kind` in a schedule -> the loss of a pair of layers."""


def named_outputs(model: nn.Module, absorbed: Mapping[str, str] | None = None) -> dict[str, nn.Module]:
    """Name -> the module whose output has that name in the float model.

    In a graph whose nodes are named, `absorbed` says which layer computes a batch-norm or an activation as well; the
    last of them names what leaves the layer. The name of a container stands for the last layer in it. Layers may be
    named as they are elsewhere.

    >>> list(named_outputs(nn.Sequential(nn.ReLU())))
    ['0']
    >>> list(named_outputs(nn.ModuleDict({"layer1": nn.ModuleDict({"0": nn.ModuleDict({"bn2": nn.ReLU()})})})))[-2:]
    ['layer1.0.bn2', 'layer1.0.bn1_2']
    """
    found = _named_outputs(model, absorbed or {})
    return {spelling: found[name] for name, spellings in spellings_of(found).items() for spelling in spellings}


def _named_outputs(model: nn.Module, absorbed: Mapping[str, str]) -> dict[str, nn.Module]:
    """By their own names alone."""
    if not isinstance(model, fx.GraphModule) or not any("name" in node.meta for node in model.graph.nodes):
        return {name: module for name, module in model.named_modules() if name}
    layers = {
        name_of(node): model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module"
    }
    containers: dict[str, nn.Module] = {}
    for name, module in layers.items():
        parts = name.split(".")
        containers.update({".".join(parts[:end]): module for end in range(1, len(parts))})
    leaving = {layer: name for name, layer in absorbed.items()}
    return {**containers, **{name: layers[layer] for layer, name in leaving.items() if layer in layers}, **layers}


class ForwardHooks:
    """Keeps what some layers of a model give, from `open` to `close`: outside of that the model has no hooks of it."""

    def __init__(self, layers: Mapping[str, nn.Module], whose: str) -> None:
        self._layers, self._whose = layers, whose
        self._seen: dict[str, list[object]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def open(self) -> None:
        """Registers the hooks. What an interrupted step has left is forgotten."""
        self._remove()
        self._seen = {name: [] for name in self._layers}
        for name, module in self._layers.items():
            self._hooks.append(module.register_forward_hook(partial(self._keep, name)))

    def _keep(self, name: str, _module: nn.Module, _args: object, output: object) -> None:
        # A copy, since the next layer may compute in place.
        self._seen[name].append(output.clone() if isinstance(output, Tensor) else output)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def close(self) -> dict[str, Tensor]:
        """Name -> output. Raises ModelError for a layer that did not run once, or gives no tensor."""
        self._remove()
        seen, self._seen = self._seen, {}
        found: dict[str, Tensor] = {}
        for name, outputs in seen.items():
            if len(outputs) != 1:
                raise ModelError(
                    f"layer {name!r} of the {self._whose} runs {len(outputs)} times for an image; match one that runs"
                    " once"
                )
            if not isinstance(outputs[0], Tensor):
                raise ModelError(f"layer {name!r} of the {self._whose} gives no tensor; match one that does")
            found[name] = outputs[0]
        return found


class Matching:
    """Pairs of layers, student's name -> teacher's, and the sum of their losses in a step.

    Raises ConfigError, with all mistakes at once, for layers that are not there, or whose shapes on `example` do not
    fit. The student is run on a copy, so that nothing in it changes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Mapping[str, str],
        kind: str,
        example: Tensor,
        *,
        absorbed: Mapping[str, str] | None = None,
        where: str = "match",
    ) -> None:
        self.pairs, self._kind, self._where = pairs, kind, where
        self._student, self._teacher = self._hooks_of(student, teacher, absorbed)
        trial = copy.deepcopy(student).eval()
        seen = []
        for hooks, model in zip(self._hooks_of(trial, teacher, absorbed), (trial, teacher), strict=True):
            hooks.open()
            with torch.no_grad():
                model(example)
            seen.append(hooks.close())
        self._check_shapes(*seen)

    def _hooks_of(
        self, student: nn.Module, teacher: nn.Module, absorbed: Mapping[str, str] | None
    ) -> tuple[ForwardHooks, ForwardHooks]:
        sides = {
            "student": (list(self.pairs), named_outputs(student, absorbed)),
            "teacher": (list(dict.fromkeys(self.pairs.values())), named_outputs(teacher)),
        }
        problems = [
            f"{self._where}: match names {name!r}, which the {whose} does not have{did_you_mean(name, there)}"
            for whose, (names, there) in sides.items()
            for name in names
            if name not in there
        ]
        if problems:
            raise ConfigError(problems)
        left, right = (
            ForwardHooks({name: there[name] for name in names}, whose) for whose, (names, there) in sides.items()
        )
        return left, right

    def _check_shapes(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
        problems = []
        for mine, theirs in self.pairs.items():
            a, b = student[mine].shape, teacher[theirs].shape
            if self._kind == "feature":
                fits, remedy = a == b, "match layers of one shape, or give match_kind: attention"
            else:
                fits, remedy = a[2:] == b[2:] and len(a) > 2, "match layers whose maps have one size"
            if not fits:
                shapes = f"{mine!r} of the student gives {_sizes(a)} and {theirs!r} of the teacher {_sizes(b)}"
                problems.append(f"{self._where}: {shapes}; {remedy}")
        if problems:
            raise ConfigError(problems)

    def open(self) -> None:
        """Listens to both models, from their next forward pass on."""
        self._student.open()
        self._teacher.open()

    def close(self) -> Tensor:
        """The sum of the losses; both models have run once."""
        student, teacher = self._student.close(), self._teacher.close()
        loss = MATCHES[self._kind]
        losses = [loss(student[mine].float(), teacher[theirs].float()) for mine, theirs in self.pairs.items()]
        return torch.stack(losses).sum()


def _sizes(shape: torch.Size) -> str:
    return "x".join(map(str, shape[1:]))
