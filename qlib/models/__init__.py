"""Models by name, and a user's own: `find_model` tells about one, `create_model` builds it.

Importing this package imports neither torch nor torchvision.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from qlib.errors import ModelError, did_you_mean
from qlib.models.names import SOURCES, family_of, model_names, names_python_file, refuse_python_file
from qlib.models.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ModelSpec", "create_model", "find_model", "model_names", "refuse_python_file"]


def find_model(arch: str) -> ModelSpec:
    """The model of that name, in any case, or a user's own, as `path/to/file.py:function`.

    ``timm/NAME`` and ``hf/FOLDER`` are models of timm and of Hugging Face's transformers.

    Raises:
        ModelError: no model has that name; the file or the function is missing, fails, or gives no model.

    >>> spec = find_model("resnet20_cifar")
    >>> spec.dataset, spec.num_classes, spec.input_shape
    ('cifar10', 10, (3, 32, 32))
    >>> find_model("resnet8")
    Traceback (most recent call last):
    qlib.errors.ModelError: unknown model 'resnet8'; give one of 126 names, timm/NAME, hf/FOLDER or your own as \
path/to/file.py:function; did you mean resnet18 or resnet50 or resnet34?
    """
    if names_python_file(arch):
        family, name = "user_model", arch
    elif arch.startswith(tuple(SOURCES)):
        family, name = SOURCES[f"{arch.partition('/')[0]}/"], arch
    else:
        name = arch.lower()
        family = family_of(name) or ""
    if not family:
        names = model_names()
        plain = name.removesuffix("_earlyexit")
        why = ", as models with early exits are not there yet" if plain != name else ""
        raise ModelError(
            f"unknown model {arch!r}{why}; give one of {len(names)} names, timm/NAME, hf/FOLDER or your own as"
            " path/to/file.py:function"
            f"{did_you_mean(plain, names)}"
        )
    return cast(ModelSpec, importlib.import_module(f"qlib.models.{family}").model_spec(name))


def create_model(spec: ModelSpec, *, num_classes: int | None = None, pretrained: bool = False) -> nn.Module:
    """A new model in evaluation mode, with random or pretrained weights.

    Raises:
        ModelError: there are no pretrained weights, they cannot be had, or they have another number of classes.
        CheckpointError: the pretrained weights do not fit.

    >>> model = create_model(find_model("simplenet_cifar"))
    >>> model.training, model.fc3.out_features
    (False, 10)
    """
    classes = spec.num_classes if num_classes is None else num_classes
    if pretrained and spec.weights is None:
        raise ModelError(
            f"there are no pretrained weights for {spec.arch}; give a checkpoint with --exp-load-weights-from instead"
        )
    if pretrained and classes != spec.num_classes:
        raise ModelError(
            f"the pretrained {spec.arch} has {spec.num_classes} classes, not {classes}; "
            f"give a checkpoint of your own with --exp-load-weights-from, or data with {spec.num_classes} classes"
        )
    model = spec.build(classes)
    if pretrained and spec.weights is not None:
        from qlib.checkpoint.fit import load_state

        load_state(model, spec.weights(), f"the pretrained {spec.arch}")
    return model.eval()
