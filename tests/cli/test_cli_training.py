"""Training from the command line: what it prints and leaves, exact resume, and each mistake."""

from __future__ import annotations

import csv
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import ROOT, Run, good, start
from runs import run as run_in
from saved import contents, same

from qlib.cli import parse
from qlib.config.flags.checks import startup_warnings
from qlib.data.datasets import open_dataset
from qlib.data.loader import make_loader
from qlib.data.subset import epoch_order, split_train
from qlib.models import create_model, find_model

MODEL = "-a digits_cnn"
FAST = "-b 64 -p 1000 --etes 0.2"
TWO_QUANTIZERS = """\
quantizers:
  linear:
    class: QuantAwareTrainRangeLinearQuantizer
    bits_activations: 8
    bits_weights: 8
    calibration_images: 64
  lsq:
    class: LSQQuantizer
    bits_activations: 4
    bits_weights: 4
    calibration_images: 64
    lr_factor: 0.5
    dampening: 0.001
    overrides:
      fc: {bits_weights: 6, bits_activations: null}
lr_schedulers:
  decay: {class: StepLR, step_size: 1, gamma: 0.5}
policies:
  - quantizer: {instance_name: linear}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
  - quantizer: {instance_name: lsq}
    starting_epoch: 1
    ending_epoch: 3
    frequency: 1
  - lr_scheduler: {instance_name: decay}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
"""
PRUNED = """\
pruners:
  gradual: {class: AutomatedGradualPruner, initial_sparsity: 0.1, final_sparsity: 0.8, weights: fc.weight}
  surgery: {class: SplicingPruner, sensitivities: {wide.conv.weight: 0.5}, low_thresh_mult: 0.9, hi_thresh_mult: 1.1}
  gradient: {class: GradientRankedFilterPruner, desired_sparsity: 0.3, weights: [pointwise.conv.weight]}
regularizers:
  lasso: {class: GroupLassoRegularizer, reg_regims: {narrow.conv.weight: [0.01, Channels]}, threshold_criteria: Max}
"""
PRUNED_POLICIES = """\
  - {pruner: {instance_name: gradual}, starting_epoch: 0, ending_epoch: 3, frequency: 1}
  - pruner: {instance_name: surgery, args: {mini_batch_pruning_frequency: 3, use_double_copies: true}}
    epochs: [0, 1, 2]
  - {pruner: {instance_name: gradient}, epochs: [1, 2]}
  - {regularizer: {instance_name: lasso, args: {keep_mask: true}}, epochs: [0, 2]}
"""
LSQ = """\
quantizers:
  lsq: {class: LSQQuantizer, bits_activations: 4, bits_weights: 4, calibration_images: 64, bits_first_last: 8}
policies:
  - quantizer: {instance_name: lsq}
    starting_epoch: 0
    ending_epoch: 2
    frequency: 1
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(words: str) -> Run:
    return run_in(words, Path.cwd())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of LSQ on the pretrained model, in a folder of its own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "lsq.yaml").write_text(LSQ)
    return good(f"{MODEL} --pretrained --compress lsq.yaml --epochs 2 --lr 0.001 {FAST} -p 10", folder)


def test_what_is_printed(trained: Run) -> None:
    text = trained.out
    assert "Dataset sizes:\n\ttraining=1168\n\tvalidation=129\n\ttest=100" in text
    assert text.count("Training epoch: 1168 samples (64 per mini-batch)") == 2
    (line,) = (each for each in trained.lines if each.startswith("Epoch: [1][   10/   19]    Overall Loss "))
    assert line.endswith("    ")
    names = [field.rsplit(" ", 1)[0] for field in line.strip().split("    ")[-6:]]
    assert names == ["Overall Loss", "Objective Loss", "Top1", "Top5", "LR", "Time"]
    assert text.count("--- validate (epoch=") == 2
    assert "--- test ---------------------\n100 samples (64 per mini-batch)" in text
    assert text.count("==> Best [Top1: ") == 2
    assert {"checkpoint.pth.tar", "best.pth.tar", "training.csv", "configs/lsq.yaml"} <= trained.files


def test_the_table_of_epochs(trained: Run) -> None:
    with (trained.folder / "training.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["train Objective Loss"]) < float(rows[0]["train Objective Loss"])
    assert float(rows[1]["valid top1"]) > 90


def test_integers_of_the_checkpoint_give_what_validation_said(trained: Run) -> None:
    """The test of the last epoch, evaluated again from the file through the exact lowering, and by ONNX Runtime."""
    shown = [line for line in trained.lines if line.startswith("==> Top1: ")][-1]
    file = trained.folder / "checkpoint.pth.tar"
    again = good(f"--resume-from {file} --quantize-eval --verify 8 {FAST}", Path.cwd())
    assert shown in again.lines
    assert "verification: exact" in again.out
    assert "predictions: 8 of 8 agree" in again.out


def test_float_weights_of_the_checkpoint(trained: Run) -> None:
    done = good(f"{MODEL} --exp-load-weights-from {trained.folder}/best.pth.tar --evaluate {FAST}", Path.cwd())
    assert float(done.score("fp32")[0]) > 90


def test_a_checkpoint_of_float_training_holds_no_integers() -> None:
    good(f"{MODEL} --pretrained --epochs 1 --lr 0.001 {FAST}", Path.cwd())
    file = Path("latest_log_dir").resolve() / "best.pth.tar"
    done = run(f"--resume-from {file} --quantize-eval {FAST}")
    assert done.code == 2
    assert "was not trained in integers, or saved within an epoch; quantize it with --qe-calibration" in done.err
    assert good(f"--resume-from {file} --quantize-eval --qe-calibration 0.1 {FAST}", Path.cwd()).score()[0]


def test_float_training_is_that_of_plain_torch() -> None:
    """The same weights, bit for bit, as a loop that anyone would write."""
    done = good(f"{MODEL} --pretrained --epochs 2 --lr 0.05 --wd 0.001 --vs 0.2 {FAST}", Path.cwd())
    spec = find_model("digits_cnn")
    model = create_model(spec, num_classes=10, pretrained=True).to(memory_format=torch.channels_last).train()
    data = open_dataset("digits", None, "train", spec.transform, num_classes=10)
    indices, _ = split_train(len(data), 0.2, 0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.001)
    for epoch in range(2):
        for images, labels in make_loader(data, batch_size=64, indices=epoch_order(indices, 1.0, 0, epoch)):
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    state = contents(done.folder / "checkpoint.pth.tar")["state_dict"]
    assert same(dict(model.state_dict()), state)


def test_killed_at_any_step_and_resumed_gives_the_same_bytes() -> None:
    Path("two.yaml").write_text(PRUNED + TWO_QUANTIZERS + PRUNED_POLICIES)
    words = f"{MODEL} --compress two.yaml --epochs 3 --lr 0.02 {FAST} -p 1 --save-every 0"
    whole = good(words, Path.cwd())
    expected = contents(whole.folder / "checkpoint.pth.tar")
    assert set(expected["masks"]) >= {"fc.weight", "wide.conv.weight", "pointwise.conv.weight"}
    for steps in (4, 25):  # in the first epoch, and after the second quantizer has begun
        shutil.rmtree("logs")
        with start(f"{words} -j 0", Path.cwd(), trains=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                steps -= line.startswith("Epoch: [") and "Overall Loss" in line
                if steps == 0:
                    process.send_signal(signal.SIGKILL)
                    break
        file = Path("latest_log_dir").resolve() / "checkpoint.pth.tar"
        rest = good(f"{words} --resume-from {file}", Path.cwd())
        assert same(contents(rest.folder / "checkpoint.pth.tar"), expected)
        assert len([line for line in rest.lines if "Overall Loss" in line]) < 3 * 19


def test_best_is_by_top1_unless_sparsity_is_asked_for(trained: Run) -> None:
    best = contents(trained.folder / "best.pth.tar")["best"]
    assert best[0]["top1"] == contents(trained.folder / "checkpoint.pth.tar")["extras"]["best_top1"]


@pytest.mark.parametrize(
    ("epochs", "line"),
    [("--epochs 1", None), ("", "Training until 90 epochs are done, as --epochs does not say otherwise")],
    ids=["one epoch", "as many as there are by default"],
)
def test_a_loss_that_is_nan_stops_the_run(epochs: str, line: str | None) -> None:
    done = run(f"{MODEL} {epochs} --lr 1e30 {FAST}")
    assert done.code == 1
    assert [each for each in done.lines if each.startswith("Training until")] == [line] * bool(line)
    assert "the loss is nan in epoch 0, step " in done.out
    assert "of 19; lower --lr, or clip gradients with --grad-clip. The last good checkpoint is " in done.out
    assert contents(done.folder / "checkpoint.pth.tar")["steps"] == 0


def test_a_learning_rate_beyond_float32_stops_the_run() -> None:
    quantizer = "{class: LSQQuantizer, bits_weights: 4, lr_factor: 1.0e+20}"
    policy = "{quantizer: {instance_name: q}, starting_epoch: 0, ending_epoch: 1}"
    Path("fast.yaml").write_text(f"quantizers: {{q: {quantizer}}}\npolicies: [{policy}]\n")
    done = run(f"{MODEL} --epochs 1 --lr 1e20 --compress fast.yaml {FAST}")
    assert done.code == 1
    assert "the learning rate is 1e+40 in epoch 0, which no weight can follow; lower --lr" in done.out


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    done = run(f"{MODEL} --epochs 1 --lr 1e30 --gpus 0 --amp {FAST}")
    assert [line for line in done.lines if "GPU" in line] == [
        "--gpus 0: this machine has no GPU; the run is on the CPU",
        "Warning: --amp is ignored: mixed precision needs a GPU, and this machine has none",
    ]


def test_the_last_good_checkpoint_is_one_that_a_step_could_use() -> None:
    """What would have been saved behind the step that made the weights explode is not kept."""
    done = run(f"{MODEL} --epochs 1 --lr 1e12 --save-every 0 {FAST}")
    assert done.code == 1
    assert "running_var holds NaN or infinity after step 2 of epoch 0; lower --lr" in done.out
    state = contents(done.folder / "checkpoint.pth.tar")
    assert state["steps"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in state["state_dict"].values())
    assert not (done.folder / "checkpoint.new.pth.tar").exists()


def test_a_checkpoint_counts_when_the_next_step_found_its_loss_to_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlib.train.state.Checkpoints.check_weights", lambda *_: None)
    done = run(f"{MODEL} --epochs 1 --lr 1e12 --save-every 0 {FAST}")
    step = int(done.out.partition("the loss is nan in epoch 0, step ")[2].split()[0])
    assert step > 2
    assert contents(done.folder / "checkpoint.pth.tar")["steps"] == step - 2


def test_check_prints_the_timeline_and_the_settings() -> None:
    Path("two.yaml").write_text(TWO_QUANTIZERS)
    done = good(f"{MODEL} --compress two.yaml --epochs 3 --check", Path.cwd())
    assert "| lsq " in done.out
    assert "lsq (LSQQuantizer), from epoch 1 on:" in done.out
    assert "linear (QuantAwareTrainRangeLinearQuantizer), from epoch 0 on:" in done.out


WRONG = {
    "no epoch left": ("--resume-from last --epochs 2", "--epochs 2 leaves nothing to train: "),
    "other architecture": ("-a resnet20_cifar --resume-from best --epochs 3", "does not fit the model: "),
    "other optimizer": (
        f"{MODEL} --resume-from best --compress lsq.yaml --epochs 3 --optimizer adam",
        "was trained with SGD, not Adam; give the same --optimizer, or --reset-optimizer",
    ),
    "other schedule": (
        f"{MODEL} --resume-from best --epochs 3",
        "was trained under a schedule of 1 policies, not 0; give the same --compress and --kd flags",
    ),
    "pattern": (f"{MODEL} --compress pattern.yaml --epochs 3", "pattern.yaml:6: 'fcc' matches no layer; did you mean"),
    "beyond": (f"{MODEL} --compress two.yaml --epochs 1", "two.yaml:"),
    "no number": (f"{MODEL} --epochs 1 --lr -1", "--lr '-1' is not allowed: it must be a number above 0"),
    "schedule missing": (f"{MODEL} --compress none.yaml", "--compress 'none.yaml' is not allowed: it must be a file"),
}


@pytest.mark.parametrize(("words", "sentence"), WRONG.values(), ids=WRONG)
def test_mistakes(words: str, sentence: str, trained: Run) -> None:
    Path("lsq.yaml").write_text(LSQ)
    Path("two.yaml").write_text(TWO_QUANTIZERS)
    rule = "\n    overrides:\n      fcc: {bits_weights: 2}\n"
    Path("pattern.yaml").write_text(
        "quantizers:\n  lsq:\n    class: LSQQuantizer\n    bits_weights: 4" + rule + LSQ[LSQ.index("policies") :]
    )
    words = words.replace("best", str(trained.folder / "best.pth.tar"))
    words = words.replace("last", str(trained.folder / "checkpoint.pth.tar"))
    data = str(ROOT / "../shared/data/cifar10") if "cifar" in words else ""
    done = run(f"{words} {data}")
    assert done.code == 2
    assert sentence in done.err
    assert "Traceback" not in done.out + done.err


IGNORED = {
    "--wd 0.1 --evaluate": "--weight-decay has no effect without --compress or --epochs",
    "--lr 0.1 --evaluate": "--lr is ignored: with --evaluate nothing is trained",
    "--epochs 3 --evaluate": "--epochs is ignored: with --evaluate nothing is trained",
    "--epochs 3 --optimizer adam --momentum 0.5": "--momentum is ignored: adam has its own",
    "--epochs 3 --amp --cpu": "--amp is ignored: mixed precision needs a GPU",
    "--epochs 3 --reset-optimizer": "--reset-optimizer has no effect without --resume-from",
    "--epochs 3 --engine torch": "--engine is ignored: training evaluates with torch",
}


@pytest.mark.parametrize("words", IGNORED)
def test_flags_without_effect_are_told(words: str) -> None:
    assert IGNORED[words] in startup_warnings(parse([*MODEL.split(), *words.split()]))


def test_confusion_of_the_last_test() -> None:
    done = good(f"{MODEL} --pretrained --epochs 1 --lr 0.001 --etrs 0.1 --confusion {FAST}", Path.cwd())
    rows = done.out.split("==> Confusion:\n")[1].splitlines()[:10]
    assert sum(int(count) for row in rows for count in row.split()) == 100


@pytest.mark.parametrize("resume", ["--reset-optimizer --resume-from", "--resume"])
def test_reset_optimizer_begins_a_new_run(resume: str, trained: Run) -> None:
    Path("lsq.yaml").write_text(LSQ)
    words = f"{MODEL} {resume} {trained.folder}/best.pth.tar --compress lsq.yaml --epochs 1"
    done = good(f"{words} --lr 0.001 {FAST}", Path.cwd())
    assert "--- validate (epoch=0)" in done.out
    assert float(done.out.split("==> Top1: ")[1].split()[0]) > 90


PUBLISHED = {
    "pact_w3a4": (
        "preact_resnet20_cifar",
        {"conv1": "float float", "layer1.0.conv1": "3 4", "layer1.0.pre_bn": "8 float"},
    ),
    "dorefa_w3a8": ("preact_resnet20_cifar", {"layer1.1.pre_bn": "8 8", "layer1.0.conv2": "3 float"}),
    "dorefa_alexnet_bn": (
        "alexnet_bn",
        {"features.0": "float float", "features.2": "3 8", "classifier.6": "float float"},
    ),
    "wrpn_w4a8": ("alexnet_bn", {"features.0": "float float", "features.2": "4 8", "classifier.3": "4 float"}),
    "linear_w8a8": ("resnet18", {"conv1": "8 8", "layer1.0.conv2": "8 8", "fc": "8 8"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules_fit_their_models(name: str) -> None:
    """Bits of weights and activations of some layers, as the table of `--check` shows them."""
    arch, expected = PUBLISHED[name]
    file = ROOT / "tests" / "schedules" / f"{name}.yaml"
    done = good(f"-a {arch} --compress {file} --epochs 200 --check", Path.cwd())
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.lines if line.startswith("| ")]
    bits = {row[0]: f"{row[3]} {row[4]}" for row in cells if len(row) > 6}
    assert {layer: bits[layer] for layer in expected} == expected


WIDE = """\
quantizers:
  wrpn: {class: WRPNQuantizer, widen: 2, bits_activations: 4, bits_weights: 4, edges: all, calibration_images: 64}
policies:
  - quantizer: {instance_name: wrpn}
    starting_epoch: 0
    ending_epoch: 2
    frequency: 1
"""


def test_a_wider_model_is_found_again_by_its_name() -> None:
    Path("wide.yaml").write_text(WIDE)
    words = f"{MODEL} --compress wide.yaml --lr 0.05 {FAST}"
    first = good(f"{words} --epochs 1", Path.cwd())
    assert "=> widened the model by 2: a digits_cnn.wide2 model with random weights" in first.out
    file = first.folder / "checkpoint.pth.tar"
    assert contents(file)["state_dict"]["fc.weight"].shape[1] == 2 * 32 * 4
    rest = good(f"{words} --epochs 2 --resume-from {file}", Path.cwd())
    assert "--- validate (epoch=1)" in rest.out
    shown = [line for line in rest.lines if line.startswith("==> Top1: ")][-1]
    again = good(f"--resume-from {rest.folder}/checkpoint.pth.tar --quantize-eval {FAST}", Path.cwd())
    assert shown in again.lines


TOKENS = """\
import torch
from torch import nn


class Tokens(nn.Module):
    dataset = "digits"

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Conv2d(1, 16, 2, 2), nn.Parameter(torch.randn(16, 16))
        self.attention, self.drop = nn.MultiheadAttention(16, 2, batch_first=True), nn.Dropout(0.1)
        self.table, self.fc = nn.Parameter(torch.ones(16)), nn.Linear(16, 10)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.nn.functional.dropout(x, 0.1, self.training)
        return self.fc(self.drop(x * (2 * self.table)).mean(1))


def tokens():
    torch.manual_seed(0)
    return Tokens()
"""


def test_all_weights_of_a_model_with_attention_train_under_a_quantizer() -> None:
    Path("mine.py").write_text(TOKENS)
    Path("lsq.yaml").write_text(LSQ)
    words = f"-a mine.py:tokens --compress lsq.yaml --lr 0.05 {FAST}"
    first = good(f"{words} --epochs 1", Path.cwd())
    assert (
        "Warning: 1 parameters stay as they are: the graph that is quantized does not compute with them, or holds what"
        " follows from them as constants (spare)" in first.out
    )
    file = first.folder / "checkpoint.pth.tar"
    before, after = (
        create_model(find_model("mine.py:tokens"), num_classes=10).state_dict(),
        contents(file)["state_dict"],
    )
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == ["spare"]
    rest = good(f"{words} --epochs 2 --resume-from {file}", Path.cwd())
    again = good(f"{words} --epochs 2 --resume-from {file}", Path.cwd())
    files = (contents(each.folder / "checkpoint.pth.tar") for each in (rest, again))
    assert same(*files), "dropout follows from seed, epoch and step"
    file = rest.folder / "checkpoint.pth.tar"
    good(f"-a mine.py:tokens --resume-from {file} --quantize-eval --verify 8 {FAST}", Path.cwd())


def test_steps_that_run_away_are_told() -> None:
    Path("lsq.yaml").write_text(LSQ.replace("bits_first_last: 8", "bits_first_last: 8, lr_factor: 300"))
    done = good(f"{MODEL} --pretrained --compress lsq.yaml --epochs 2 --lr 0.05 {FAST}", Path.cwd())
    assert done.out.count("has moved by a factor of ") == 1
    assert "steps learn too fast; lower the quantizer's lr_factor (0.1 under a distillation loss" in done.out
