"""Distillation: its losses against torch and by hand, its teachers, the cache of their logits, and matched layers."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from qlib.app.distill import make_distillation
from qlib.app.images import open_split
from qlib.app.job import Job
from qlib.app.teacher import load_teacher
from qlib.checkpoint.fingerprint import weights_hash
from qlib.config.flags.groups import KdArgs, TrainArgs
from qlib.config.flags.run_config import RunConfig
from qlib.config.schedule.types import Component, PolicySpec, Schedule
from qlib.distill.loss import Distillation, DistillSettings, distillation_loss
from qlib.distill.matching import ForwardHooks, Matching, attention_loss, feature_loss, named_outputs
from qlib.errors import CheckpointError, ConfigError, ModelError, OutputError, QlibError, UsageError
from qlib.graph import capture, fold
from qlib.lower.trainable import prepare_qat
from qlib.models import create_model, find_model
from qlib.runlog import RunLog
from qlib.train.policy import Batch, Losses

MODELS = '''
import torch
from torch import nn
from torchvision import transforms as T

class Wide(nn.Module):
    """A teacher for digits; `classes` is None where it takes any number."""

    dataset, num_classes = "digits", 10

    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean([2, 3]))

def wide(num_classes):
    return Wide(num_classes)

def seven():
    return Wide(7)

def other_scale(num_classes):
    model = Wide(num_classes)
    model.transform = T.Compose([T.Grayscale(), T.ToTensor(), T.Normalize((0.25,), (0.5,))])
    return model

def own_transform(num_classes):
    model = Wide(num_classes)
    model.transform = lambda image: torch.zeros(1, 8, 8)
    return model

class Fails(Wide):
    def forward(self, x):
        raise ValueError("no")

def fails(num_classes):
    return Fails(num_classes)

class Pair(Wide):
    def forward(self, x):
        return x, x

def pair(num_classes):
    return Pair(num_classes)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("net.py").write_text(MODELS)
    return tmp_path


def make_job(kd: KdArgs | None = None, *, arch: str = "digits_cnn", given: str = "", **config: Any) -> Job:
    config = {"pretrained": True, "print_freq": 1000, **config}
    settings = RunConfig(arch=arch, kd=kd or KdArgs(), given=frozenset(given.split()), **config)
    spec = find_model(arch)
    model = create_model(spec, pretrained=spec.weights is not None)
    run = RunLog(Path("run"), Path("run/run.log"))
    return Job(settings, run, torch.device("cpu"), spec, spec.dataset, spec.num_classes, model)


def trusting_job() -> Job:
    """A job whose command line names the teacher as well, since that is a Python file."""
    return make_job(KdArgs(teacher="net.py:wide"), given="--kd-teacher")


def saved(of: str, path: str = "teacher.pth", **extra: Any) -> nn.Module:
    """Writes a checkpoint of a model with random weights."""
    torch.manual_seed(1)
    spec = find_model(of)
    model = create_model(spec, num_classes=extra.pop("classes", None))
    torch.save({"state_dict": model.state_dict(), **extra}, path)
    return model


def schedule(cls_where: str = "kd.yaml:3", start: int = 0, end: int = 10, **settings: Any) -> Schedule:
    component = Component("extensions", "kd", "KnowledgeDistillation", settings, where=cls_where)
    return Schedule((PolicySpec(component, start, end),))


def batch_of(job: Job, indices: list[int], epoch: int = 0) -> Batch:
    dataset = open_split(job, "train")
    images, labels = zip(*(dataset[index] for index in indices), strict=True)
    return Batch(epoch, 0, indices, torch.stack(images), torch.tensor(labels))


def step(policy: Distillation, student: nn.Module, batch: Batch) -> tuple[Tensor, Losses]:
    """The moments of one step up to the losses."""
    policy.on_minibatch_begin(batch)
    logits = student(batch.images)
    objective = F.cross_entropy(logits, batch.labels)
    return logits, policy.before_backward(batch, logits, Losses(objective, objective))


logits = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


class TestLosses:
    """Pure functions."""

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_agrees_with_torch(self, temperature: float) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 6, 10, dtype=torch.float64)
        soft, target = (F.softmax(each / temperature, 1) for each in (student, teacher))
        expected = temperature**2 * F.kl_div(soft.log(), target, reduction="batchmean")
        torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)

    @given(logits, st.floats(0.1, 50))
    def test_equal_predictions_cost_nothing(self, rows: list[list[float]], temperature: float) -> None:
        x = torch.tensor(rows, dtype=torch.float64)
        assert distillation_loss(x + 3, x, temperature).abs() < 1e-9

    @given(logits, logits, st.floats(0.1, 50))
    def test_is_never_negative(self, a: list[list[float]], b: list[list[float]], temperature: float) -> None:
        size = min(len(a), len(b))
        x, y = (torch.tensor(rows[:size], dtype=torch.float64) for rows in (a, b))
        assert distillation_loss(x, y, temperature) >= -1e-9

    def test_a_high_temperature_compares_logits(self) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 6, 10, dtype=torch.float64)
        expected = 0.5 * (student - teacher).var(1, correction=0).mean()
        torch.testing.assert_close(distillation_loss(student, teacher, 1e4), expected, rtol=1e-3, atol=0)

    def test_the_gradient_hardly_depends_on_the_temperature(self) -> None:
        torch.manual_seed(0)
        student, teacher = 0.1 * torch.randn(2, 6, 10, dtype=torch.float64)
        student.requires_grad_()
        gradients = [torch.autograd.grad(distillation_loss(student, teacher, t), student)[0] for t in (1.0, 2.0, 8.0)]
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradient.norm(), gradients[0].norm(), rtol=0.03, atol=0)

    def test_gradient_by_differences(self) -> None:
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, 2.0), student.requires_grad_())

    def test_attention_by_hand(self) -> None:
        # Q = [9, 16], [0, 4] -> [0.49, 0.87], [0, 1]
        student = torch.tensor([[[[3.0, 4.0]]]])
        teacher = torch.tensor([[[[0.0, 2.0]]]])
        root = math.sqrt(9**2 + 16**2)
        expected = (9 / root) ** 2 + (16 / root - 1) ** 2
        assert attention_loss(student, teacher).item() == pytest.approx(expected)

    @pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
    def test_attention_is_relative_and_counts_no_channels(self, factor: float) -> None:
        torch.manual_seed(0)
        x = torch.randn(4, 3, 5, 5)
        more = factor * torch.cat([x, x], 1)
        assert attention_loss(x, more) < 1e-6
        assert 0 < attention_loss(x, torch.randn(4, 8, 5, 5)) <= 2

    def test_attention_of_a_silent_layer_has_a_gradient(self) -> None:
        x = torch.zeros(2, 3, 4, 4, requires_grad=True)
        attention_loss(x, torch.ones(2, 3, 4, 4)).backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_features(self) -> None:
        a, b = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[2.0, 0.0]]])
        assert feature_loss(a, b).item() == 2.5


class TestPolicy:
    """What a step minimizes, and what it leaves alone."""

    settings = DistillSettings(temperature=4.0, distill_wt=0.7, student_wt=0.3)

    def test_the_weighted_sum(self, folder: Path) -> None:
        job = make_job()
        teacher = saved("net.py:wide").eval()
        policy = Distillation(copy.deepcopy(teacher), self.settings, lambda epoch: True)
        batch = batch_of(job, [0, 1, 2])
        policy.on_minibatch_begin(batch)
        logits = job.model(batch.images)
        objective, penalty = F.cross_entropy(logits, batch.labels), torch.tensor(0.25)
        losses = policy.before_backward(batch, logits, Losses(objective, objective).plus("L2", penalty))
        distill = distillation_loss(logits, teacher(batch.images), 4.0)
        torch.testing.assert_close(losses.overall, 0.3 * objective + 0.7 * distill + 0.25)
        torch.testing.assert_close(losses.others["Distill Loss"], distill.detach())
        assert list(losses.others) == ["L2", "Distill Loss"]
        assert losses.objective is objective
        assert not losses.others["Distill Loss"].requires_grad

    def test_inactive_epochs_are_plain(self, folder: Path) -> None:
        job = make_job()
        policy = Distillation(saved("net.py:wide"), self.settings, lambda epoch: epoch >= 3)
        _, losses = step(policy, job.model, batch_of(job, [0, 1], epoch=2))
        assert losses.overall is losses.objective
        assert not losses.others
        assert step(policy, job.model, batch_of(job, [0, 1], epoch=3))[1].others

    def test_the_teacher_does_not_change(self, folder: Path) -> None:
        job = make_job()
        teacher = saved("net.py:wide").train()
        before = copy.deepcopy(teacher.state_dict())
        policy = Distillation(teacher, self.settings, lambda epoch: True)
        student = job.model.train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for start in (0, 8, 16):
            _, losses = step(policy, student, batch_of(job, list(range(start, start + 8))))
            optimizer.zero_grad()
            losses.overall.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())

    def test_it_teaches(self, folder: Path) -> None:
        """A student that only hears its teacher, and no label, ends nearer to it."""
        job = make_job(KdArgs(teacher="self"))
        teacher = load_teacher(job, job.config.kd)
        torch.manual_seed(0)
        student = create_model(job.spec).train()
        policy = Distillation(teacher, DistillSettings(2.0, 1.0, 0.0), lambda epoch: True)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
        losses = []
        for start in range(0, 1024, 64):
            _, step_losses = step(policy, student, batch_of(job, list(range(start, start + 64))))
            optimizer.zero_grad()
            step_losses.overall.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(step_losses.others["Distill Loss"]))
        assert losses[-1] < losses[0] / 2

    def test_an_own_teacher_survives_a_resume(self, folder: Path) -> None:
        job = make_job(KdArgs(teacher="self"), given="--kd-teacher")
        first = make_distillation(job, job.model)
        assert first is not None
        batch = batch_of(job, [4, 5, 6])
        expected = step(first, job.model, batch)[1]
        original, state = job.model, first.state_dict()
        trained = create_model(job.spec)  # what a resumed run loads is the student as it was trained
        second = make_distillation(replace(job, model=trained), trained)
        assert second is not None
        second.load_state_dict(state)
        assert torch.equal(step(second, original, batch)[1].overall, expected.overall)

    def test_another_teacher_is_noticed(self, folder: Path) -> None:
        first = Distillation(saved("net.py:wide"), self.settings, lambda epoch: True)
        second = Distillation(saved("net.py:wide"), self.settings, lambda epoch: True)
        second.load_state_dict(first.state_dict())
        with torch.no_grad():
            second._teacher.fc.bias.add_(1)
        with pytest.raises(CheckpointError, match="learned from a teacher with other weights; give the same"):
            second.load_state_dict(first.state_dict())


def problem(job: Job, schedule: Schedule | None = None) -> tuple[type[QlibError], str]:
    with pytest.raises(QlibError) as error:
        make_distillation(job, job.model, schedule)
    return type(error.value), str(error.value)


class TestTeacher:
    """Where its weights come from, and what it must fit."""

    def test_self_is_a_copy(self, folder: Path) -> None:
        job = make_job(KdArgs(teacher="self"))
        job.model.train()
        teacher = load_teacher(job, job.config.kd)
        before = weights_hash(teacher.state_dict())
        with torch.no_grad():
            job.model.fc.weight.zero_()
        assert weights_hash(teacher.state_dict()) == before
        assert not teacher.training
        assert job.model.training
        assert not {id(each) for each in teacher.parameters()} & {id(each) for each in job.model.parameters()}

    def test_a_checkpoint(self, folder: Path) -> None:
        model = saved("net.py:wide", arch="net.py:wide")
        job = make_job(KdArgs(teacher="net.py:wide", resume=Path("teacher.pth")))
        assert weights_hash(load_teacher(job, job.config.kd).state_dict()) == weights_hash(model.state_dict())

    def test_published_weights(self, folder: Path) -> None:
        job = make_job(KdArgs(teacher="digits_cnn", pretrained=True), arch="net.py:wide")
        expected = create_model(find_model("digits_cnn"), pretrained=True).state_dict()
        assert weights_hash(load_teacher(job, job.config.kd).state_dict()) == weights_hash(expected)

    def test_float_weights_in_a_quantized_checkpoint(self, folder: Path) -> None:
        model = create_model(find_model("digits_cnn"), pretrained=True)
        quantized = {"format": "qlib_quantized", "arch": "digits_cnn", "float_state_dict": model.state_dict()}
        torch.save(quantized, "q.pth")
        job = make_job(KdArgs(teacher="digits_cnn", resume=Path("q.pth")))
        assert weights_hash(load_teacher(job, job.config.kd).state_dict()) == weights_hash(model.state_dict())

    def test_a_teacher_of_a_quantized_run_is_told(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        saved("net.py:wide", quantized={"format": "qlib_quantized"})
        job = make_job(KdArgs(teacher="net.py:wide", resume=Path("teacher.pth")))
        load_teacher(job, job.config.kd)
        assert "teacher.pth was trained with quantizers, and the teacher computes with its float" in caplog.text

    def test_images_are_converted_to_its_normalization(self, folder: Path) -> None:
        model = saved("net.py:other_scale")
        job = make_job(KdArgs(teacher="net.py:other_scale", resume=Path("teacher.pth")))
        teacher = load_teacher(job, job.config.kd)
        image = open_split(job, "train").images.read(3)
        mine, theirs = (spec.transform(image)[None] for spec in (job.spec, find_model("net.py:other_scale")))
        assert not torch.allclose(mine, theirs)
        torch.testing.assert_close(teacher(mine), model.eval()(theirs))

    def test_a_transform_of_its_own_is_told(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        saved("net.py:own_transform")
        job = make_job(KdArgs(teacher="net.py:own_transform", resume=Path("teacher.pth")))
        load_teacher(job, job.config.kd)
        assert "the teacher net.py:own_transform sees images as the student's transform makes them" in caplog.text

    @pytest.mark.parametrize(
        ("kd", "kind", "sentence"),
        [
            pytest.param(
                {"teacher": "digits_cnn"},
                UsageError,
                "the teacher digits_cnn would have random weights; give its checkpoint with --kd-resume, or"
                " --kd-pretrained for the published ones",
                id="random weights",
            ),
            pytest.param(
                {"teacher": "digits_cn"},
                ModelError,
                "unknown model 'digits_cn'; give one of 126 names, timm/NAME, hf/FOLDER or your own as"
                " path/to/file.py:function; did you mean digits_cnn?",
                id="unknown",
            ),
            pytest.param(
                {"teacher": "digits_cnn", "pretrained": True, "resume": Path("a.pth")},
                UsageError,
                "--kd-resume and --kd-pretrained both give the teacher its weights; drop one of them",
                id="two sources",
            ),
            pytest.param(
                {"teacher": "self", "resume": Path("a.pth")},
                UsageError,
                "the teacher 'self' is the student as it is loaded, with its weights; drop --kd-resume",
                id="self with a checkpoint",
            ),
            pytest.param(
                {"teacher": "net.py:wide", "pretrained": True},
                UsageError,
                "there are no published weights of the teacher net.py:wide; give a checkpoint with --kd-resume",
                id="no published weights",
            ),
            pytest.param(
                {"teacher": "simplenet_mnist", "resume": Path("a.pth")},
                UsageError,
                "the teacher simplenet_mnist is made for images of 1x28x28, and the student digits_cnn for 1x8x8; give"
                " a teacher for images of the same size",
                id="other images",
            ),
            pytest.param(
                {"teacher": "digits_cnn", "resume": Path("seven.pth")},
                UsageError,
                "the teacher digits_cnn has 7 classes and the student digits_cnn 10; give a teacher that was trained"
                " for the same 10 classes",
                id="checkpoint of other classes",
            ),
            pytest.param(
                {"teacher": "net.py:seven", "resume": Path("fixed_seven.pth")},
                UsageError,
                "the teacher net.py:seven has 7 classes and the student digits_cnn 10; give a teacher that was trained"
                " for the same 10 classes",
                id="model of other classes",
            ),
            pytest.param(
                {"teacher": "digits_cnn", "resume": Path("named.pth")},
                CheckpointError,
                "'named.pth' is a checkpoint of resnet20_cifar, and the teacher is digits_cnn; give --kd-teacher"
                " resnet20_cifar, or a checkpoint of digits_cnn",
                id="checkpoint of another architecture",
            ),
            pytest.param(
                {"teacher": "digits_cnn", "resume": Path("wide.pth")},
                CheckpointError,
                "the teacher's checkpoint 'wide.pth' does not fit the model: 1 of another shape (fc.weight is 10x12 in"
                " it and 10x128 in the model); give the --kd-teacher that it was made with",
                id="checkpoint of an unknown architecture",
            ),
            pytest.param(
                {"teacher": "digits_cnn", "resume": Path("quantized.pth")},
                CheckpointError,
                "'quantized.pth' holds integers, and a teacher computes in float; give the checkpoint that it was made"
                " from, or write it again with --qe-save-fp-weights",
                id="quantized checkpoint",
            ),
            pytest.param(
                {"teacher": "net.py:wide", "resume": Path("nan.pth")},
                ModelError,
                "the teacher 'net.py:wide' answers NaN or infinity; give it other weights",
                id="NaN",
            ),
            pytest.param(
                {"teacher": "net.py:fails", "resume": Path("wide.pth")},
                ModelError,
                "'net.py:fails' fails on images of 1x8x8, with ValueError (no) at net.py:38; correct its forward, or"
                " give the model an attribute input_shape",
                id="fails",
            ),
            pytest.param(
                {"teacher": "net.py:pair", "resume": Path("wide.pth")},
                ModelError,
                "the model returns 'tuple' with no tensor of logits; make it return its logits alone, or call them"
                " 'logits'",
                id="two outputs",
            ),
            pytest.param(
                {"teacher": "self", "teacher_wt": 0.5},
                UsageError,
                "--kd-teacher-wt is 0.5, but the teacher does not learn; leave it at 0",
                id="teacher weight",
            ),
            pytest.param(
                {"teacher": "self", "start_epoch": 90},
                UsageError,
                "--kd-start-epoch 90 is not before the end, --epochs 90, so the teacher would never help; give a lower"
                " one",
                id="start after the end",
            ),
        ],
    )
    def test_mistakes(self, folder: Path, kd: dict[str, Any], kind: type[QlibError], sentence: str) -> None:
        saved("digits_cnn", "seven.pth", classes=7)
        saved("net.py:seven", "fixed_seven.pth")
        saved("digits_cnn", "named.pth", arch="resnet20_cifar")
        model = saved("net.py:wide", "wide.pth")
        with torch.no_grad():
            model.fc.bias[0] = math.nan
        torch.save(model.state_dict(), "nan.pth")
        torch.save({"format": "qlib_quantized", "arch": "digits_cnn"}, "quantized.pth")
        assert problem(make_job(KdArgs(**kd), given="--kd-teacher")) == (kind, sentence)

    def test_self_with_random_weights(self, folder: Path) -> None:
        assert problem(make_job(KdArgs(teacher="self"), pretrained=False)) == (
            UsageError,
            "the teacher 'self' would be a student with random weights; load trained ones with --pretrained,"
            " --exp-load-weights-from or --resume-from, or give another teacher",
        )

    def test_published_weights_of_other_classes(self, folder: Path) -> None:
        job = make_job(KdArgs(teacher="digits_cnn", pretrained=True), arch="net.py:seven")
        job = replace(job, num_classes=7)
        assert problem(job)[1].startswith("the teacher digits_cnn has 10 classes and the student net.py:seven 7; give")


class TestSettings:
    """From flags, or from a schedule."""

    def test_nothing(self, folder: Path) -> None:
        job = make_job()
        assert make_distillation(job, job.model) is None
        assert make_distillation(job, job.model, Schedule(())) is None

    def test_flags(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        job = make_job(KdArgs("self", temperature=3.0, distill_wt=0.6, start_epoch=2), train=TrainArgs(epochs=5))
        policy = make_distillation(job, job.model)
        assert policy is not None
        assert policy._settings == DistillSettings(3.0, 0.6, 0.5)
        assert [policy._active(epoch) for epoch in range(4)] == [False, False, True, True]
        assert [record.getMessage() for record in caplog.records] == [
            "Distillation: digits_cnn learns from the float digits_cnn itself from epoch 2 on",
            "Distillation: temperature 3, weight 0.6 of the teacher and 0.5 of the labels",
        ]

    def test_a_schedule(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        saved("net.py:wide")
        job = trusting_job()
        given = {"teacher": "net.py:wide", "resume": "teacher.pth", "temperature": 5.0, "student_wt": 0.3}
        policy = make_distillation(job, job.model, schedule(start=1, end=3, **given))
        assert policy is not None
        assert policy._settings == DistillSettings(5.0, 0.5, 0.3)
        assert [policy._active(epoch) for epoch in range(4)] == [False, True, True, False]
        assert caplog.messages[0] == "Distillation: digits_cnn learns from net.py:wide (teacher.pth) in epochs 1 to 2"

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            (
                {"teacher": "digits_cnn"},
                "kd.yaml:3: the teacher digits_cnn would have random weights; give its checkpoint with resume, or"
                " pretrained for the published ones",
            ),
            (
                {"teacher": "self", "cache": True, "match": {"fc": "fc"}},
                "kd.yaml:3: cache saves running the teacher, which match needs; remove one of them",
            ),
        ],
    )
    def test_mistakes_in_a_schedule(self, folder: Path, settings: dict[str, Any], sentence: str) -> None:
        assert problem(make_job(), schedule(**settings)) == (ConfigError, sentence)

    @pytest.mark.parametrize("named", [None, "net.py:pair"], ids=["no teacher", "another teacher"])
    def test_a_python_file_is_run_only_if_the_command_line_names_it_too(self, folder: Path, named: str | None) -> None:
        saved("net.py:wide")
        Path("net.py").write_text("open('ran', 'w')")
        job = make_job(KdArgs(teacher=named))
        assert problem(job, schedule(teacher="net.py:wide", resume="teacher.pth")) == (
            ConfigError,
            "kd.yaml:3: the schedule names the Python file 'net.py:wide', and reading a file runs no other; if you"
            " trust it, name it on the command line: --kd-teacher net.py:wide",
        )
        assert not Path("ran").exists()

    def test_both(self, folder: Path) -> None:
        job = make_job(KdArgs(teacher="self"), given="--kd-temperature --kd-teacher")
        assert problem(job, schedule(teacher="self")) == (
            UsageError,
            "--kd-teacher and the KnowledgeDistillation at kd.yaml:3 both say how to distill; drop one of them",
        )

    def test_a_flag_without_a_teacher(self, folder: Path) -> None:
        assert problem(make_job(given="--kd-temperature"))[1] == (
            "--kd-temperature needs a teacher; give --kd-teacher, the name of a model or self"
        )

    def test_two_components(self, folder: Path) -> None:
        one = schedule(teacher="self").policies[0]
        two = replace(one, component=replace(one.component, name="kd2", where="kd.yaml:9"))
        assert problem(make_job(), Schedule((one, two)))[1] == (
            "kd.yaml:9: a second KnowledgeDistillation beside 'kd'; keep one of them"
        )

    def test_skipping_images_and_the_cache(self, folder: Path) -> None:
        assert problem(make_job(skip_corrupt=True), schedule(teacher="self", cache=True))[1] == (
            "kd.yaml:3: cache needs every image, and --skip-corrupt leaves some out; remove one of them"
        )


class TestCache:
    """The teacher's logits in a file."""

    def policy(self, job: Job) -> Distillation:
        made = make_distillation(job, job.model, schedule(teacher="net.py:wide", resume="teacher.pth", cache=True))
        assert made is not None
        return made

    def test_is_computed_once(
        self, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.set_level(logging.INFO)
        teacher = saved("net.py:wide").eval()
        job = trusting_job()
        policy, batch = self.policy(job), batch_of(job, [900, 3, 17])
        assert not Path("stats").exists()
        logits, losses = step(policy, job.model, batch)
        expected = distillation_loss(logits, teacher(batch.images), 1.0)
        torch.testing.assert_close(losses.others["Distill Loss"], expected.detach())
        (file,) = Path("stats").iterdir()
        assert file.name.startswith("net.py_wide_digits_teacher_")
        again = self.policy(job)
        monkeypatch.setattr(again._teacher, "forward", None)  # it is not called
        assert torch.equal(step(again, job.model, batch)[1].overall, losses.overall)
        assert f"The teacher's logits of 1297 images are those in {file}" in caplog.text

    def test_sees_the_images_as_evaluation_does(self, folder: Path) -> None:
        saved("net.py:wide")
        job = trusting_job()
        batch = batch_of(job, [3, 4])
        changed = replace(batch, images=torch.zeros_like(batch.images))
        of_both = [step(self.policy(job), job.model, each)[1].others["Distill Loss"] for each in (batch, changed)]
        policy = self.policy(job)
        policy.on_epoch_begin(0)
        assert torch.equal(policy._teacher_logits(batch), policy._teacher_logits(changed))
        assert of_both[0] != of_both[1]

    def test_another_teacher_has_another_file(self, folder: Path) -> None:
        job = trusting_job()
        model = saved("net.py:wide")
        self.policy(job).on_epoch_begin(0)
        with torch.no_grad():
            model.fc.bias += 1
        torch.save(model.state_dict(), "teacher.pth")
        self.policy(job).on_epoch_begin(0)
        assert len(list(Path("stats").iterdir())) == 2

    @pytest.mark.parametrize("damage", ["truncated", "empty", "of another shape"])
    def test_a_damaged_file_is_computed_again(
        self, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        from safetensors.torch import save_file

        saved("net.py:wide")
        job = trusting_job()
        first = self.policy(job)
        first.on_epoch_begin(0)
        (file,) = Path("stats").iterdir()
        content = file.read_bytes()
        if damage == "of another shape":
            save_file({"logits": torch.zeros(3, 10)}, file)
        else:
            file.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
        second = self.policy(job)
        second.on_epoch_begin(0)
        assert file.read_bytes() == content
        assert f"Warning: {file} is damaged, and is computed again" in caplog.text
        assert list(Path("stats").iterdir()) == [file]

    def test_only_for_active_epochs(self, folder: Path) -> None:
        job = make_job()
        made = make_distillation(job, job.model, schedule(start=5, teacher="self", cache=True))
        assert made is not None
        made.on_epoch_begin(4)
        assert not Path("stats").exists()

    def test_a_folder_that_cannot_be_written(self, folder: Path) -> None:
        saved("net.py:wide")
        Path("stats").write_text("a file")
        with pytest.raises(OutputError, match=r"cannot write the teacher's logits 'stats/.*; give a folder"):
            self.policy(trusting_job()).on_epoch_begin(0)


class InPlace(nn.Module):
    """A layer whose output the next one changes in place, one that runs twice, one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.ReLU()
        self.pair = nn.LSTM(4, 4)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = self.relu(x.mean([2, 3]))
        out: Tensor = self.fc(self.pair(x)[0])
        return out


class TestMatching:
    """Layers by name."""

    pairs: Mapping[str, str] = {"stem.relu": "conv", "wide": "bn"}

    @pytest.mark.parametrize(("kind", "loss"), [("attention", attention_loss), ("feature", feature_loss)])
    def test_the_sum_over_the_pairs(self, folder: Path, kind: str, loss: Any) -> None:
        job = make_job()
        given = {
            "teacher": "self",
            "match": {"stem.conv": "stem.conv", "fc": "fc"},
            "match_kind": kind,
            "match_wt": 3.0,
        }
        if kind == "attention":
            given["match"] = {"stem.conv": "stem.bn", "wide": "narrow"}
        policy = make_distillation(job, job.model, schedule(**given))
        assert policy is not None
        batch = batch_of(job, [0, 1, 2])
        _, losses = step(policy, job.model, batch)
        seen = ForwardHooks(named_outputs(job.model), "student")
        seen._layers = {name: named_outputs(job.model)[name] for pair in given["match"].items() for name in pair}
        seen.open()
        job.model(batch.images)
        outputs = seen.close()
        expected = sum(loss(outputs[mine], outputs[theirs]) for mine, theirs in given["match"].items())
        torch.testing.assert_close(losses.others["Match Loss"], expected.detach())
        overall = 0.5 * losses.objective + 0.5 * losses.others["Distill Loss"] + 3 * expected
        torch.testing.assert_close(losses.overall, overall)
        assert not any(module._forward_hooks for module in (*job.model.modules(), *policy._teacher.modules()))

    def test_gradients_reach_the_student_only(self, folder: Path) -> None:
        job = make_job()
        given = {"teacher": "self", "match": {"stem.conv": "stem.relu"}, "distill_wt": 0.0, "student_wt": 0.0}
        policy = make_distillation(job, job.model, schedule(**given))
        assert policy is not None
        _, losses = step(policy, job.model, batch_of(job, [0, 1]))
        losses.overall.backward()  # type: ignore[no-untyped-call]
        assert job.model.stem.conv.weight.grad.abs().sum() > 0
        assert job.model.fc.weight.grad.abs().sum() == 0

    def test_a_trainable_graph(self, folder: Path) -> None:
        """A ReLU that its layer computes, a layer by itself, and a container have the outputs of the float model."""
        job = make_job()
        lowered = prepare_qat(capture(job.model, job.example)).eval()
        names = ("relu", "stem.relu", "stem", "wide", "maxpool", "pointwise", "fc")
        there = named_outputs(lowered, fold(job.model, job.example).absorbed)
        assert "stem.bn" not in there  # what leaves the layer has passed the ReLU
        taps = [
            ForwardHooks({name: layers[name] for name in names}, "student")
            for layers in (there, named_outputs(job.model))
        ]
        images = batch_of(job, [0, 1]).images
        found = []
        for tap, model in zip(taps, (lowered, job.model), strict=True):
            tap.open()
            model(images)
            found.append(tap.close())
        for name in names:
            torch.testing.assert_close(found[0][name], found[1][name], msg=name)

    def test_a_trainable_graph_is_matched(self, folder: Path) -> None:
        job = make_job()
        lowered = prepare_qat(capture(job.model, job.example))
        match = {"relu": "relu", "narrow": "wide"}
        policy = make_distillation(job, lowered, schedule(teacher="self", match=match))
        assert policy is not None
        assert step(policy, lowered, batch_of(job, [0, 1]))[1].others["Match Loss"] > 0

    def test_outputs_that_are_changed_in_place(self) -> None:
        model = InPlace()
        taps = ForwardHooks({"conv": model.conv}, "student")
        taps.open()
        model(torch.randn(2, 1, 8, 8))
        assert taps.close()["conv"].min() < 0

    def test_a_block_of_torchvision(self) -> None:
        block = BasicBlock(3, 3).eval()
        there = named_outputs(prepare_qat(capture(nn.Sequential(block), torch.zeros(1, 3, 4, 4))))
        assert {"0", "0.conv1", "0.add"} <= set(there)
        assert there["0"] is there["0.add"]

    @pytest.mark.parametrize(
        ("match", "kind", "sentence"),
        [
            pytest.param(
                {"stem.relux": "stem.relu"},
                "attention",
                "kd.yaml:3: match names 'stem.relux', which the student does not have; did you mean stem.relu"
                " or wide.relu?",
                id="student",
            ),
            pytest.param(
                {"stem.relu": "fcc"},
                "attention",
                "kd.yaml:3: match names 'fcc', which the teacher does not have; did you mean fc?",
                id="teacher",
            ),
            pytest.param(
                {"stem": "maxpool"},
                "attention",
                "kd.yaml:3: 'stem' of the student gives 16x8x8 and 'maxpool' of the teacher 16x4x4; match layers whose"
                " maps have one size",
                id="sizes",
            ),
            pytest.param(
                {"fc": "fc"},
                "attention",
                "kd.yaml:3: 'fc' of the student gives 10 and 'fc' of the teacher 10; match layers whose maps have one"
                " size",
                id="no maps",
            ),
            pytest.param(
                {"wide": "narrow"},
                "feature",
                "kd.yaml:3: 'wide' of the student gives 24x4x4 and 'narrow' of the teacher 8x4x4; match layers of one"
                " shape, or give match_kind: attention",
                id="channels",
            ),
        ],
    )
    def test_mistakes(self, folder: Path, match: dict[str, str], kind: str, sentence: str) -> None:
        given = {"teacher": "self", "match": match, "match_kind": kind}
        assert problem(make_job(), schedule(**given)) == (ConfigError, sentence)

    def test_all_mistakes_at_once(self) -> None:
        model = nn.Sequential(nn.Conv2d(1, 2, 3))
        with pytest.raises(ConfigError) as error:
            Matching(model, model, {"1": "0", "0": "2"}, "attention", torch.zeros(1, 1, 4, 4))
        assert len(error.value.problems) == 2

    @pytest.mark.parametrize(
        ("layer", "sentence"),
        [
            ("relu", "layer 'relu' of the student runs 2 times for an image; match one that runs once"),
            ("unused", "layer 'unused' of the student runs 0 times for an image; match one that runs once"),
            ("pair", "layer 'pair' of the student gives no tensor; match one that does"),
        ],
    )
    def test_layers_that_do_not_give_one_tensor(self, layer: str, sentence: str) -> None:
        model = InPlace()
        with pytest.raises(ModelError) as error:
            Matching(model, model, {layer: "conv"}, "attention", torch.zeros(1, 1, 8, 8))
        assert str(error.value) == sentence
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_broken_step_leaves_nothing(self) -> None:
        model = InPlace()
        taps = ForwardHooks({"conv": model.conv}, "student")
        for _ in range(2):
            taps.open()
        model(torch.zeros(1, 1, 8, 8))
        assert len(taps.close()) == 1
        assert not model.conv._forward_hooks

    def test_the_student_is_tried_on_a_copy(self) -> None:
        student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
        before = copy.deepcopy(student.state_dict())
        Matching(student, copy.deepcopy(student).eval(), {"1": "0"}, "feature", torch.ones(2, 1, 4, 4))
        assert student.training
        assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
