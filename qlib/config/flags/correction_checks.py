"""The flags of corrections: what they need of the others."""

from __future__ import annotations

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
    with_images += ["--ptq-rounding"] * (ptq.rounding != "nearest") + ["--ptq-bn-reestimation"] * ptq.bn_reestimation
    with_images += ["--ptq-smooth"] * (ptq.smooth is not None)
    with_images += ["--ptq-bias-correction empirical"] * (ptq.bias_correction == "empirical")
    if with_images:
        raise UsageError(f"--ptq-data-free uses no images, and {with_images[0]} needs some; drop one of them")


def correction_warnings(config: RunConfig) -> list[str]:
    """One sentence for each --ptq flag that changes nothing."""
    ptq, given = config.ptq, config.given
    flags = sorted(flag for flag in given if flag.startswith("--ptq-"))
    if not config.quantize_eval and config.sense is None:
        collects = config.qe.calibration is not None
        of_float = ("--ptq-equalize", "--ptq-absorb-bias", "--ptq-smooth", "--ptq-images")
        return [
            f"{flag} has no effect without --quantize-eval" for flag in flags if not (collects and flag in of_float)
        ]
    looks = ptq.smooth is not None or ptq.rounding != "nearest" or ptq.bn_reestimation
    looks = looks or ptq.bias_correction == "empirical" or config.qe.config_file is not None
    found = ["--ptq-images has no effect: no correction looks at images"] if not looks else []
    if ptq.rounding not in ("adaround", "brecq", "qdrop") and config.qe.config_file is None:
        found.append(f"--ptq-iterations has no effect: --ptq-rounding {ptq.rounding} does not iterate")
    return [sentence for sentence in found if sentence.split()[0] in given]
