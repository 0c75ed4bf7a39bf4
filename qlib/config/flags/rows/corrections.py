"""The flags of corrections that need no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qlib.config.flags.corrections import BIAS_CORRECTIONS, CORRECTION_FLAGS, ROUNDINGS, CorrectionFlag
from qlib.config.flags.flag import Flag, Ignored, Need, Use
from qlib.config.flags.kinds import SWITCH, choice, real, whole
from qlib.config.flags.rows.common import HANDS_OVER
from qlib.config.flags.verb import Verb

__all__ = ["GROUPS"]

_OF_PLAN = Use((*HANDS_OVER.verbs, Verb.CALIBRATE))
_QUANTIZING = Need(("--quantize-eval",), also=("--sense quant",))
_COLLECTING = Need(("--quantize-eval",), also=("--sense quant", "--qe-calibration"))


def _asking(wanted: Callable[[CorrectionFlag], bool]) -> tuple[str, ...]:
    """What asks for the corrections that are wanted; a file of settings may."""
    found = (each for each in CORRECTION_FLAGS.values() if wanted(each))
    return ("--qe-config-file", *(f"{each.flag} {each.name}" if each.choice else each.flag for each in found))


def _correction(each: CorrectionFlag) -> Flag:
    """The flag of a correction that is a switch, or takes a number."""
    number = each.number
    kind = SWITCH if number is None else real(number.interval, metavar=number.name.upper())
    if each.of_float:
        return Flag(each.flag, kind, each.help, needs=(_COLLECTING,))
    return Flag(each.flag, kind, each.help, use=_OF_PLAN, needs=(_QUANTIZING,))


GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "Corrections that need no training (with --quantize-eval)": (
        *(_correction(each) for each in CORRECTION_FLAGS.values() if each.of_float),
        Flag(
            "--ptq-data-free",
            SWITCH,
            "no images at all: ranges and corrections from batch-norm statistics",
            needs=(_QUANTIZING,),
        ),
        Flag(
            "--ptq-rounding",
            choice(ROUNDINGS),
            "how weights are rounded: to the nearest code, or so that the layer's or the block's output changes least",
            use=_OF_PLAN,
            needs=(_QUANTIZING,),
        ),
        *(_correction(each) for each in CORRECTION_FLAGS.values() if not each.of_float and not each.choice),
        Flag(
            "--ptq-bias-correction",
            choice(BIAS_CORRECTIONS),
            "correct the mean of each channel, measured on images or derived from batch-norm statistics",
            use=_OF_PLAN,
            needs=(_QUANTIZING,),
        ),
        Flag(
            "--ptq-images",
            whole(1),
            "calibration images that corrections look at",
            needs=(_COLLECTING,),
            ignored=(
                Ignored(
                    "has no effect: no correction looks at images",
                    unless=("--auto", *_asking(lambda each: each.images)),
                ),
            ),
        ),
        Flag(
            "--ptq-iterations",
            whole(1),
            "optimization steps of each layer or block (default: the method's own)",
            use=_OF_PLAN,
            needs=(_QUANTIZING,),
            ignored=(
                Ignored(
                    "has no effect: --ptq-rounding {ptq.rounding} does not iterate",
                    unless=("--auto", *_asking(lambda each: each.iterates)),
                ),
            ),
        ),
    ),
}
