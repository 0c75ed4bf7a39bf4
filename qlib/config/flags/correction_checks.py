"""The flags of corrections: what they need of the others."""

from __future__ import annotations

from dataclasses import replace

from qlib.config.flags.corrections import CORRECTION_FLAGS, CorrectionFlag
from qlib.config.flags.run_config import RunConfig
from qlib.errors import UsageError

__all__ = ["check_corrections", "correction_warnings"]


def check_corrections(config: RunConfig) -> None:
    """Raises UsageError for corrections that exclude each other or what else was asked."""
    ptq, given = config.ptq, config.given
    if ptq.of_plan and config.qe.dynamic:
        raise UsageError("corrections of a plan need fixed ranges, which --qe-dynamic has not; drop one of them")
    if not ptq.data_free:
        return
    with_images: list[str] = [f for f in ("--qe-stats-file", "--qe-calibration", "--qe-dynamic") if f in given]
    asked = [CORRECTION_FLAGS[name] for name in replace(ptq, data_free=False).asked]
    with_images += [_asking(each) for each in asked if each.images]
    if with_images:
        raise UsageError(f"--ptq-data-free uses no images, and {with_images[0]} needs some; drop one of them")


def _asking(correction: CorrectionFlag) -> str:
    """The flag that asks for a correction, with its value where other values need no images."""
    alike = [each for each in CORRECTION_FLAGS.values() if each.flag == correction.flag]
    return correction.flag if all(each.images for each in alike) else f"{correction.flag} {correction.name}"


def correction_warnings(config: RunConfig) -> list[str]:
    """One sentence for each --ptq flag that changes nothing."""
    ptq, given = config.ptq, config.given
    flags = sorted(flag for flag in given if flag.startswith("--ptq-"))
    if not config.quantize_eval and config.sense is None:
        collects = config.qe.calibration is not None
        of_float = [each.flag for each in CORRECTION_FLAGS.values() if each.of_float] + ["--ptq-images"]
        return [
            f"{flag} has no effect without --quantize-eval" for flag in flags if not (collects and flag in of_float)
        ]
    asked, found = [CORRECTION_FLAGS[name] for name in ptq.asked], list[str]()
    if config.qe.config_file is None and not any(each.images for each in asked):
        found.append("--ptq-images has no effect: no correction looks at images")
    if config.qe.config_file is None and not any(each.iterates for each in asked):
        found.append(f"--ptq-iterations has no effect: --ptq-rounding {ptq.rounding} does not iterate")
    return [sentence for sentence in found if sentence.split()[0] in given]
