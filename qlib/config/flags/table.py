"""The flags of the command line, as a table: spellings, what each value may be, and the help."""

from __future__ import annotations

from dataclasses import dataclass

from qlib.config.flags.corrections import BIAS_CORRECTIONS, CORRECTION_FLAGS, ROUNDINGS, CorrectionFlag
from qlib.config.flags.groups import BEST_BY, OPTIMIZERS
from qlib.config.flags.groups import GROUPS as ARGUMENT_GROUPS
from qlib.config.flags.kinds import (
    SWITCH,
    Kind,
    arch,
    bit_widths,
    budget,
    choice,
    devices,
    existing_file,
    fraction,
    names,
    new_file,
    path,
    real,
    run_name,
    schedule_file,
    whole,
)
from qlib.config.layers.clips import CLIP_NAMES, CLIP_PARAMETERS, HISTOGRAM_CLIPS, WEIGHT_CLIPS
from qlib.config.layers.keys import SCALES

__all__ = ["FLAGS", "GROUPS", "Flag"]

ENGINES = ("torch", "onnxruntime")
DATASETS = ("imagenet", "imagefolder", "cifar10", "cifar100", "mnist", "fashion-mnist", "digits")
MODES = ("sym", "sym_restr", "asym_s", "asym_u")
IN_RUN_FOLDER = "run-folder"
SEARCHES = ("powell", "nelder-mead", "cobyla")
_POSITIVE = real(lambda number: number > 0, "a number above 0")
_FROM_0 = real(lambda number: number >= 0, "a number from 0")


@dataclass(frozen=True)
class Flag:
    """One row of the table: the spellings (the canonical one first), what the value may be, the help."""

    spellings: str
    kind: Kind
    help: str | None
    field: str = ""

    @property
    def names(self) -> list[str]:
        return self.spellings.split()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def target(self) -> str:
        """The field of `RunConfig` that this flag sets; `qe.mode` is the field `mode` of the group `qe`."""
        words = self.name.removeprefix("--").replace("-", "_")
        group, _, rest = words.partition("_")
        return self.field or (f"{group}.{rest}" if group in ARGUMENT_GROUPS else words)


def _correction(each: CorrectionFlag) -> Flag:
    """The flag of a correction that is a switch, or takes a number."""
    number = each.number
    kind = SWITCH if number is None else real(number.allows, number.allowed, number.name.upper())
    return Flag(each.flag, kind, each.help)


GROUPS: dict[str, tuple[Flag, ...]] = {
    "General": (
        Flag("--name -n", run_name(), "name of the run: begins the name of its folder"),
        Flag("--out-dir -o", path(), "where the folders of runs are made"),
        Flag("--print-freq -p", whole(1), "steps between two progress lines"),
        Flag("--verbose -v", SWITCH, "show debug messages, and the traceback of an error"),
        Flag("--gpus", devices(), "GPUs to use (default: all)"),
        Flag("--cpu", SWITCH, "use no GPU; overrides --gpus"),
        Flag("--seed", whole(0, 2**32 - 1), "seed of all that is random"),
        Flag("--deterministic --det", SWITCH, "deterministic algorithms only"),
        Flag("--summary", choice(("sparsity", "compute", "model", "modules"), many="repeat"), "print it and stop"),
        Flag("--check", SWITCH, "print the resolved quantization settings of each layer and stop"),
    ),
    "Model": (
        Flag(
            "--arch -a",
            arch(),
            "model, by name (in torchvision, the CIFAR and MNIST families, digits_cnn) or FILE.py:FUNCTION",
        ),
        Flag("--pretrained", SWITCH, "start from the published weights"),
        Flag("--resume-from", existing_file(), "checkpoint to load with all that belongs to it"),
        Flag("--resume", existing_file(), None, "resume_from"),
        Flag("--exp-load-weights-from", existing_file(), "checkpoint to load the weights from"),
    ),
    "Data": (
        Flag(
            "--dataset",
            choice(DATASETS),
            "kind of dataset, imagefolder for a folder with its own classes (default: what the model's name implies)",
        ),
        Flag("--workers -j", whole(0), "processes that read images; 0 reads in this one"),
        Flag("--batch-size -b", whole(1), "images per batch"),
        Flag(
            "--validation-split --valid-size --vs",
            real(lambda number: 0 <= number < 1, "a fraction from 0 to below 1"),
            "fraction of the training images held out for validation",
        ),
        Flag("--effective-train-size --etrs", fraction(), "fraction of the training images to use"),
        Flag("--effective-valid-size --evs", fraction(), "fraction of the validation images to use"),
        Flag("--effective-test-size --etes", fraction(), "fraction of the test images to use"),
        Flag("--skip-corrupt", SWITCH, "leave out images that cannot be read, instead of stopping"),
    ),
    "Evaluation": (
        Flag("--evaluate -e", SWITCH, "evaluate on the test split"),
        Flag("--confusion", SWITCH, "print the confusion matrix"),
        Flag("--engine", choice(ENGINES), "what computes the model: torch, or ONNX Runtime on the exported file"),
    ),
    "Training": (
        Flag("--compress", schedule_file(), "train under this schedule, a YAML file", "train.compress"),
        Flag("--epochs", whole(1), "train until so many epochs are done", "train.epochs"),
        Flag("--optimizer", choice(OPTIMIZERS), "what moves the weights", "train.optimizer"),
        Flag("--lr --learning-rate", _POSITIVE, "learning rate to begin with", "train.lr"),
        Flag(
            "--momentum",
            real(lambda number: 0 <= number < 1, "a number from 0 to below 1"),
            "momentum of sgd",
            "train.momentum",
        ),
        Flag("--weight-decay --wd", _FROM_0, "weight decay", "train.weight_decay"),
        Flag(
            "--label-smoothing",
            real(lambda number: 0 <= number < 1, "a number from 0 to below 1"),
            "share of the label that is spread over all classes",
            "train.label_smoothing",
        ),
        Flag("--grad-clip", _POSITIVE, "largest norm of all gradients together", "train.grad_clip"),
        Flag("--amp", SWITCH, "mixed precision, on a GPU", "train.amp"),
        Flag(
            "--reset-optimizer",
            SWITCH,
            "with --resume-from: begin again at epoch 0 with a new optimizer",
            "train.reset_optimizer",
        ),
        Flag(
            "--best-by", choice(BEST_BY), "what makes an epoch the best: Top1, or sparsity before it", "train.best_by"
        ),
        Flag("--num-best-scores", whole(1), "how many of the best epochs to list", "train.num_best_scores"),
        Flag("--save-every", _FROM_0, "seconds between two checkpoints within an epoch", "train.save_every"),
    ),
    "Knowledge distillation (with training)": (
        Flag(
            "--kd-teacher",
            Kind(lambda text: text if ".py:" in text else text.lower(), "a model's name, or self", "ARCH"),
            "model to learn from; self is the student as it was in float",
        ),
        Flag("--kd-pretrained", SWITCH, "give the teacher its published weights"),
        Flag("--kd-resume", existing_file(), "checkpoint of the teacher"),
        Flag("--kd-temperature --kd-temp", _POSITIVE, "temperature that softens both outputs"),
        Flag("--kd-distill-wt --kd-dw", _FROM_0, "weight of the loss against the teacher"),
        Flag("--kd-student-wt --kd-sw", _FROM_0, "weight of the loss against the labels"),
        Flag("--kd-teacher-wt --kd-tw", _FROM_0, "accepted where it is 0: the teacher does not learn"),
        Flag("--kd-start-epoch", whole(0), "first epoch with the teacher"),
    ),
    "Post-training quantization": (
        Flag("--quantize-eval --qe", SWITCH, "quantize the model, then evaluate it; implies --evaluate"),
        Flag(
            "--qe-calibration",
            fraction(),
            "collect activation statistics on this fraction of the split (default: 0.05)",
        ),
        Flag("--qe-calibration-split", choice(("train", "val", "test")), "split that calibration reads"),
        Flag(
            "--qe-histograms",
            SWITCH,
            f"collect histograms too, which {', '.join(HISTOGRAM_CLIPS)} need (collected without being asked where"
            " --quantize-eval calibrates for them)",
        ),
        Flag(
            "--qe-stats-file", existing_file(), "activation statistics collected earlier, or a layer_quant_params.yaml"
        ),
        Flag("--qe-dynamic", SWITCH, "take activation ranges from each batch"),
        Flag("--qe-config-file", schedule_file(), "quantization settings from YAML; replaces the flags below"),
        Flag("--qe-mode --qem", choice(MODES), "mode of activations and weights"),
        Flag("--qe-mode-acts --qema", choice(MODES), "mode of activations (default: --qe-mode)"),
        Flag("--qe-mode-wts --qemw", choice(MODES), "mode of weights (default: --qe-mode)"),
        Flag("--qe-bits-acts --qeba", whole(2, 16, zero="left in float"), "bits of activations, 0 for float"),
        Flag("--qe-bits-wts --qebw", whole(2, 16, zero="left in float"), "bits of weights, 0 for float"),
        Flag("--qe-bits-accum", whole(2, 32), "bits of the accumulator"),
        Flag("--qe-clip-acts --qeca", choice(CLIP_NAMES), "how the range of activations is clipped"),
        *(
            Flag(each.flag, real(each.allows, f"a number {each.allowed}", each.metavar), each.help)
            for each in CLIP_PARAMETERS.values()
        ),
        Flag("--qe-clip-wts", choice(WEIGHT_CLIPS), "how the ranges of weights are clipped"),
        Flag("--qe-scale", choice(SCALES), "scales are any numbers, or powers of two, so that codes are only shifted"),
        Flag("--qe-no-clip-layers --qencl", names(), "layers (names or regular expressions) not to clip"),
        Flag("--qe-no-quant-layers --qenql", names(), "layers (names or regular expressions) to leave in float"),
        Flag("--qe-per-channel --qepc", SWITCH, "a scale for each output channel of the weights"),
        Flag(
            "--qe-scale-approx-bits --qesab",
            whole(1, 31),
            "requantize with an integer multiplier of so many bits and a shift",
        ),
        Flag(
            "--qe-reduce-range",
            choice(("none", "auto", "all")),
            "weights of 7 bits, which cannot saturate on x86 without VNNI: nowhere, where 8 bits did on calibration"
            " images, everywhere",
        ),
        Flag("--qe-save-fp-weights", SWITCH, "keep the float weights in the quantized model"),
        Flag("--qe-pytorch-backend", choice(("fbgemm", "qnnpack")), "backend of PyTorch's own quantized modules"),
    ),
    "Corrections that need no training (with --quantize-eval)": (
        *(_correction(each) for each in CORRECTION_FLAGS.values() if each.of_float),
        Flag("--ptq-data-free", SWITCH, "no images at all: ranges and corrections from batch-norm statistics"),
        Flag(
            "--ptq-rounding",
            choice(ROUNDINGS),
            "how weights are rounded: to the nearest code, or so that the layer's or the block's output changes least",
        ),
        *(_correction(each) for each in CORRECTION_FLAGS.values() if not each.of_float and not each.choice),
        Flag(
            "--ptq-bias-correction",
            choice(BIAS_CORRECTIONS),
            "correct the mean of each channel, measured on images or derived from batch-norm statistics",
        ),
        Flag("--ptq-images", whole(1), "calibration images that corrections look at"),
        Flag("--ptq-iterations", whole(1), "optimization steps of each layer or block (default: the method's own)"),
    ),
    "Mixed precision (with --quantize-eval)": (
        Flag(
            "--qe-budget",
            budget(),
            "choose the bits of each layer: 3.2MB of weights, 4.5bits for each weight on average, or 12GBOPs, which"
            " choose those of activations too",
        ),
        Flag("--qe-bits-choices", bit_widths(), "bits to choose from, with --qe-budget (default: 2,3,4,6,8)"),
    ),
    "LAPQ: ranges that minimise the loss on calibration images (with --quantize-eval)": (
        Flag("--qe-lapq --qe-coordinate-search", SWITCH, "search for the ranges of activations and weights"),
        Flag("--lapq-maxiter", whole(1), "most iterations of the search (default: 2)"),
        Flag("--lapq-maxfev", whole(1), "most evaluations of the search"),
        Flag("--lapq-method", choice(SEARCHES), "method of the search"),
        Flag("--lapq-basinhopping --lapq-bh", SWITCH, "restart the search from other points (scipy's basinhopping)"),
        Flag("--lapq-basinhopping-niter --lapq-bh-niter", whole(1), "how often it is restarted"),
        Flag(
            "--lapq-init-mode",
            choice(("none", "avg", "laplace", "gauss", "l1", "l2", "l3")),
            "where the search starts: clipping by statistics, or least mean |y - y_q|^p of each tensor"
            " (default: the ranges of the plan or l2, whichever is better)",
        ),
        Flag("--lapq-init-method", choice(SEARCHES), "method that finds the l1, l2 and l3 ranges"),
        Flag("--lapq-eval-size", fraction(), "fraction of the calibration split to look at, --lapq-images at most"),
        Flag("--lapq-images", whole(1), "most calibration images to look at"),
        Flag("--lapq-eval-memoize-dataloader", SWITCH, "accepted: images are always kept in memory"),
        Flag("--lapq-search-clipping", SWITCH, "search both ends of a range that is not symmetric, not its size alone"),
    ),
    "Analysis": (
        Flag(
            "--sense",
            choice(("quant",)),
            "analyse and stop: loss, Top1 and signal-to-noise ratio with one layer at a time in few bits",
        ),
        Flag("--sense-bits", bit_widths(), "bits to try, with --sense (default: 2,3,4,6,8)"),
        Flag("--sense-images", whole(1), "calibration images to look at, with --sense and --qe-budget"),
    ),
    "Deployment": (
        Flag(
            "--export-onnx",
            new_file(".onnx", without=IN_RUN_FOLDER),
            "write the model as ONNX, in float or, with --quantize-eval or a quantized checkpoint, in integers"
            " (without FILE: into the run's folder)",
        ),
        Flag("--export-opset", whole(18, 23), "ONNX operator set (default: 20, or 21 for activations of 9 to 16 bits)"),
        Flag(
            "--export-encodings",
            choice(("ort", "tensorrt", "aimet"), many="repeat"),
            "write the ranges alone, for tools that quantize by themselves",
        ),
        Flag(
            "--verify",
            whole(1, without="64"),
            "prove on N test images (64 without N) that the exported model computes the same integers;"
            " exit code 1 if not",
        ),
    ),
}
FLAGS: tuple[Flag, ...] = tuple(flag for group in GROUPS.values() for flag in group)
