"""Models of timm, as ``timm/NAME``, with the images and the weights that timm says they were made for."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn

from qlib.errors import ModelError, did_you_mean
from qlib.models.logits import with_logits
from qlib.models.spec import ModelSpec, StateDict

__all__ = ["model_spec"]

PREFIX = "timm/"


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise ModelError("models of timm need the package timm; run: pip install 'qlib-compress[timm]'") from error
    return timm


def model_spec(arch: str) -> ModelSpec:
    """The spec of ``timm/NAME``, NAME with or without the tag of its weights.

    Raises:
        ModelError: timm is not installed, or has no such model.
    """
    timm, name = _timm(), arch.removeprefix(PREFIX)
    if not timm.is_model(name):
        close = did_you_mean(name, timm.list_models())
        raise ModelError(f"timm has no model {name!r}{close or '; timm.list_models() lists them'}")
    settings = timm.models.get_pretrained_cfg(name)
    config = timm.data.resolve_data_config({}, pretrained_cfg=settings.to_dict() if settings is not None else {})
    return ModelSpec(
        arch,
        "imagenet",
        int(getattr(settings, "num_classes", None) or 1000),
        tuple(config["input_size"]),
        timm.data.create_transform(**config, is_training=False),
        build=partial(_build, name),
        weights=partial(_weights, name),
    )


def _build(name: str, num_classes: int) -> nn.Module:
    try:
        return with_logits(_timm().create_model(name, pretrained=False, num_classes=num_classes))
    except Exception as error:  # a model of timm may need what is not installed
        raise ModelError(f"timm cannot build {name!r}: {' '.join(str(error).split())[:300]}; give another") from error


def _weights(name: str) -> StateDict:
    try:
        return cast(StateDict, _timm().create_model(name, pretrained=True).state_dict())
    except Exception as error:  # what a download may raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"timm cannot load the weights of {name!r} ({reason}); give a checkpoint with --exp-load-weights-from"
        ) from error
