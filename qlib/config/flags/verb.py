"""What a command line does: one verb of a few, which says what it needs."""

from __future__ import annotations

from enum import Enum

from qlib.config.flags.groups import PRUNED_PARTS
from qlib.config.flags.run_config import RunConfig
from qlib.errors import UsageError

__all__ = ["Verb", "asked", "needs_folder", "nothing_to_do", "verb_of"]


class Verb(Enum):
    """What a run does: of those that its flags ask for, the first in this order.

    `flags` ask for it; `images`: it looks at images; `weights`: it runs the model, whose weights matter. `only`: why
    it has no use for a flag, in a sentence that begins with that flag; the empty text where there are several reasons.
    """

    COMPARE = (("--compare",), False, False, "is ignored: --compare only reads reports")
    SUMMARY = (("--summary",), False, False, "is ignored: --summary only prints")
    CHECK = (("--check",), False, False, "is ignored: --check only prints")
    SENSE = (("--sense",), True, True, "has no effect: --sense only analyses")
    SENSE_PRUNING = (("--sense",), True, True, "has no effect: this --sense only prunes and evaluates")
    QUANTIZE = (("--quantize-eval",), True, True, "")
    CALIBRATE = (("--qe-calibration",), True, True, "has no effect: --qe-calibration alone only collects")
    HISTOGRAMS = (("--activation-histograms",), True, True, "has no effect: --activation-histograms only collects")
    EVALUATE = (("--evaluate",), True, True, "")
    EXPORT = (("--export-onnx", "--verify", "--export-encodings"), False, True, "")
    THINNIFY = (("--thinnify",), False, True, "")
    TRAIN = (("--compress", "--epochs", "--lr"), True, True, "")
    NOTHING = (("--resume-from",), True, True, "")

    def __init__(self, flags: tuple[str, ...], images: bool, weights: bool, only: str) -> None:
        self.flags = flags
        self.images = images
        self.weights = weights
        self.only = only


def asked(config: RunConfig) -> tuple[Verb, ...]:
    """All verbs that the flags ask for, the one that is done first.

    >>> from qlib.config.flags.groups import QuantArgs
    >>> [verb.name for verb in asked(RunConfig(evaluate=True, qe=QuantArgs(calibration=0.1)))]
    ['CALIBRATE', 'EVALUATE']
    """
    wanted = {
        Verb.COMPARE: bool(config.compare),
        Verb.SUMMARY: bool(config.summary),
        Verb.CHECK: config.check,
        Verb.SENSE: config.sense is not None and config.sense not in PRUNED_PARTS,
        Verb.SENSE_PRUNING: config.sense in PRUNED_PARTS,
        Verb.QUANTIZE: config.quantize_eval,
        Verb.CALIBRATE: config.qe.calibration is not None,
        Verb.HISTOGRAMS: config.activation_histograms is not None,
        Verb.EVALUATE: config.evaluate,
        Verb.EXPORT: config.exports,
        Verb.THINNIFY: config.thinnify and not config.trains,
        Verb.TRAIN: config.trains,
    }
    return tuple(verb for verb in Verb if wanted.get(verb, False))


def verb_of(config: RunConfig) -> Verb:
    """What a run does; `NOTHING` where no flag says so: a quantized checkpoint is evaluated without being asked."""
    return next(iter(asked(config)), Verb.NOTHING)


def needs_folder(config: RunConfig) -> bool:
    """Whether the run cannot do without a DATASET_DIR, as far as the command line alone can tell.

    A checkpoint or a model of the user's own may turn out to need one too.
    """
    digits = config.dataset == "digits" or (config.dataset is None and "digits" in config.arch)
    loads = config.resume_from is not None or config.exp_load_weights_from is not None
    return verb_of(config).images and not (digits or loads or ".py:" in config.arch)


def nothing_to_do() -> UsageError:
    """The error of a command line that asks for nothing."""
    return UsageError(
        "nothing to do: add --evaluate, --prune, --quantize-eval, --qe-calibration, --compress, --epochs or --lr"
        " to train, --export-onnx, --thinnify, --sense, --summary or --check"
    )
