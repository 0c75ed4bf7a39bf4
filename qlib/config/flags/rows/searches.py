"""The flags of searches: bits under a budget, ranges by LAPQ, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping

from qlib.config.flags.flag import Flag, Ignored, Need, shared
from qlib.config.flags.groups import NORMS, PRUNED_PARTS
from qlib.config.flags.kinds import SWITCH, bit_widths, budget, choice, fraction, real, sparsity_range, whole
from qlib.config.flags.rows.common import ALL_BUT_SUMMARY
from qlib.values import Interval

__all__ = ["GROUPS"]

_SEARCHES = ("powell", "nelder-mead", "cobyla")
_LAPQ = Need(("--qe-lapq",))
_STARTS_IN_NORM = tuple(f"--lapq-init-mode {norm}" for norm in NORMS)

_AUTO = Need(("--auto",))

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "The best settings that the time allows": (
        Flag(
            "--auto",
            SWITCH,
            "try settings from cheap to dear until the target or the time is reached, judged on training images that"
            " calibration does not see, and take the best; implies --quantize-eval",
            "automatic",
        ),
        Flag(
            "--auto-agree",
            real(Interval(0, 100, open_low=True), "a number above 0 and at most 100, in percent"),
            "target: percent of predictions that are those of FP32 (default: 99, without --auto-drop)",
            needs=(_AUTO,),
        ),
        Flag(
            "--auto-drop",
            real(Interval(0, 100), "a number from 0 to 100, in points of Top1"),
            "target: points of Top1 below FP32, at most",
            needs=(_AUTO,),
        ),
        Flag(
            "--auto-minutes", real(Interval(0, open_low=True)), "minutes after which no trial goes on", needs=(_AUTO,)
        ),
        Flag(
            "--auto-bits",
            whole(2, 16),
            "bits of weights and activations, where no other flag gives them",
            needs=(_AUTO,),
        ),
    ),
    "Mixed precision (with --quantize-eval)": (
        Flag(
            "--qe-budget",
            budget(),
            "choose the bits of each layer: 3.2MB of weights, 4.5bits for each weight on average, or 12GBOPs, which"
            " choose those of activations too",
        ),
        Flag(
            "--qe-bits-choices",
            bit_widths(),
            "bits to choose from, with --qe-budget",
            needs=(Need(("--qe-budget",)),),
        ),
    ),
    "LAPQ: ranges that minimise the loss on calibration images (with --quantize-eval)": shared(
        (
            Flag("--qe-lapq --qe-coordinate-search", SWITCH, "search for the ranges of activations and weights"),
            Flag("--lapq-maxiter", whole(1), "most iterations of the search (default: 2)"),
            Flag("--lapq-maxfev", whole(1), "most evaluations of the search"),
            Flag("--lapq-method", choice(_SEARCHES), "method of the search"),
            Flag(
                "--lapq-basinhopping --lapq-bh", SWITCH, "restart the search from other points (scipy's basinhopping)"
            ),
            Flag(
                "--lapq-basinhopping-niter --lapq-bh-niter",
                whole(1),
                "how often it is restarted",
                needs=(Need(("--lapq-basinhopping",)),),
            ),
            Flag(
                "--lapq-init-mode",
                choice(("none", "avg", "laplace", "gauss", *NORMS)),
                "where the search starts: clipping by statistics, or least mean |y - y_q|^p of each tensor"
                " (default: the ranges of the plan or l2, whichever is better)",
            ),
            Flag(
                "--lapq-init-method",
                choice(_SEARCHES),
                "method that finds the l1, l2 and l3 ranges",
                ignored=(
                    Ignored(
                        "has no effect with {by} {lapq.init_mode}",
                        by=("--lapq-init-mode",),
                        unless=_STARTS_IN_NORM,
                    ),
                ),
            ),
            Flag("--lapq-eval-size", fraction(), "fraction of the calibration split to look at, --lapq-images at most"),
            Flag("--lapq-images", whole(1), "most calibration images to look at"),
            Flag(
                "--lapq-eval-memoize-dataloader",
                SWITCH,
                "accepted: images are always kept in memory",
                ignored=(Ignored("is ignored: the images are always kept in memory"),),
            ),
            Flag(
                "--lapq-search-clipping",
                SWITCH,
                "search both ends of a range that is not symmetric, not its size alone",
            ),
        ),
        needs=(_LAPQ,),
    ),
    "Analysis": (
        Flag(
            "--sense",
            choice((*PRUNED_PARTS, "quant")),
            "analyse and stop: Top1, Top5 and loss without the smallest elements, filters or input channels of one"
            " weight at a time; or (quant) loss, Top1 and signal-to-noise ratio with one layer at a time in few bits",
            use=ALL_BUT_SUMMARY,
        ),
        Flag(
            "--sense-range",
            sparsity_range(),
            "first level of sparsity to try, the end of the levels (not tried), and the step between them, with"
            " --sense element, filter and channel",
            use=ALL_BUT_SUMMARY,
            needs=(Need(tuple(f"--sense {what}" for what in PRUNED_PARTS)),),
        ),
        Flag(
            "--sense-bits",
            bit_widths(),
            "bits to try, with --sense quant",
            use=ALL_BUT_SUMMARY,
            needs=(Need(("--sense quant",)),),
        ),
        Flag(
            "--sense-images",
            whole(1),
            "calibration images to look at, with --sense quant and --qe-budget",
            use=ALL_BUT_SUMMARY,
            needs=(Need(("--sense quant", "--qe-budget"), also=("--auto",)),),
        ),
    ),
}
