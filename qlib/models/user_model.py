"""A user's own model: `path/to/file.py:function`, a function that returns an `nn.Module`.

The function is called with `num_classes=` if it takes that. The module that it returns may say what it was made for,
by attributes: `dataset` (a name), `input_shape` (channels, height, width), `transform` and `train_transform` (RGB image
-> tensor) and `num_classes`. Without them it is taken for an ImageNet model.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qlib.errors import ModelError, did_you_mean
from qlib.files import expanded
from qlib.models.logits import with_logits
from qlib.models.spec import ModelSpec
from qlib.models.transforms import (
    UsersTransform,
    evaluation_transform,
    known_datasets,
    standard_classes,
    standard_input_shape,
)
from qlib.users_code import UsersFile, settings_kept, users_code


def model_spec(arch: str) -> ModelSpec:
    """The spec of the model that `arch` (`path/to/file.py:function`) gives, which is built once to see its attributes.

    Raises:
        ModelError: the file or function is missing, fails, returns no module, or an attribute is wrong.
    """
    path, _, name = arch.partition(".py:")
    if not name:
        raise ModelError(f"{arch!r} names no function; write it as path/to/file.py:function")
    function = _function(expanded(f"{path}.py"), name)
    build = partial(_build, function, arch)
    with users_code(f"{arch!r} fails"):  # attributes may be properties
        return _spec_of(build(None), arch, build)


def _spec_of(model: nn.Module, arch: str, build: Callable[[int], nn.Module]) -> ModelSpec:
    """What the model tells about itself by its attributes."""
    dataset, shape = _dataset(model, arch), _input_shape(model, arch)
    transforms = {name: getattr(model, name, None) for name in ("transform", "train_transform")}
    for name, value in transforms.items():
        if value is not None and not callable(value):
            raise _wrong(arch, name, value, "a function of an image")
    own, training = (
        UsersTransform(each, f"the {name} of {arch!r}", shape) if each else None for name, each in transforms.items()
    )
    classes = getattr(model, "num_classes", standard_classes(dataset))
    if type(classes) is not int or classes < 1:
        raise _wrong(arch, "num_classes", classes, "a number from 1")
    transform = own or evaluation_transform(dataset, shape)
    return ModelSpec(arch, dataset, classes, shape, transform, build, train_transform=training)


def _wrong(arch: str, attribute: str, value: object, remedy: str) -> ModelError:
    text = repr(value)
    text = text if len(text) <= 100 else f"{text[:100]}..."
    return ModelError(f"{arch!r} has the attribute {attribute} = {text}; make it {remedy}")


def _dataset(model: nn.Module, arch: str) -> str:
    dataset = getattr(model, "dataset", "imagenet")
    if not isinstance(dataset, str) or dataset not in known_datasets():
        raise _wrong(arch, "dataset", dataset, f"one of {', '.join(known_datasets())}")
    return dataset


def _input_shape(model: nn.Module, arch: str) -> tuple[int, int, int]:
    match getattr(model, "input_shape", standard_input_shape(_dataset(model, arch))):
        case (int(channels), int(height), int(width)) if min(channels, height, width) > 0:
            return channels, height, width
        case shape:
            raise _wrong(arch, "input_shape", shape, "(channels, height, width), such as (3, 224, 224)")


def _function(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise ModelError(f"there is no model file {str(path)!r}; give a file that exists, as path/to/file.py:function")
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    module_name = f"{path.stem}_{digest}"
    loader = UsersFile(module_name, str(path))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # for what stands beside the file
    with users_code(f"{str(path)!r} fails"), settings_kept():
        loader.exec_module(module)
    functions: dict[str, Callable[..., Any]] = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise ModelError(
            f"{str(path)!r} has no function {name!r}; define it there, returning an nn.Module"
            f"{did_you_mean(name, functions)}"
        )
    return functions[name]


def _build(function: Callable[..., Any], arch: str, num_classes: int | None) -> nn.Module:
    """The function's model; without `num_classes` it is called with its own default, or 1000 if it has none."""
    with users_code(f"{arch!r} fails", function=function), settings_kept():
        model = function(**_arguments(function, num_classes))
        if not isinstance(model, nn.Module):
            raise ModelError(f"{arch!r} returns {type(model).__name__!r}, not an nn.Module; make it return the model")
        _guard(model, arch)
        model = with_logits(model)
        if any(map(is_lazy, (*model.parameters(), *model.buffers()))):  # sizes of layers that the first images tell
            model.eval()(torch.zeros(2, *_input_shape(model, arch)))
    return model


def _guard(model: nn.Module, arch: str) -> None:
    """What the forward method raises is one sentence, wherever the model runs; copies of it have their own."""
    if "forward" in vars(model) or not inspect.ismethod(model.forward):  # it is guarded already, or is of no class
        return
    forward = type(model).forward

    @functools.wraps(forward)
    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        shape = next(("x".join(map(str, each.shape[1:])) for each in args if isinstance(each, Tensor)), "no size")
        remedy = "correct its forward, or give the model an attribute input_shape"
        with users_code(f"{arch!r} fails on images of {shape},", remedy, forward):
            return forward(self, *args, **kwargs)

    model.forward = MethodType(guarded, model)


def _arguments(function: Callable[..., Any], num_classes: int | None) -> dict[str, int]:
    parameters = inspect.signature(function).parameters
    named = parameters.get("num_classes")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if num_classes is not None:
        return {"num_classes": num_classes} if named or takes_any else {}
    return {"num_classes": 1000} if named and named.default is named.empty else {}
