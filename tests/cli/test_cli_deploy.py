"""Handing over from the command line: the file, the proof and the other engine, and what stands in their way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from runs import ROOT, Run, finish, good, make_images, rows, run, start, user_model

from qlib.deploy import verify as verification
from qlib.deploy.verify import Checked, Verification
from qlib.models import create_model, find_model
from qlib.report.record_file import read_report

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DIGITS = "-a digits_cnn --pretrained"
STATS = "stats/digits_cnn_digits.yaml"
QUANTIZED = f"{DIGITS} --qe --qe-stats-file {STATS} --qem asym_u --qemw sym --qepc"
MINE = "proved"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deploy")
    good(f"{DIGITS} --qe-calibration 0.1", folder)
    return folder


@pytest.fixture(scope="module")
def proved(folder: Path) -> Run:
    """A run that quantizes, exports, verifies, and evaluates in ONNX Runtime."""
    words = f"{QUANTIZED} --export-onnx --verify 20 --engine onnxruntime --export-encodings ort --name {MINE}"
    return good(words, folder)


def scores(done: Run) -> list[str]:
    return [line for line in done.lines if line.startswith(("==> Top1", "Top1 95", "FP32:", "Predictions", "On x86"))]


def test_both_engines_give_the_same_lines(folder: Path, proved: Run) -> None:
    plain = good(QUANTIZED, folder)
    found = [line for line in scores(proved) if not line.startswith("On x86")]
    assert found == scores(plain)
    assert len(found) == 5
    assert proved.score() == plain.score()
    assert "First batch in ONNX Runtime and in torch: the same to the last bit" in proved.lines
    assert [line for line in scores(proved) if line.startswith("On x86")] == [
        "On x86 without VNNI, where products saturate in 16 bits: "
        "Top1 {:.3f}    Top5 {:.3f}    Loss {:.5f} ({:.2f} % of predictions differ); "
        "--qe-reduce-range auto avoids it".format(
            *(float(proved.metrics("saturating")[key]) for key in ("top1", "top5", "loss", "changed"))
        )
    ]


def test_what_the_run_leaves(proved: Run) -> None:
    assert proved.files == {
        "configs/digits_cnn_digits.yaml",
        "configs/run_config.yaml",
        "metrics.csv",
        "predictions.csv",
        *(
            f"{MINE}_{name}"
            for name in (
                "digits_cnn_calibration_ort.json",
                "digits_cnn_int8.onnx",
                "layer_quant_params.yaml",
                "placement.csv",
                "quantized_checkpoint.pth.tar",
                "verify.csv",
            )
        ),
    }
    checked = rows(proved.folder / f"{MINE}_verify.csv")
    assert {row["verdict"] for row in checked} == {"exact"}
    assert {row["differing"] for row in checked} == {"0"}
    assert [(row["layer"], row["codes"]) for row in checked][-2:] == [("fc", "200"), ("(logits)", "200")]
    placed = rows(proved.folder / f"{MINE}_placement.csv")
    assert {row["type"] for row in placed} == {"integer"}
    assert sum(int(row["macs"]) for row in placed) == 93_440
    assert "predictions: 20 of 20 agree, largest logit difference 0" in proved.lines
    assert "verification: exact" in proved.lines
    assert "100.00% of multiply-accumulates in integers" in proved.lines


def test_the_report_says_the_same(proved: Run) -> None:
    report = read_report(proved.folder)
    assert report.verification is not None
    assert (report.verification.exact, report.verification.images, report.verification.agreeing) == (True, 20, 20)
    assert {each.verdict for each in report.verification.layers} == {"exact"}
    assert report.deployment is not None
    assert report.deployment.integer_share == 1
    placed = rows(proved.folder / f"{MINE}_placement.csv")
    assert [(each.layer, each.kernels) for each in report.deployment.layers] == [
        (row["layer"], row["kernel"]) for row in placed
    ]
    assert [each.model for each in report.results] == ["quantized", "fp32", "saturating"]
    assert [each.what for each in report.files] == ["ONNX, integers", "quantized checkpoint"]


def test_messages_of_the_exporter_are_not_in_the_log(proved: Run) -> None:
    assert not re.search("constant folding|initializer|unused nodes", proved.log)


def test_metadata(proved: Run) -> None:
    model = onnx.load(proved.folder / f"{MINE}_digits_cnn_int8.onnx")
    found = {each.key: each.value for each in model.metadata_props}
    assert sorted(found) == [
        f"qlib.{key}" for key in ("arch", "config", "dataset", "plan", "stats", "transform", "version")
    ]
    assert (found["qlib.arch"], found["qlib.dataset"]) == ("digits_cnn", "digits")
    assert found["qlib.transform"].startswith("Compose(")
    stats = json.loads(found["qlib.stats"])
    assert (stats["arch"], stats["samples"], stats["split"]) == ("digits_cnn", 130, "train")
    text = model.SerializeToString()
    assert str(proved.folder.parents[1]).encode() not in text
    assert b" at 0x" not in text


def test_the_run_can_be_repeated_in_another_process(folder: Path, proved: Run) -> None:
    again = finish(start(f"--run-config '{proved.folder / 'configs/run_config.yaml'}'", folder), folder)
    assert (again.code, again.err) == (0, "")
    assert again.files == proved.files
    assert scores(again) == scores(proved)
    for name in (f"{MINE}_verify.csv", f"{MINE}_placement.csv"):
        assert (again.folder / name).read_bytes() == (proved.folder / name).read_bytes()
    name = f"{MINE}_digits_cnn_int8.onnx"
    assert graph_of(again.folder / name) == graph_of(proved.folder / name)


def graph_of(path: Path) -> bytes:
    return bytes(onnx.load(path).graph.SerializeToString())


def test_a_quantized_checkpoint_gives_the_same_integers(folder: Path, proved: Run) -> None:
    checkpoint = proved.folder / f"{MINE}_quantized_checkpoint.pth.tar"
    again = good(f"--resume-from {checkpoint} --export-onnx again.onnx --verify 5 --export-encodings ort", folder)
    assert graph_of(folder / "again.onnx") == graph_of(proved.folder / f"{MINE}_digits_cnn_int8.onnx")
    assert "predictions: 5 of 5 agree, largest logit difference 0" in again.lines
    assert again.files == {
        "configs/run_config.yaml",
        "digits_cnn_calibration_ort.json",
        "placement.csv",
        "verify.csv",
    }
    ranges = "digits_cnn_calibration_ort.json"
    assert (again.folder / ranges).read_bytes() == (proved.folder / f"{MINE}_{ranges}").read_bytes()
    evaluated = good(f"--resume-from {checkpoint} --engine onnxruntime --export-opset 21", folder)
    assert evaluated.score() == proved.score()
    assert evaluated.files == {
        "configs/run_config.yaml",
        "digits_cnn_int8.onnx",
        "metrics.csv",
        "placement.csv",
        "predictions.csv",
    }


def test_the_float_model(folder: Path) -> None:
    plain = good(f"{DIGITS} -e", folder)
    other = good(f"{DIGITS} -e --engine onnxruntime --export-onnx float.onnx", folder)
    assert scores(other) == scores(plain)
    assert other.files == {"configs/run_config.yaml", "metrics.csv", "predictions.csv"}
    assert [line for line in other.lines if line.startswith("Exported")] == [
        f"Exported the float model to float.onnx (opset 20, {(folder / 'float.onnx').stat().st_size / 1e6:.1f} MB)"
    ]
    (first,) = (line for line in other.lines if line.startswith("First batch"))
    assert float(first.rpartition(" ")[2]) < 1e-4
    assert "qlib.plan" not in {each.key for each in onnx.load(folder / "float.onnx").metadata_props}


def test_the_float_model_is_exported_without_images(tmp_path: Path) -> None:
    done = good("-a resnet20_cifar --export-onnx --export-opset 19", tmp_path)
    assert done.files == {"configs/run_config.yaml", "resnet20_cifar.onnx"}
    assert onnx.load(done.folder / "resnet20_cifar.onnx").opset_import[0].version == 19
    assert scores(done) == []


KINDS = {
    "weights in float": ("--qe-bits-wts 0 --verify 12", 20, []),
    "16 bits": (
        "--qe-bits-acts 16 --engine onnxruntime",
        21,
        ["  activations of 16 bits are stored as uint16, which ONNX Runtime computes in float: "],
    ),
    "4-bit weights": (
        "--qe-bits-wts 4 --export-opset 21 --verify 12",
        21,
        ["  weights of 4 bits are stored as int4, which ONNX Runtime computes in float: "],
    ),
    "few bits": (
        "--qe-bits-wts 5 --qe-bits-acts 6 --verify 12",
        20,
        [
            "  weights of 5 bits are stored as int8 with the same codes: ",
            "  activations of 6 bits are stored as uint8 with the same codes: ",
        ],
    ),
}


@pytest.mark.parametrize(("flags", "opset", "notes"), KINDS.values(), ids=KINDS)
def test_what_is_stored_otherwise_is_said(flags: str, opset: int, notes: list[str], folder: Path) -> None:
    done = good(f"{QUANTIZED} {flags} --etes 0.1", folder)
    said = [line for line in done.lines if " bits are stored as " in line]
    assert [note for note, line in zip(notes, said, strict=True) if not line.startswith(note)] == []
    assert any(f"digits_cnn_int8.onnx (opset {opset}, " in line for line in done.lines)
    assert ("verification: exact" in done.lines) == ("--verify" in flags)


REFUSED = {
    "more images than there are": (
        f"{QUANTIZED} --verify 501",
        "--verify 501 asks for more images than the 500 of the test split; lower it",
    ),
    "approximate factor": (
        f"{QUANTIZED} --qe-scale-approx-bits 8 --export-onnx",
        "layer 'stem.conv' cannot be exported: it requantizes with an approximate factor (--qe-scale-approx-bits),"
        " which no ONNX operator does; drop that",
    ),
    "small accumulator": (
        f"{QUANTIZED} --qe-bits-accum 14 --verify",
        "layer 'stem.conv' cannot be exported: it has an accumulator of 14 bits that can saturate (--qe-bits-accum),"
        " which no ONNX operator does; drop that",
    ),
    "dynamic": (
        f"{DIGITS} --qe --qe-dynamic --engine onnxruntime",
        "a plan without fixed ranges cannot be exported: collect statistics with --qe-calibration,"
        " and quantize with --qe-stats-file",
    ),
    "old opset": (
        f"{QUANTIZED} --qe-bits-acts 16 --export-onnx --export-opset 20",
        "--export-opset 20 has no 16-bit activations, which layer 'stem.conv' has;"
        " use --export-opset 21, or --qe-bits-acts 8",
    ),
    "float checkpoint to verify": (
        "--resume-from float.pth.tar --verify",
        "--verify needs a quantized model, but this one is float; add --quantize-eval",
    ),
    "float checkpoint's encodings": (
        "--resume-from float.pth.tar --export-encodings aimet",
        "--export-encodings needs a quantized model, but this one is float; add --quantize-eval",
    ),
}


@pytest.mark.parametrize(("words", "sentence"), REFUSED.values(), ids=REFUSED)
def test_mistakes(words: str, sentence: str, folder: Path) -> None:
    model = create_model(find_model("digits_cnn"), num_classes=10, pretrained=True)
    torch.save({"arch": "digits_cnn", "state_dict": model.state_dict()}, folder / "float.pth.tar")
    done = run(words, folder)
    assert (done.code, done.err) == (2, f"compress.py: error: {sentence}\n")
    assert "verify.csv" not in done.files


MISSING = {
    "export": (
        ("onnx", "onnxscript", "onnxruntime"),
        f"{DIGITS} --export-onnx",
        "--export-onnx needs onnx, onnxscript",
    ),
    "verify": (("onnxruntime",), f"{QUANTIZED} --verify", "--verify needs onnxruntime"),
    "float engine": (("onnxscript",), f"{DIGITS} -e --engine onnxruntime", "--engine onnxruntime needs onnxscript"),
    "engine": (("onnx",), f"{QUANTIZED} --engine onnxruntime", "--engine onnxruntime needs onnx"),
}


@pytest.mark.parametrize(("absent", "words", "sentence"), MISSING.values(), ids=MISSING)
def test_the_extra_is_missing(
    absent: tuple[str, ...], words: str, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    done = run(words, folder)
    assert done.code == 2
    assert done.err.startswith(f"compress.py: error: {sentence}")
    assert done.err.endswith(", not installed here: pip install 'qlib-compress[onnx]'\n")


def test_all_else_works_without_the_extra(folder: Path) -> None:
    words = f"{QUANTIZED} --etes 0.1 --cpu -j 0 --qe-reduce-range auto".split()
    words += [word for kind in ("ort", "tensorrt", "aimet") for word in ("--export-encodings", kind)]
    program = (
        f"import sys; sys.modules.update(onnx=None, onnx_ir=None, onnxscript=None, onnxruntime=None); "
        f"sys.path.insert(0, {str(ROOT)!r}); from qlib.cli import main; sys.exit(main({words}))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(" written for ([a-z]+) to ", done.stdout) == ["ort", "tensorrt", "aimet"]


def test_the_ranges_alone(folder: Path) -> None:
    kinds = "".join(f" --export-encodings {kind}" for kind in ("aimet", "ort", "tensorrt"))
    done = good(f"{QUANTIZED} --etes 0.1{kinds}", folder)
    assert {name for name in done.files if "calibration" in name or "encodings" in name} == {
        "digits_cnn_calibration.cache",
        "digits_cnn_calibration_ort.json",
        "digits_cnn_encodings.json",
    }
    assert not [name for name in done.files if name.endswith((".onnx", "placement.csv"))]


REDUCED = {
    "none": ("none", None, set()),
    "auto": ("auto", "4 layers get 7-bit weights: ", {"stem.conv", "pointwise.conv", "wide.conv", "fc"}),
    "all": (
        "all",
        "6 layers get 7-bit weights: ",
        {"stem.conv", "depthwise.conv", "pointwise.conv", "wide.conv", "narrow.conv", "fc"},
    ),
}


@pytest.mark.parametrize(("how", "line", "layers"), REDUCED.values(), ids=REDUCED)
def test_reduced_range(how: str, line: str | None, layers: set[str], folder: Path) -> None:
    done = good(f"{QUANTIZED} --etes 0.1 --qe-reduce-range {how}", folder)
    said = [
        text.removeprefix(f"--qe-reduce-range {how}: ") for text in done.lines if text.startswith("--qe-reduce-range")
    ]
    assert len(said) == (line is not None)
    assert line is None or said[0].startswith(line)
    plan = yaml.safe_load((done.folder / "layer_quant_params.yaml").read_text())["layers"]
    bits = {name: layer["weight"]["bits"] for name, layer in plan.items() if layer.get("weight")}
    assert {name for name, count in bits.items() if count == 7} == layers
    assert set(bits.values()) <= {7, 8}


def test_where_nothing_can_saturate_nothing_is_said_of_it(folder: Path) -> None:
    done = good(f"{QUANTIZED} --etes 0.1 --qe-reduce-range all --engine onnxruntime", folder)
    assert [line for line in scores(done) if line.startswith("On x86")] == []
    assert {row["what"] for row in rows(done.folder / "metrics.csv")} == {"fp32", "quantized"}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["run", "checkpoint"])
def test_exit_code_1_where_the_file_differs(
    checkpoint: bool, folder: Path, proved: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Checked("fc", "QGemm", True, codes=200, differing=3, largest=2, differing_alone=3)
    monkeypatch.setattr(verification, "verify", lambda *_: Verification((wrong,), 20, 19, 0.5, True))
    resumed = f"--resume-from {proved.folder / f'{MINE}_quantized_checkpoint.pth.tar'}"
    done = run(f"{resumed if checkpoint else QUANTIZED} --etes 0.1 --verify 20", folder)
    assert (done.code, done.err) == (1, "")
    assert "verification: NOT exact" in done.lines
    assert [row["verdict"] for row in rows(done.folder / "verify.csv")] == ["differs"]
    assert ("quantized_checkpoint.pth.tar" in done.files) == (not checkpoint)


def test_a_model_and_images_of_the_users_own(tmp_path: Path) -> None:
    arch, data = user_model(tmp_path), make_images(tmp_path / "images")
    words = f"-a {tmp_path / arch} {data} --qe --qe-calibration 1 --qe-mode asym_u -b 5"
    done = good(f"{words} --export-onnx m.onnx --verify 12", tmp_path)
    assert "predictions: 12 of 12 agree, largest logit difference 0" in done.lines
    found = {each.key: each.value for each in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert found["qlib.arch"] == json.loads(found["qlib.stats"])["arch"] == arch
    assert str(tmp_path).encode() not in (tmp_path / "m.onnx").read_bytes()
    few = run(f"{words} --verify", tmp_path)
    assert (few.code, few.err) == (
        2,
        "compress.py: error: --verify 64 asks for more images than the 12 of the test split; lower it\n",
    )
    none = run(f"--resume-from {done.folder / 'quantized_checkpoint.pth.tar'} --verify 4", tmp_path)
    assert none.code == 2
    assert none.err.startswith("compress.py: error: ")
    assert none.err.count("\n") == 1


UNKNOWN = """
import torch
from torch import nn

class Wave(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)

class Net(nn.Module):
    dataset, input_shape = "imagefolder", (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), Wave())

    def forward(self, x):
        return self.body(x).mean((2, 3))
"""


@pytest.mark.parametrize("flags", ["--export-onnx", "--qe --qe-calibration 1 --verify 3"], ids=["float", "quantized"])
def test_an_operator_that_onnx_does_not_have(flags: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(UNKNOWN)
    data, line = (
        make_images(tmp_path / "images"),
        UNKNOWN.splitlines().index("        return torch.special.bessel_j0(x)"),
    )
    done = run(f"-a net.py:Net {data} {flags}", tmp_path)
    where = f"in layer 'body.1' (net.py:{line + 1})"
    assert (done.code, done.err) == (
        2,
        f"compress.py: error: the model cannot be exported: ONNX has no form of prims.bessel_j0 {where};"
        " write it with other operators\n",
    )
    assert not [name for name in done.files if name.endswith(".onnx")]
