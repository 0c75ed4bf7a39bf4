"""The flags of all runs: their folder and device, the model, the data, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlib.config.flags.flag import Flag, Ignored, Use
from qlib.config.flags.groups import PHASES
from qlib.config.flags.kinds import (
    SWITCH,
    arch,
    choice,
    devices,
    existing_file,
    fraction,
    path,
    real,
    reports,
    run_folder,
    run_name,
    whole,
)
from qlib.config.flags.rows.common import ALL_BUT_SUMMARY, EVALUATES, HANDS_OVER, READS, TESTS, TRAINS
from qlib.config.flags.verb import Verb
from qlib.data.names import DATASETS
from qlib.registry import registered
from qlib.values import Interval

__all__ = ["GROUPS"]

_ENGINES = ("torch", "onnxruntime")
_EVALUATING = ("--evaluate", "--quantize-eval", "--sense")
_SHOWS_PROGRESS = replace(READS, otherwise="no progress is shown")
_REPORTS = Use(tuple(verb for verb in Verb if verb not in (Verb.COMPARE, Verb.SUMMARY, Verb.CHECK)))
_VERIFIES = replace(READS, also=("--verify",))
_TRAINS = replace(TRAINS, also=("--activation-stats",))
_NOT_ASKED = Ignored("has no effect without --evaluate", by=Verb.EXPORT.flags, unless=("--evaluate", "--quantize-eval"))

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "General": (
        Flag("--name -n", run_name(), "name of the run: begins the name of its folder"),
        Flag("--out-dir -o", path(), "where the folders of runs are made"),
        Flag("--no-report", SWITCH, "write no report.json and no report.html", use=_REPORTS),
        Flag("--print-freq -p", whole(1), "steps between two progress lines", use=_SHOWS_PROGRESS),
        Flag("--verbose -v", SWITCH, "show debug messages, and the traceback of an error"),
        Flag(
            "--gpus",
            devices(),
            "GPUs to use (default: all)",
            ignored=(Ignored("is ignored: {by} overrides it", by=("--cpu",)),),
        ),
        Flag("--cpu", SWITCH, "use no GPU; overrides --gpus"),
        Flag(
            "--load-serialized",
            SWITCH,
            "accepted: a model is never spread over several GPUs",
            ignored=(Ignored("is ignored: a model is never spread over several GPUs"),),
        ),
        Flag("--seed", whole(0, 2**32 - 1), "seed of all that is random"),
        Flag("--deterministic --det", SWITCH, "deterministic algorithms only"),
        Flag("--summary", choice(tuple(registered("qlib.report")), many="repeat"), "print it and stop"),
        Flag("--check", SWITCH, "print the resolved quantization settings of each layer and stop", use=ALL_BUT_SUMMARY),
    ),
    "Model": (
        Flag(
            "--arch -a",
            arch(),
            "model, by name (in torchvision, the CIFAR and MNIST families, digits_cnn), timm/NAME, hf/FOLDER or "
            "FILE.py:FUNCTION",
        ),
        Flag(
            "--pretrained",
            SWITCH,
            "start from the published weights",
            ignored=(
                Ignored(
                    "is ignored: {by} gives the weights", by=("--resume", "--resume-from", "--exp-load-weights-from")
                ),
            ),
        ),
        Flag("--resume-from", existing_file(), "checkpoint to load with all that belongs to it"),
        Flag(
            "--resume",
            existing_file(),
            None,
            "resume_from",
            ignored=(
                Ignored(
                    "is deprecated: it begins again at epoch 0 with a new optimizer; use --resume-from, which goes on,"
                    " or add --reset-optimizer to it",
                    by=Verb.TRAIN.flags,
                ),
                Ignored("is deprecated: use --resume-from"),
            ),
        ),
        Flag("--exp-load-weights-from", existing_file(), "checkpoint to load the weights from"),
        Flag("--thinnify", SWITCH, "remove the channels whose weights are zero, and save the smaller model"),
    ),
    "Data": (
        Flag(
            "--dataset",
            choice(DATASETS),
            "kind of dataset, imagefolder for a folder with its own classes (default: what the model's name implies)",
        ),
        Flag("--workers -j", whole(0), "processes that read images; 0 reads in this one", use=_VERIFIES),
        Flag("--batch-size -b", whole(1), "images per batch", use=EVALUATES),
        Flag(
            "--validation-split --valid-size --vs",
            real(Interval(0, 1, open_high=True), "a fraction from 0 to below 1"),
            "fraction of the training images held out for validation",
            use=_TRAINS,
        ),
        Flag("--effective-train-size --etrs", fraction(), "fraction of the training images to use", use=_TRAINS),
        Flag("--effective-valid-size --evs", fraction(), "fraction of the validation images to use", use=_TRAINS),
        Flag(
            "--effective-test-size --etes",
            fraction(),
            "fraction of the test images to use",
            use=TESTS,
        ),
        Flag("--skip-corrupt", SWITCH, "leave out images that cannot be read, instead of stopping", use=_VERIFIES),
    ),
    "Evaluation": (
        Flag("--evaluate -e", SWITCH, "evaluate on the test split", use=HANDS_OVER),
        Flag("--confusion", SWITCH, "print the confusion matrix", use=EVALUATES),
        Flag("--compare", reports(), "compare runs, from their reports alone, in one page and one table; and stop"),
        Flag(
            "--activation-stats --act-stats",
            choice(PHASES, many="choices"),
            "write how active each channel is on the images of these phases, behind the run's own work",
            use=EVALUATES,
        ),
        Flag(
            "--activation-histograms --act-hist",
            fraction(),
            "collect histograms of activations on this fraction of the test images and stop",
            use=Use((Verb.HISTOGRAMS,), "no histograms are collected"),
        ),
        Flag("--param-hist", SWITCH, "write histograms of all parameters, as the run leaves them", use=EVALUATES),
        Flag(
            "--masks-sparsity", SWITCH, "print the sparsity of the masks, in training after each epoch", use=HANDS_OVER
        ),
        Flag(
            "--compare-to",
            run_folder(),
            "compare the predictions, image by image, with those of another run on the same images",
            use=HANDS_OVER,
            ignored=(
                _NOT_ASKED,
                Ignored("is ignored: training writes no predictions", by=Verb.TRAIN.flags, unless=_EVALUATING),
            ),
        ),
        Flag(
            "--engine",
            choice(_ENGINES),
            "what computes the model: torch, or ONNX Runtime on the exported file",
            use=HANDS_OVER,
            ignored=(
                _NOT_ASKED,
                Ignored("is ignored: training evaluates with torch", by=Verb.TRAIN.flags, unless=_EVALUATING),
            ),
        ),
    ),
}
