"""The flags of training and distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qlib.config.flags.flag import Flag, Ignored, Need, shared
from qlib.config.flags.groups import BEST_BY, OPTIMIZERS
from qlib.config.flags.kinds import SWITCH, arch, choice, existing_file, real, schedule_file, whole
from qlib.config.flags.rows.common import TRAINS
from qlib.config.flags.verb import Verb
from qlib.values import Interval

__all__ = ["GROUPS"]

_POSITIVE = real(Interval(0, open_low=True))
_FROM_0 = real(Interval(0))
_BELOW_1 = real(Interval(0, 1, open_high=True))
_TRAINING = Need(("--compress", "--epochs"), also=("--lr",))
_PLANNED = replace(TRAINS, verbs=(*TRAINS.verbs, Verb.CHECK))

GROUPS: Mapping[str, tuple[Flag, ...]] = {
    "Training": (
        Flag(
            "--compress",
            schedule_file(),
            "train under this schedule, a YAML file",
            "train.compress",
            use=_PLANNED,
        ),
        Flag("--epochs", whole(1), "train until so many epochs are done", "train.epochs", use=_PLANNED),
        *shared(
            (
                Flag("--optimizer", choice(OPTIMIZERS), "what moves the weights", "train.optimizer"),
                Flag("--lr --learning-rate", _POSITIVE, "learning rate to begin with", "train.lr"),
                Flag(
                    "--momentum",
                    _BELOW_1,
                    "momentum of sgd",
                    "train.momentum",
                    ignored=(
                        Ignored(
                            "is ignored: {train.optimizer} has its own",
                            by=("--optimizer",),
                            unless=("--optimizer sgd",),
                        ),
                    ),
                ),
                Flag("--weight-decay --wd", _FROM_0, "weight decay", "train.weight_decay"),
                Flag(
                    "--label-smoothing",
                    _BELOW_1,
                    "share of the label that is spread over all classes",
                    "train.label_smoothing",
                ),
                Flag("--grad-clip", _POSITIVE, "largest norm of all gradients together", "train.grad_clip"),
                Flag(
                    "--amp",
                    SWITCH,
                    "mixed precision, on a GPU",
                    "train.amp",
                    ignored=(Ignored("is ignored: mixed precision needs a GPU", by=("--cpu",)),),
                ),
                Flag(
                    "--reset-optimizer",
                    SWITCH,
                    "with --resume-from: begin again at epoch 0 with a new optimizer",
                    "train.reset_optimizer",
                    needs=(Need(("--resume-from",), also=("--resume",)),),
                ),
                Flag(
                    "--best-by",
                    choice(BEST_BY),
                    "what makes an epoch the best: Top1, or sparsity before it, as is usual where a schedule prunes",
                    "train.best_by",
                ),
                Flag("--num-best-scores", whole(1), "how many of the best epochs to list", "train.num_best_scores"),
                Flag(
                    "--save-untrained-model",
                    SWITCH,
                    "write the model as it is before training, for a lottery ticket, as untrained_checkpoint.pth.tar",
                    use=TRAINS,
                ),
                Flag("--save-every", _FROM_0, "seconds between two checkpoints within an epoch", "train.save_every"),
            ),
            needs=(_TRAINING,),
        ),
    ),
    "Knowledge distillation (with training)": shared(
        (
            Flag(
                "--kd-teacher",
                arch("a model's name, or self"),
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
        use=_PLANNED,
        needs=(_TRAINING,),
    ),
}
