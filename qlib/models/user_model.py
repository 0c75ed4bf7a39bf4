"""A user's own model: `path/to/file.py:function`, a function that returns an `nn.Module`.

The function is called with `num_classes=` if it takes that. The module that it returns may say what it was made for,
by attributes: `dataset` (a name), `input_shape` (channels, height, width), `transform` and `train_transform` (RGB image
-> tensor) and `num_classes`. Without them it is taken for an ImageNet model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qlib.errors import ModelError, did_you_mean
from qlib.models.logits import with_logits
from qlib.models.spec import ModelSpec
from qlib.models.transforms import evaluation_transform, known_datasets, standard_classes, standard_input_shape


def model_spec(arch: str) -> ModelSpec:
    """The spec of the model that `arch` (`path/to/file.py:function`) gives, which is built once to see its attributes.

    Raises:
        ModelError: the file or function is missing, fails, returns no module, or an attribute is wrong.
    """
    path, _, name = arch.partition(".py:")
    if not name:
        raise ModelError(f"{arch!r} names no function; write it as path/to/file.py:function")
    function = _function(Path(f"{path}.py").expanduser(), name)
    model = _call(function, arch, None)
    dataset = getattr(model, "dataset", "imagenet")
    if dataset not in known_datasets():
        allowed = ", ".join(known_datasets())
        raise ModelError(f"{arch!r} has the attribute dataset = {dataset!r}; make it one of {allowed}")
    shape = _input_shape(getattr(model, "input_shape", standard_input_shape(dataset)), arch)
    transform = getattr(model, "transform", None) or evaluation_transform(dataset, shape)
    training = getattr(model, "train_transform", None)
    for attribute, value in (("transform", transform), ("train_transform", training)):
        if value is not None and not callable(value):
            raise ModelError(f"{arch!r} has the attribute {attribute} = {value!r}; make it a function of an image")
    classes = getattr(model, "num_classes", standard_classes(dataset))
    if type(classes) is not int or classes < 1:
        raise ModelError(f"{arch!r} has the attribute num_classes = {classes!r}; make it a number from 1")
    build = partial(_call, function, arch)
    return ModelSpec(arch, dataset, classes, shape, transform, build, train_transform=training)


def _input_shape(shape: Any, arch: str) -> tuple[int, int, int]:
    match shape:
        case (int(channels), int(height), int(width)) if min(channels, height, width) > 0:
            return channels, height, width
    raise ModelError(
        f"{arch!r} has the attribute input_shape = {shape!r}; make it (channels, height, width), such as (3, 224, 224)"
    )


def _function(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise ModelError(f"there is no model file {str(path)!r}; give a file that exists, as path/to/file.py:function")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    module_name = f"{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # for what stands beside the file
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{str(path)!r} {_failed(error)}") from error
    functions: dict[str, Callable[..., Any]] = {key: value for key, value in vars(module).items() if callable(value)}
    if name not in functions:
        raise ModelError(
            f"{str(path)!r} has no function {name!r}; define it there, returning an nn.Module"
            f"{did_you_mean(name, functions)}"
        )
    return functions[name]


def _call(function: Callable[..., Any], arch: str, num_classes: int | None) -> nn.Module:
    """The function's model; without `num_classes` it is called with its own default, or 1000 if it has none."""
    try:
        model = function(**_arguments(function, num_classes))
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{arch!r} {_failed(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{arch!r} returns {type(model).__name__!r}, not an nn.Module; make it return the model")
    return with_logits(model)


def _arguments(function: Callable[..., Any], num_classes: int | None) -> dict[str, int]:
    parameters = inspect.signature(function).parameters
    named = parameters.get("num_classes")
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if num_classes is not None:
        return {"num_classes": num_classes} if named or takes_any else {}
    return {"num_classes": 1000} if named and named.default is named.empty else {}


def _failed(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    reason = " ".join(str(error).split())
    return f"fails with {type(error).__name__}{f' ({reason})' if reason else ''}{where}; correct it there"
