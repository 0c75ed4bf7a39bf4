"""The flags of pruning without training."""

from __future__ import annotations

from collections.abc import Mapping

from qlib.config.flags.flag import Flag, Ignored, Need, Use, shared
from qlib.config.flags.kinds import choice, names, real, whole
from qlib.config.flags.pruning import CHANNEL_PRUNERS, PRUNERS, REPAIRS, SCOPES, budget, pattern
from qlib.config.flags.verb import Verb
from qlib.values import Interval

__all__ = ["GROUPS", "PRUNES"]

PRUNES = Use((Verb.QUANTIZE, Verb.EVALUATE), "nothing is pruned")
_PRUNING = Need(("--prune",))
_BUDGET = Need(("--prune-budget",))
_BY_PATTERN = Ignored("has no effect: {by} tells how many weights stay", by=("--prune-pattern",))

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "Pruning without training": (
        Flag(
            "--prune",
            choice((*PRUNERS, *CHANNEL_PRUNERS)),
            "remove weights, or channels (channels-obs, group-norm), repair what is left, evaluate it and write its"
            " checkpoint, before all else that is asked; implies --evaluate",
            "prune.method",
        ),
        *shared(
            (
                Flag(
                    "--prune-level",
                    real(Interval(0, 1, open_low=True, open_high=True), "a share above 0 and below 1, such as 0.5"),
                    "share of the weights that are removed",
                ),
                Flag("--prune-pattern", pattern(), "N of each M weights along the input channels are kept, as in 2:4"),
                Flag(
                    "--prune-budget",
                    budget(),
                    "with a method of channels: macs=0.5, params=0.5 or params=2MB that stay",
                ),
                Flag("--prune-round-to", whole(1), "channels that stay are a multiple of this", needs=(_BUDGET,)),
                Flag(
                    "--prune-scope",
                    choice(SCOPES),
                    "where weights are compared: in each row, in each layer or over all (default: the method's own)",
                    ignored=(_BY_PATTERN,),
                ),
                Flag("--prune-layers", names(), "layers (names or regular expressions) to prune (default: all)"),
                Flag(
                    "--prune-repair",
                    choice(REPAIRS),
                    "what is repaired, each with those before it: batch-norm statistics, weights by least squares, the"
                    " logits by steps without labels",
                ),
                Flag("--prune-images", whole(1), "calibration images that choice and repair look at"),
                Flag(
                    "--prune-steps",
                    whole(1),
                    "steps that --prune-repair logits takes",
                    needs=(Need(("--prune-repair logits",)),),
                ),
            ),
            needs=(_PRUNING,),
        ),
    ),
}
