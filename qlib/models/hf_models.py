"""Image classifiers of transformers in a folder of this machine, as ``hf/PATH``; nothing is downloaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from qlib.errors import ModelError
from qlib.files import expanded
from qlib.models.logits import with_logits
from qlib.models.spec import ModelSpec, StateDict
from qlib.models.transforms import evaluation_transform

__all__ = ["model_spec"]

PREFIX = "hf/"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "models of Hugging Face need the package transformers; run: pip install 'qlib-compress[hf]'"
        ) from error
    return transformers


def model_spec(arch: str) -> ModelSpec:
    """The spec of ``hf/PATH``, a folder that `save_pretrained` wrote, with its image processor where it has one.

    Raises:
        ModelError: transformers is not installed, or the folder holds no image classifier.
    """
    folder = expanded(arch.removeprefix(PREFIX))
    if not (folder / "config.json").is_file():
        raise ModelError(f"there is no model in the folder {str(folder)!r}; give one that save_pretrained wrote")
    config = _loaded("AutoConfig", folder)
    transform, side = None, getattr(config, "image_size", None) or 224
    height, width = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    channels = int(getattr(config, "num_channels", 3))
    if (folder / "preprocessor_config.json").is_file():
        processor = _loaded("AutoImageProcessor", folder)
        transform = partial(_processed, processor)
        size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else processor.size
        height, width = _side(size, "height", height), _side(size, "width", width)
    shape = (channels, height, width)
    return ModelSpec(
        arch,
        "imagenet",
        int(config.num_labels),
        shape,
        transform or evaluation_transform("imagenet", shape),
        build=partial(_build, folder),
        weights=partial(_weights, folder),
    )


def _side(size: Any, which: str, default: int) -> int:
    value = getattr(size, which, None) or getattr(size, "shortest_edge", None)
    if isinstance(size, dict):
        value = size.get(which) or size.get("shortest_edge")
    return int(value or default)


def _processed(processor: Any, image: Any) -> Tensor:
    return cast(Tensor, processor(image, return_tensors="pt")["pixel_values"][0])


def _loaded(kind: str, folder: Path, **options: Any) -> Any:
    try:
        return getattr(_transformers(), kind).from_pretrained(str(folder), local_files_only=True, **options)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged folder makes of it
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{str(folder)!r} holds no image classifier that loads ({reason}); save it again") from error


def _build(folder: Path, num_classes: int) -> nn.Module:
    config = _loaded("AutoConfig", folder, num_labels=num_classes)
    try:
        return with_logits(_transformers().AutoModelForImageClassification.from_config(config))
    except ValueError as error:
        raise ModelError(f"{str(folder)!r} is a {config.model_type}, no image classifier; give another") from error


def _weights(folder: Path) -> StateDict:
    return cast(StateDict, _loaded("AutoModelForImageClassification", folder).state_dict())
