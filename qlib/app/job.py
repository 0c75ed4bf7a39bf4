"""What a run works on: its settings, folder, device and model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlib.checkpoint.fields import NAME, Record, check_fields
from qlib.checkpoint.fit import load_state, model_state, remedy_for
from qlib.checkpoint.masks import masked_text, masks_for, masks_of, unmasked_text
from qlib.checkpoint.quantized import float_weights, is_quantized
from qlib.checkpoint.read import read_checkpoint
from qlib.config.flags.run_config import RunConfig
from qlib.config.flags.verb import Verb, verb_of
from qlib.data.datasets import open_dataset
from qlib.errors import CheckpointError, ModelError, UsageError
from qlib.graph import capture
from qlib.graph.trace import check_inputs
from qlib.models import ModelSpec, create_model, refuse_python_file
from qlib.models.names import names_python_file
from qlib.models.transforms import standard_classes
from qlib.prune.masks import Masks, apply_masks, masked_count
from qlib.runlog import RunLog
from qlib.surgery.recipe_file import THINNING, thinned_as
from qlib.surgery.widen import find_wide_model, is_wide
from qlib.users_code import users_code

__all__ = ["Job", "choose_device", "example_of", "load_job", "tell_masks"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What every verb works on: the settings, the run's folder, the device and the model.

    `draw` counts the repetitions of a run with `--seeds`: each calibrates on images of its own. `masks` say which
    weights are pruned; the weights have them already, unless the model is to be trained.
    """

    config: RunConfig
    run: RunLog
    device: torch.device
    spec: ModelSpec
    dataset_name: str
    num_classes: int
    model: nn.Module
    draw: int = 0
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_images(self) -> bool:
        """Whether the run was given a dataset, or has one built in."""
        return self.config.data is not None or self.dataset_name == "digits"

    @property
    def calibration_seed(self) -> int:
        """The seed of what calibration draws; what is tested does not depend on the draw."""
        return (self.config.seed + self.draw) % 2**32

    @property
    def example(self) -> Tensor:
        """A batch of two images of the model's size, on its device."""
        return example_of(self.spec, self.device)

    def file(self, name: str) -> Path:
        """A file in the run's folder; the run's name is its prefix, as people's scripts expect."""
        return self.run.folder / (f"{self.config.name}_{name}" if self.config.name else name)


def example_of(spec: ModelSpec, device: torch.device | None = None) -> Tensor:
    """A batch of two images of the size of a model."""
    return torch.zeros(2, *spec.input_shape, device=device)


def choose_device(config: RunConfig) -> torch.device:
    """The first GPU that the flags allow; the CPU where there is none. Raises UsageError for one of others."""
    available = torch.cuda.device_count()
    if not available and config.gpus and not config.cpu:
        _log.info("--gpus %s: this machine has no GPU; the run is on the CPU", ",".join(map(str, config.gpus)))
    if config.cpu or not available:
        return torch.device("cpu")
    wrong = [gpu for gpu in config.gpus or () if gpu >= available]
    if wrong:
        there = f"0 to {available - 1}" if available > 1 else "0"
        raise UsageError(f"--gpus names GPU {wrong[0]}, but this machine has {there}; use --cpu or another number")
    if config.gpus is None or len(config.gpus) > 1:
        _log.info("One GPU is used: %d", (config.gpus or (0,))[0])
    return torch.device("cuda", (config.gpus or (0,))[0])


def load_job(config: RunConfig, run: RunLog, device: torch.device, checkpoint: Mapping[str, Any]) -> Job:
    """Builds the float model and loads its weights; `checkpoint` is what `--resume-from` holds.

    Raises:
        ModelError: the model is unknown or cannot be built.
        CheckpointError: the weights do not fit.
        DataError: the dataset's folder must tell the number of classes, and cannot.
    """
    file = config.resume_from or config.exp_load_weights_from
    if config.exp_load_weights_from is not None:
        checkpoint = _weights_only(config.exp_load_weights_from)
    spec = find_wide_model(_arch(config, checkpoint, file))
    dataset = config.dataset or spec.dataset
    classes = _num_classes(config, spec, dataset)
    model, masks = _load_model(config, spec, classes, checkpoint, file)
    pretrained = "pretrained " if config.pretrained and file is None else ""
    _log.info("=> created a %s%s model with the %s dataset", pretrained, spec.arch, dataset)
    verb = verb_of(config)
    loads_its_own = names_python_file(spec.arch)  # a user's file may have done so
    if verb.weights and verb is not Verb.TRAIN and not (pretrained or file or loads_its_own):
        remedy = "give --pretrained, --resume-from or --exp-load-weights-from for trained ones"
        _log.warning("Warning: the weights are random; %s", remedy)
    _check_weights(model, spec.arch)
    job = Job(config, run, device, spec, dataset, classes, model.to(device), masks=masks)
    if verb.weights:
        _check_output(job)
    return job


def _arch(config: RunConfig, checkpoint: Mapping[str, Any], file: Path | None) -> str:
    """The name of the model: that of the checkpoint, unless the user gives one; a widened model is one of its kind."""
    saved = checkpoint.get("arch")
    if not isinstance(saved, str):
        return config.arch
    check_fields(checkpoint, Record({"arch": NAME}), f"checkpoint {str(file)!r}", "save it again with its own -a")
    if is_wide(saved, config.arch):
        return saved
    if config.arch_given:
        return config.arch
    refuse_python_file(saved, f"checkpoint {str(file)!r}", "-a")
    return saved


def _num_classes(config: RunConfig, spec: ModelSpec, dataset: str) -> int:
    """The classes of the dataset; those of a folder of images are its subfolders, which are there if it is used."""
    if dataset == "imagefolder" and (verb_of(config).weights or config.data is not None):
        return len(open_dataset(dataset, config.data, "val", spec.transform, num_classes=None).classes)
    return spec.num_classes if dataset in (spec.dataset, "imagefolder") else standard_classes(dataset)


def _load_model(
    config: RunConfig, spec: ModelSpec, num_classes: int, checkpoint: Mapping[str, Any], file: Path | None
) -> tuple[nn.Module, Masks]:
    """The model with the weights of the checkpoint, and its masks; without a file, published or random weights."""
    model = create_model(spec, num_classes=num_classes, pretrained=config.pretrained and file is None)
    if file is None:
        return model, {}
    _log.info("=> loading checkpoint %s", file)
    source = f"checkpoint {str(file)!r}"
    model = thinned_as(model, checkpoint, example_of(spec), source)
    load_state(model, model_state(checkpoint), source, remedy_for(checkpoint))
    if config.exp_load_weights_from is not None:
        tell_masks(checkpoint, source, "dropped, as --exp-load-weights-from asks")
        return model, {}
    masks = masks_for(model, checkpoint, source)
    training = verb_of(config) is Verb.TRAIN
    tell_masks(checkpoint, source, "kept in training" if training else "applied")
    if not training:  # which goes on from the weights that lie under masks of the forward pass alone
        apply_masks(model, masks)
    return model, masks


def tell_masks(checkpoint: Mapping[str, Any], source: str, what: str) -> None:
    """Logs what becomes of the masks in a checkpoint, if there are any, and what they are."""
    if masked_count(masks := masks_of(checkpoint, source)):
        state = unmasked_text(masks, model_state(checkpoint))
        _log.info("The masks in %s are %s: they zero %s; %s", source, what, masked_text(masks), state)


def _check_weights(model: nn.Module, arch: str) -> None:
    """Raises ModelError for what is no float32, NaN or infinity; buffers may hold infinities, as masks do."""
    for name, value in model.named_parameters():
        if value.is_meta or value.layout != torch.strided or value.dtype != torch.float32:
            kind = "on the meta device" if value.is_meta else str(value.layout if value.is_sparse else value.dtype)
            raise ModelError(
                f"the weights {name!r} of {arch} are {kind}; they must be dense numbers of torch.float32, as"
                " .float() makes them"
            )
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    bad += [name for name, value in model.named_buffers() if not value.is_meta and torch.isnan(value).any()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ModelError(f"the weights {bad[0]!r}{more} of {arch} hold NaN or infinity; give others")


def _check_output(job: Job) -> None:
    """A model of the user's own may return anything. Raises ModelError unless it returns a logit for each class."""
    check_inputs(job.model)
    with torch.inference_mode(), users_code(f"{job.spec.arch!r} fails on images of {_sizes(job.spec.input_shape)},"):
        logits: object = job.model(job.example)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape != (2, job.num_classes):
        returned = type(logits).__name__ if shape is None else f"a tensor of {_sizes(shape)}"
        raise ModelError(
            f"{job.spec.arch!r} returns {returned} for 2 images, and the dataset has {job.num_classes} classes;"
            f" make it return a tensor of 2x{job.num_classes}, or give data with as many classes"
        )
    assert isinstance(logits, Tensor)
    if not logits.is_floating_point():
        raise ModelError(
            f"{job.spec.arch!r} returns logits of {logits.dtype}; make it return float32, before any argmax or cast"
        )
    if names_python_file(job.spec.arch):
        _check_repeats(job)


def _check_repeats(job: Job) -> None:
    """Warns of a model whose answer is another each time: what is captured of it is one of them.

    Raises ModelError where the answer to an image depends on those beside it: no batch tells what is deployed.
    """
    images = torch.linspace(-1, 1, job.example.numel(), device=job.device).view_as(job.example)
    with torch.inference_mode():
        first, second = (job.model(images) for _ in range(2))
    if torch.equal(first, second) and not _answers_alone(job, images[1:], first[1:]):
        capture(job.model, job.example)  # names the line, where it cannot be captured for that
        raise ModelError(
            f"{job.spec.arch!r} answers an image alone in another way than in a batch, where its logits depend on the"
            " other images; compute nothing over the first dimension, as x.mean(0) does, and give batch-norms their"
            " running statistics"
        )
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
        _log.warning(
            "Warning: %s answers the same images in another way each time (random numbers, or what it keeps of the"
            " last ones); what is quantized computes one of the ways",
            job.spec.arch,
        )


@torch.inference_mode()
def _answers_alone(job: Job, image: Tensor, logits: Tensor) -> bool:
    """Whether a model answers an image alone as it does in a batch; it may as well fail."""
    try:
        with users_code(f"{job.spec.arch!r} fails on one image,"):
            return torch.allclose(logits, job.model(image), rtol=1e-2, atol=1e-3, equal_nan=True)
    except ModelError:
        return False


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _weights_only(path: Path) -> Mapping[str, Any]:
    checkpoint = read_checkpoint(path)
    if not is_quantized(checkpoint):
        return checkpoint
    kept = float_weights(checkpoint)
    if kept is None:
        raise CheckpointError(
            f"{path} holds integers, not float weights; evaluate it with --resume-from,"
            " or write it again with --qe-save-fp-weights"
        )
    return {"arch": checkpoint.get("arch"), "state_dict": kept, THINNING: checkpoint.get(THINNING)}
