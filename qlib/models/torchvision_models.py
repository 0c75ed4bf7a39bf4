"""All classifiers of torchvision, with their own evaluation transforms and pretrained weights."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

import torch
from torch import nn
from torchvision import models

from qlib.errors import ModelError
from qlib.models.spec import ModelSpec, StateDict

# Their auxiliary heads only serve training. Their published weights expect a model that changes the normalization of
# its own input, so one that is built without weights does so too: weights loaded later would be wrong otherwise.
_INCEPTIONS = ("googlenet", "inception_v3")


def _build(arch: str, side: int, num_classes: int) -> nn.Module:
    extra: dict[str, Any] = {}
    if arch in _INCEPTIONS:
        extra = {"aux_logits": False, "init_weights": False, "transform_input": True}
    elif arch.startswith("vit_"):  # made for images of one size: that of the published weights
        extra = {"image_size": side}
    return cast(nn.Module, models.get_model(arch, weights=None, num_classes=num_classes, **extra))


def _download(arch: str, url: str) -> StateDict:
    """The state dict at `url`, from the folder where torch keeps such files, or else downloaded into it."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=sys.stderr.isatty(), check_hash=True, weights_only=True
        )
    except OSError as error:
        raise ModelError(
            f"cannot download the weights of {arch} from {url} ({error}); "
            f"save that file as {file}, or give a checkpoint with --exp-load-weights-from"
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"cannot read the weights of {arch} ({reason}); delete {file} and try again") from error
    return cast(StateDict, state)


def model_spec(arch: str) -> ModelSpec:
    """The spec of a torchvision classifier; its transform is the one of its default weights."""
    weights: Any = models.get_model_weights(arch).DEFAULT
    transform = weights.transforms()
    (side,) = transform.crop_size
    return ModelSpec(
        arch,
        "imagenet",
        len(weights.meta["categories"]),
        (3, side, side),
        transform,
        build=partial(_build, arch, side),
        weights=partial(_download, arch, weights.url),
    )
