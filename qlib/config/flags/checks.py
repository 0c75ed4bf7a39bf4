"""What flags need of each other: errors, and warnings of those that have no effect.

Most warnings follow from the rows of the table; what depends on more than which flags stand beside it is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qlib.config.flags.corrections import CORRECTION_FLAGS, CorrectionFlag
from qlib.config.flags.flag import Flag
from qlib.config.flags.groups import GROUPS
from qlib.config.flags.pruning import CHANNEL_PRUNERS
from qlib.config.flags.run_config import RunConfig, settings_by_name
from qlib.config.flags.table import FLAGS
from qlib.config.flags.verb import asked, nothing_to_do, verb_of
from qlib.errors import UsageError
from qlib.quant.clip_names import CLIP_PARAMETERS, WEIGHT_CLIPS

__all__ = ["check_combination", "searches", "startup_warnings"]

_BY_NAME = {flag.name: flag for flag in FLAGS}

#: Flags of which one run can have only one, with what each of them does.
_EXCLUSIVE: tuple[dict[str, str], ...] = (
    {
        "--resume-from": "loads a checkpoint with all that belongs to it",
        "--resume": "is the old name of --resume-from",
        "--exp-load-weights-from": "loads only the weights of a checkpoint",
    },
    {
        "--qe-stats-file": "reads activation ranges from a file",
        "--qe-dynamic": "computes activation ranges for each batch",
        "--qe-calibration": "collects activation ranges first",
        "--qe-config-file": "takes all quantization settings from a file",
    },
    *(
        {"--auto": "chooses the settings itself", flag: what}
        for flag, what in {
            "--qe-config-file": "takes all of them from a file",
            "--qe-stats-file": "takes ranges of one float model, and some of its trials change the model",
            "--qe-dynamic": "has no fixed ranges, which its trials need",
            "--ptq-data-free": "uses no images, which its trials need",
            "--sense": "only analyses",
            "--seeds": "repeats one setting",
        }.items()
    ),
)


def check_combination(config: RunConfig) -> None:
    """Checks what no flag can check alone.

    Raises:
        UsageError: flags that exclude each other or lack another, or a command line that asks for nothing.
    """
    _check_exclusive(config)
    _check_clipping(config)
    _check_quantized(config)
    _check_searches(config)
    _check_pruning(config)
    _check_corrections(config)
    # A quantized checkpoint is evaluated without being asked; whether it is one is known once it is read.
    if not asked(config) and config.resume_from is None:
        raise nothing_to_do()


def _check_exclusive(config: RunConfig) -> None:
    for group in _EXCLUSIVE:
        both = [flag for flag in group if flag in config.given][:2]
        if len(both) == 2:
            reason = ", and ".join(f"{flag} {group[flag]}" for flag in both)
            raise UsageError(f"{both[0]} and {both[1]} cannot be combined: {reason}; drop one of them")


def _check_clipping(config: RunConfig) -> None:
    qe = config.qe
    if qe.clip_acts == "n_std" and "clip_n_stds" not in qe.clip_parameters and qe.config_file is None:
        raise UsageError(
            "--qe-clip-acts n_std needs --qe-clip-n-stds, the number of standard deviations to keep, above 0"
        )


def _check_quantized(config: RunConfig) -> None:
    for flag, given in (("--verify", config.verify is not None), ("--export-encodings", config.export_encodings)):
        if given and not config.quantize_eval and config.resume_from is None:
            raise UsageError(
                f"{flag} needs a quantized model: add --quantize-eval, or --resume-from a quantized checkpoint"
            )


def _check_pruning(config: RunConfig) -> None:
    prune = config.prune
    if prune.method is None:
        return
    if prune.method in CHANNEL_PRUNERS:
        if prune.budget is None or prune.level is not None or prune.pattern is not None:
            raise UsageError(f"--prune {prune.method} removes channels: give --prune-budget, and no level or pattern")
    elif prune.budget is not None:
        names = " or ".join(CHANNEL_PRUNERS)
        raise UsageError(f"--prune-budget is of channels, which --prune {names} remove, not {prune.method}")
    elif prune.level is None and prune.pattern is None:
        raise UsageError(
            f"--prune {prune.method} needs --prune-level, the share of the weights to remove, or --prune-pattern N:M"
        )
    if prune.level is not None and prune.pattern is not None:
        raise UsageError("--prune-level and --prune-pattern cannot be combined: both tell how many weights stay")
    if config.trains:
        raise UsageError("--prune comes before training: run it alone, then train its checkpoint with --resume-from")


def searches(config: RunConfig) -> list[str]:
    """The flags that ask for a search."""
    qe = config.qe
    wanted = {"--sense": config.sense == "quant", "--qe-budget": qe.budget is not None, "--qe-lapq": qe.lapq}
    return [flag for flag, is_wanted in wanted.items() if is_wanted]


def _check_searches(config: RunConfig) -> None:
    for flag in searches(config):
        if flag != "--sense" and not config.quantize_eval:
            raise UsageError(f"{flag} needs --quantize-eval, which quantizes the model and evaluates it")
        if config.qe.dynamic:
            raise UsageError(
                f"{flag} and --qe-dynamic cannot be combined: {flag} needs ranges that are the same for all images;"
                " drop one of them"
            )


def _check_corrections(config: RunConfig) -> None:
    ptq, given = config.ptq, config.given
    if ptq.of_plan and config.qe.dynamic:
        raise UsageError("corrections of a plan need fixed ranges, which --qe-dynamic has not; drop one of them")
    if not ptq.data_free:
        return
    with_images: list[str] = [f for f in ("--qe-stats-file", "--qe-calibration", "--qe-dynamic") if f in given]
    wanted = [CORRECTION_FLAGS[name] for name in replace(ptq, data_free=False).asked]
    with_images += [_asking(each) for each in wanted if each.images]
    if with_images:
        raise UsageError(f"--ptq-data-free uses no images, and {with_images[0]} needs some; drop one of them")


def _asking(correction: CorrectionFlag) -> str:
    """The flag that asks for a correction, with its value where other values need no images."""
    alike = [each for each in CORRECTION_FLAGS.values() if each.flag == correction.flag]
    return correction.flag if all(each.images for each in alike) else f"{correction.flag} {correction.name}"


def startup_warnings(config: RunConfig) -> list[str]:
    """One sentence for each flag the user gave that will not have the effect it seems to ask for, in their order.

    >>> startup_warnings(RunConfig(cpu=True, gpus=(0,), given=frozenset({"--cpu", "--gpus"})))
    ['--gpus is ignored: --cpu overrides it']
    """
    reasons = ((flag, next(_reasons(config, flag), None)) for flag in FLAGS if flag.name in config.given)
    return [f"{flag.name} {reason}" for flag, reason in reasons if reason is not None]


def _reasons(config: RunConfig, flag: Flag) -> Iterator[str]:
    """Why a flag has no effect; nothing where it has one."""
    verb = verb_of(config)
    if flag.name in config.repeated:
        value = settings_by_name(config)[flag.target]
        yield "is given more than once" + ("" if value is True else f": the last value counts, {value}")
    if verb not in flag.use.verbs and verb.only:
        yield verb.only
    for need in flag.needs:
        if not any(_is_on(config, each) for each in (*need.flags, *need.also)):
            yield f"has no effect without {' or '.join(need.flags)}"
    for ignored in flag.ignored:
        by = next((each for each in ignored.by if _is_on(config, each)), None)
        if (by or not ignored.by) and not any(_is_on(config, each) for each in ignored.unless):
            groups = {name: getattr(config, name) for name in GROUPS}
            yield ignored.why.format(by=by, **groups)
    if verb not in flag.use.verbs and not any(_is_on(config, each) for each in flag.use.also):
        by = next((each for each in verb.flags if each in config.given), "these flags")
        yield f"is ignored: with {by} {flag.use.otherwise}"
    yield from _budget_reasons(config, flag)
    yield from _clip_reasons(config, flag)


def _is_on(config: RunConfig, words: str) -> bool:
    """Whether a flag was given, and not as what a switch is without it; or, with a value, whether it has that."""
    name, _, text = words.partition(" ")
    value = settings_by_name(config)[_BY_NAME[name].target]
    if text:
        return str(value) == text
    return name in config.given and value is not None and value is not False and value != ()


def _budget_reasons(config: RunConfig, flag: Flag) -> Iterator[str]:
    """A budget chooses the bits that are not 0: those of weights, one of operations those of activations too."""
    budget = config.qe.budget or ""
    chosen = {"--qe-bits-wts": bool(budget), "--qe-bits-acts": budget.endswith("BOPs")}
    if chosen.get(flag.name) and not _is_on(config, f"{flag.name} 0"):
        yield "is ignored: --qe-budget tells which are tried"


def _clip_reasons(config: RunConfig, flag: Flag) -> Iterator[str]:
    """A parameter of a clip method matters to that method and to `auto`, which tries it."""
    key, qe = flag.target.removeprefix("qe."), config.qe
    if key not in CLIP_PARAMETERS or qe.config_file is not None:
        return
    method = CLIP_PARAMETERS[key].method
    if method not in WEIGHT_CLIPS and qe.clip_acts not in (method, "auto"):
        yield f"is ignored: --qe-clip-acts is {qe.clip_acts}, not {method}"
    elif method in WEIGHT_CLIPS and not {qe.clip_acts, qe.clip_wts} & {method, "auto"}:
        yield f"is ignored: neither --qe-clip-acts nor --qe-clip-wts is {method} or auto"
