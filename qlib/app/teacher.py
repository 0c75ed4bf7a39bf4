"""Teachers: models with trained weights from which a student learns, and what they say of the training images."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlib.app.images import loader_of, open_split
from qlib.app.job import Job, example_of, tell_masks
from qlib.checkpoint.fingerprint import weights_hash
from qlib.checkpoint.fit import load_state, model_state, remedy_for
from qlib.checkpoint.quantized import float_weights, is_quantized
from qlib.checkpoint.read import read_checkpoint
from qlib.config.flags.groups import KdArgs
from qlib.errors import CheckpointError, ModelError, UsageError
from qlib.files import STATS, expanded
from qlib.graph import LAYOUT, lay_out
from qlib.metrics import MICRO_BATCH
from qlib.models import ModelSpec, create_model, find_model
from qlib.models.transforms import normalization
from qlib.progress import track
from qlib.surgery.recipe_file import THINNING, thinned_as
from qlib.tensor_file import read_tensors, write_tensors
from qlib.users_code import users_code

__all__ = ["SELF", "cached_logits", "load_teacher", "read_logits"]

_log = logging.getLogger(__name__)

SELF = "self"
"""The teacher that is the student's float original."""


def load_teacher(job: Job, args: KdArgs, prefix: str = "--kd-") -> nn.Module:
    """The teacher on the job's device, in evaluation mode, its parameters fixed.

    It is called with the images that the student sees: a teacher that was made for images of another normalization
    converts them, one for images of another size is refused. `self` is a copy of the job's model, so it is to be loaded
    before that is trained. `prefix` spells the settings in errors: `--kd-resume` of a command line is `resume` in YAML.

    Raises:
        UsageError: the teacher has no trained weights, or does not fit the student.
        ModelError: it is unknown, or cannot be built or run.
        CheckpointError: its checkpoint cannot be read, or is of another model.
    """
    assert args.teacher is not None
    resume, pretrained = f"{prefix}resume", f"{prefix}pretrained"
    if args.resume is not None and args.pretrained:
        raise UsageError(f"{resume} and {pretrained} both give the teacher its weights; drop one of them")
    if args.teacher == SELF:
        return _fixed(_own(job, args, prefix), job)
    spec = find_model(args.teacher)
    if spec.input_shape != job.spec.input_shape:
        raise UsageError(
            f"the teacher {spec.arch} is made for images of {_sizes(spec.input_shape)}, and the student"
            f" {job.spec.arch} for {_sizes(job.spec.input_shape)}; give a teacher for images of the same size"
        )
    if args.resume is None and not args.pretrained:
        raise UsageError(
            f"the teacher {spec.arch} would have random weights; give its checkpoint with {resume}, or"
            f" {pretrained} for the published ones"
        )
    teacher = _published(job, spec, resume) if args.resume is None else _resumed(job, spec, args.resume, prefix)
    teacher = _fixed(teacher, job)
    _convert_images(teacher, spec, job)
    _check_logits(teacher, spec, job)
    return teacher


def _fixed(teacher: nn.Module, job: Job) -> nn.Module:
    return lay_out(teacher.to(job.device)).eval().requires_grad_(False)


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _other_classes(spec: ModelSpec, theirs: int, job: Job) -> UsageError:
    return UsageError(
        f"the teacher {spec.arch} has {theirs} classes and the student {job.spec.arch} {job.num_classes}; give a"
        f" teacher that was trained for the same {job.num_classes} classes"
    )


def _own(job: Job, args: KdArgs, prefix: str) -> nn.Module:
    for flag, given in ((f"{prefix}resume", args.resume is not None), (f"{prefix}pretrained", args.pretrained)):
        if given:
            raise UsageError(f"the teacher {SELF!r} is the student as it is loaded, with its weights; drop {flag}")
    config = job.config
    if not (config.pretrained or config.resume_from or config.exp_load_weights_from):
        raise UsageError(
            f"the teacher {SELF!r} would be a student with random weights; load trained ones with --pretrained,"
            " --exp-load-weights-from or --resume-from, or give another teacher"
        )
    return copy.deepcopy(job.model)


def _published(job: Job, spec: ModelSpec, resume: str) -> nn.Module:
    if spec.weights is None:
        raise UsageError(f"there are no published weights of the teacher {spec.arch}; give a checkpoint with {resume}")
    if spec.num_classes != job.num_classes:
        raise _other_classes(spec, spec.num_classes, job)
    return create_model(spec, pretrained=True)


def _resumed(job: Job, spec: ModelSpec, path: Path, prefix: str) -> nn.Module:
    path = expanded(path)
    checkpoint: dict[str, Any] = read_checkpoint(path)
    if is_quantized(checkpoint):
        kept = float_weights(checkpoint)
        if kept is None:
            raise CheckpointError(
                f"{str(path)!r} holds integers, and a teacher computes in float; give the checkpoint that it was made"
                " from, or write it again with --qe-save-fp-weights"
            )
        checkpoint = {"arch": checkpoint.get("arch"), "state_dict": dict(kept), THINNING: checkpoint.get(THINNING)}
    if checkpoint.get("quantized") is not None:
        _log.warning("Warning: %s was trained with quantizers, and the teacher computes with its float weights", path)
    arch = checkpoint.get("arch")
    if isinstance(arch, str) and arch.lower() != spec.arch.lower() and ".py" not in arch + spec.arch:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of {arch}, and the teacher is {spec.arch}; give {prefix}teacher {arch}, or"
            f" a checkpoint of {spec.arch}"
        )
    state = model_state(checkpoint)
    model = create_model(spec, num_classes=job.num_classes)
    theirs = _classes(state, model, job.num_classes)
    if theirs != job.num_classes:
        raise _other_classes(spec, theirs, job)
    source, remedy = f"the teacher's checkpoint {str(path)!r}", f"give the {prefix}teacher that it was made with"
    model = thinned_as(model, checkpoint, example_of(spec), source)
    load_state(model, state, source, remedy_for(checkpoint, remedy))
    tell_masks(checkpoint, source, "not applied to the teacher")
    return model


def _classes(state: dict[str, Tensor], model: nn.Module, ours: int) -> int:
    """The number of classes of a state that differs from the model in nothing else; else `ours`."""
    wanted = model.state_dict()
    misfits = [
        (state[name], value) for name, value in wanted.items() if name in state and state[name].shape != value.shape
    ]
    outputs = [
        given.shape[0] for given, value in misfits if value.shape[:1] == (ours,) and given.shape[1:] == value.shape[1:]
    ]
    return outputs[0] if outputs and len(outputs) == len(misfits) and len(set(outputs)) == 1 else ours


def _convert_images(teacher: nn.Module, spec: ModelSpec, job: Job) -> None:
    """Lets the teacher normalize the student's images as its own."""
    mine, theirs = normalization(job.spec), normalization(spec)
    if mine is None or theirs is None:
        if spec.arch != job.spec.arch:
            _log.warning("Warning: the teacher %s sees images as the student's transform makes them", spec.arch)
        return
    if mine == theirs:
        return
    (mean, std), (their_mean, their_std) = (
        [torch.tensor(each, device=job.device).view(-1, 1, 1) for each in known] for known in (mine, theirs)
    )
    scale, shift = std / their_std, (mean - their_mean) / their_std
    teacher.register_forward_pre_hook(lambda _, args: (args[0] * scale + shift, *args[1:]))


def _check_logits(teacher: nn.Module, spec: ModelSpec, job: Job) -> None:
    """Raises UsageError or ModelError unless the teacher gives a finite logit for each of the student's classes."""
    what = f"the teacher {spec.arch!r} fails on images of {_sizes(job.spec.input_shape)},"
    with torch.no_grad(), users_code(what, "give another one, or correct its forward"):
        logits: object = teacher(job.example)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else ()
    if len(shape) == 2 and shape[1] != job.num_classes:
        raise _other_classes(spec, shape[1], job)
    if not isinstance(logits, Tensor) or shape != (2, job.num_classes):
        returned = f"a tensor of {_sizes(shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"the teacher {spec.arch!r} returns {returned} for 2 images; make it return one of 2x{job.num_classes}"
        )
    if not torch.isfinite(logits).all():
        raise ModelError(f"the teacher {spec.arch!r} answers NaN or infinity; give it other weights")


def cached_logits(job: Job, teacher: nn.Module, arch: str) -> Tensor:
    """What the teacher says of all training images, ``[images, classes]`` on the CPU; row i is that of image i.

    They are computed once and kept in `stats/`, in a file whose name tells the teacher's weights, the two models, the
    folder and the number of images: change images in place, and the file is to be deleted. One that is damaged is
    computed anew.

    The price of reading them is that the teacher sees each image as evaluation does, while the student sees it changed
    at random: the targets of all epochs are the same. Without the cache both see the same pixels, which usually teaches
    more, and a step takes the teacher's forward pass longer.

    Raises DataError where images are missing or damaged, OutputError where the file cannot be written.
    """
    dataset, config = open_split(job, "train"), job.config
    folder = None if config.data is None else str(expanded(config.data).resolve())
    key = (weights_hash(teacher.state_dict()), arch, job.spec.arch, job.dataset_name, folder, "train", len(dataset))
    stem = re.sub(r"[^\w.-]+", "_", f"{Path(arch).name}_{job.dataset_name}")
    path = STATS / f"{stem}_teacher_{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        found = read_logits(path, (len(dataset), job.num_classes))
        if found is not None:
            _log.info("The teacher's logits of %d images are those in %s", len(dataset), path)
            return found
        _log.warning("Warning: %s is damaged, and is computed again", path)
    loader = loader_of(job, dataset, list(range(len(dataset))), MICRO_BATCH)
    batches = track(
        loader,
        total_images=len(dataset),
        batch_size=MICRO_BATCH,
        description="Teacher",
        print_freq=config.print_freq,
    )
    with torch.no_grad():
        parts = [teacher(images.to(job.device, memory_format=LAYOUT)).float().cpu() for images, _ in batches]
    logits = torch.cat(parts)
    write_tensors(path, {"logits": logits}, "the teacher's logits", parents=True)
    _log.info("The teacher's logits of %d images saved to %s", len(dataset), path)
    return logits


def read_logits(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The logits in a file of `cached_logits`; None where it is damaged, or does not hold finite ones of this shape."""
    try:
        logits = read_tensors(path)[0].get("logits")
    except OSError:
        return None
    if logits is None or logits.shape != shape or logits.dtype != torch.float32:
        return None
    return logits if bool(torch.isfinite(logits).all()) else None
