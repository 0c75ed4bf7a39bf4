"""The flows of the command line from end to end: what is logged and written, and that it can be had again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from runs import CLASSES, ROOT, SHARED, Run, finish, good, make_images, start, user_model

from qlib.app.job import choose_device
from qlib.config.flags.run_config import RunConfig
from qlib.errors import UsageError
from qlib.metrics import mcnemar, wilson_interval
from qlib.models import create_model, find_model

DIGITS = "-a digits_cnn --pretrained"
STATS = "stats/digits_cnn_digits.yaml"
QUANTIZED = f"{DIGITS} --quantize-eval --qe-stats-file {STATS} --qe-per-channel --qe-mode asym_u"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the module's runs, with statistics of digits_cnn."""
    folder = tmp_path_factory.mktemp("digits")
    calibrated = good(f"{DIGITS} --qe-calibration 0.2", folder)
    assert calibrated.lines == [
        "Random seed: 0",
        "=> created a pretrained digits_cnn model with the digits dataset",
        "Collecting quantization calibration stats based on 20.0% of train dataset",
        "Calibration: [   10/   17]    ",
        "Stats collection complete",
        f"Stats saved to {STATS}",
    ]
    assert calibrated.files == {"acts_quantization_stats.yaml", "configs/run_config.yaml"}
    written = (folder / STATS).read_bytes()
    assert (calibrated.folder / "acts_quantization_stats.yaml").read_bytes() == written
    assert list((folder / "stats").iterdir()) == [folder / STATS]
    return folder


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Run:
    return good(f"{QUANTIZED} --name first", folder)


def plan_of(run: Run) -> Path:
    (path,) = run.folder.glob("*layer_quant_params.yaml")
    return path


def test_lines_of_an_evaluation(folder: Path) -> None:
    run = good(f"{DIGITS} -e -b 200 -p 2 --vs 0.2 --confusion", folder)
    top1, top5, loss = map(float, run.score("fp32"))
    row = run.metrics("fp32")
    warning, *lines = run.lines
    assert warning == "Warning: --validation-split is ignored: with --evaluate nothing is trained"
    assert lines[:8] == [
        "Random seed: 0",
        "=> created a pretrained digits_cnn model with the digits dataset",
        "Dataset sizes:",
        "\ttraining=1038",
        "\tvalidation=259",
        "\ttest=500",
        "--- test ---------------------",
        "500 samples (200 per mini-batch)",
    ]
    assert re.fullmatch(r"Test: \[    2/    3\]    Loss 0\.\d{6}    Top1 \d\d\.\d{6}    Top5 \d+\.\d{6}    ", lines[8])
    interval = f"{float(row['top1_low']):.2f} to {float(row['top1_high']):.2f}"
    assert lines[9:13] == [
        f"==> Top1: {top1:.3f}    Top5: {top5:.3f}    Loss: {loss:.3f}",
        "",
        f"Top1 95 % interval: {interval} (500 images), Loss {loss:.5f}",
        "==> Confusion:",
    ]
    confusion = [list(map(int, line.split())) for line in lines[13:23]]
    assert [sum(row) for row in confusion] == [50] * 10
    assert sum(confusion[i][i] for i in range(10)) == round(5 * top1)
    assert top1 > 98
    assert run.files == {"configs/run_config.yaml", "metrics.csv", "predictions.csv"}
    for line in run.log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - |\t| +\d|$", line), line


def test_lines_and_files_of_a_quantized_run(folder: Path, quantized: Run) -> None:
    lines, changed = quantized.lines, float(quantized.metrics("quantized")["changed"])
    top1, top5, loss = map(float, quantized.score("fp32"))
    assert re.fullmatch(r"first___\d{4}\.\d\d\.\d\d-\d{6}(-\d+)?", quantized.folder.name)
    assert quantized.files == {
        "configs/digits_cnn_digits.yaml",
        "configs/run_config.yaml",
        "first_layer_quant_params.yaml",
        "first_quantized_checkpoint.pth.tar",
        "metrics.csv",
        "predictions.csv",
    }
    assert "100.0 % of the multiply-accumulates are computed in integers: 15 of 15 layers" in lines
    low, high = wilson_interval(1 - changed / 100, 500)
    lost, won = (int(quantized.metrics("quantized")[name]) for name in ("lost", "won"))
    assert lines[-5:-2] == [
        f"FP32:    Top1 {top1:.3f}    Top5 {top5:.3f}    Loss {loss:.5f}",
        f"Predictions that differ from FP32: {changed:.2f} %",
        f"Agreement with FP32: {100 - changed:.2f} %, 95 % interval {low:.2f} to {high:.2f};"
        f" right only there {lost}, only here {won}, McNemar p = {mcnemar(lost, won):.3g}",
    ]
    assert lines[-2].startswith("Predictions changed most in images of: ")
    assert lines[-1:] == [
        f"Saving checkpoint to: {quantized.folder / 'first_quantized_checkpoint.pth.tar'}",
    ]
    assert changed <= 1
    assert abs(float(quantized.score()[2]) - loss) < 0.01


def test_the_plan_passed_back_reproduces_the_run(folder: Path, quantized: Run) -> None:
    again = good(f"{DIGITS} --quantize-eval --qe-config-file '{plan_of(quantized)}'", folder)
    assert again.score() == quantized.score()
    assert plan_of(again).read_bytes() == plan_of(quantized).read_bytes()


def test_an_edited_plan_changes_the_run(folder: Path, quantized: Run) -> None:
    text = plan_of(quantized).read_text()
    conv = text.index("  wide.conv:")
    edited = text[:conv] + text[conv:].replace("weight: {bits: 8", "weight: {bits: 2", 1)
    (folder / "edited.yaml").write_text(edited)
    run = good(f"{DIGITS} --quantize-eval --qe-config-file edited.yaml", folder)
    assert plan_of(run).read_text() == edited
    assert run.score() != quantized.score()
    assert run.score("fp32") == quantized.score("fp32")


def test_a_plan_as_statistics_gives_the_same_ranges(folder: Path, quantized: Run) -> None:
    run = good(QUANTIZED.replace(STATS, f"'{plan_of(quantized)}'"), folder)
    assert plan_of(run).read_bytes() == plan_of(quantized).read_bytes()
    assert run.score() == quantized.score()


def test_the_checkpoint_needs_no_flags(folder: Path, quantized: Run) -> None:
    checkpoint = "latest_log_dir/first_quantized_checkpoint.pth.tar"
    (folder / "latest_log_dir").unlink()
    (folder / "latest_log_dir").symlink_to(quantized.folder)
    again = good(f"--resume-from {checkpoint}", folder)
    assert "=> loaded a quantized digits_cnn model with the digits dataset" in again.lines
    assert again.score() == quantized.score()


def test_run_config_repeats_the_run(folder: Path, quantized: Run) -> None:
    again = good(f"--run-config '{quantized.folder / 'configs' / 'run_config.yaml'}'", folder)
    assert again.score() == quantized.score()
    assert again.folder.name.startswith("first___")


@pytest.mark.parametrize(("flags", "threads"), [("-b 7 -j 2", 1), ("-b 64 -j 0", 2)], ids=["b7 j2", "two threads"])
def test_other_batches_workers_and_threads_change_no_digit(
    folder: Path, quantized: Run, flags: str, threads: int
) -> None:
    again = finish(start(f"{QUANTIZED} {flags}", folder, threads), folder)
    assert (again.code, again.err) == (0, "")
    assert again.score() == quantized.score()
    assert again.metrics("quantized")["changed"] == quantized.metrics("quantized")["changed"]


@pytest.mark.parametrize("batch", [1, 40, 512])
def test_other_batches_give_the_same_statistics(folder: Path, tmp_path: Path, batch: int) -> None:
    good(f"{DIGITS} --qe-calibration 0.2 -b {batch}", tmp_path)
    assert (tmp_path / STATS).read_bytes() == (folder / STATS).read_bytes()


CALIBRATIONS = {
    "implicit": ("", "5.0% of train", 65),
    "a fraction": ("--qe-calibration 0.1", "10.0% of train", 130),
    "another split": ("--qe-calibration 0.1 --qe-calibration-split test", "10.0% of test", 50),
    "weights only": ("--qe-bits-acts 0", None, 0),
    "weights only, asked for": ("--qe-bits-acts 0 --qe-calibration 0.1", "10.0% of train", 130),
    "dynamic": ("--qe-dynamic", None, 0),
}


@pytest.mark.parametrize(("flags", "of", "samples"), CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_calibration_before_quantization(tmp_path: Path, flags: str, of: str | None, samples: int) -> None:
    run = good(f"{DIGITS} --quantize-eval {flags} --etes 0.1", tmp_path)
    line = f"Collecting quantization calibration stats based on {of} dataset"
    assert (line in run.lines) == (of is not None)
    assert (tmp_path / STATS).exists() == (of is not None)
    if of is not None:
        header = yaml.safe_load((tmp_path / STATS).read_text())["qlib_stats"]
        assert (header["split"], header["samples"]) == (of.split()[-1], samples)
        assert run.lines.index(line) < run.lines.index("--- test ---------------------")
    warned = any("dynamic quantization" in line for line in run.lines)
    assert warned == ("dynamic" in flags)
    assert float(run.score()[0]) >= 96


MODES = {  # flags -> weights and activations of the plan
    "--qe-mode sym": ("8 sym", "8 sym none"),
    "--qe-mode sym_restr --qepc": ("8 sym_restr per channel", "8 sym_restr none"),
    "--qe-mode asym_s": ("8 asym_s", "8 asym_s none"),
    "--qem asym_u --qemw sym": ("8 sym", "8 asym_u none"),
    "--qema asym_u --qe-clip-acts avg": ("8 sym", "8 asym_u avg"),
    "--qe-clip-acts n_std --qe-clip-n-stds 4": ("8 sym", "8 sym n_std"),
    "--qe-clip-acts gauss --qe-bits-acts 8": ("8 sym", "8 sym gauss"),
    "--qe-clip-acts laplace --qe-no-clip-layers wide.conv": ("8 sym", "8 sym none"),
    "--qe-bits-acts 6 --qe-bits-wts 7": ("7 sym", "6 sym none"),
    "--qe-bits-wts 0": ("None", "8 sym none"),
    "--qe-bits-acts 0": ("8 sym", "None"),
    "--qe-no-quant-layers wide.conv narrow.conv": ("None", "None"),
    "--qe-scale-approx-bits 8 --qe-bits-accum 24": ("8 sym", "8 sym none"),
}


@pytest.mark.parametrize(("flags", "expected"), MODES.items(), ids=MODES)
def test_each_way_to_quantize(folder: Path, flags: str, expected: tuple[str, str]) -> None:
    run = good(f"{DIGITS} --quantize-eval --qe-stats-file {STATS} {flags} --etes 0.2", folder)
    layer = yaml.safe_load(plan_of(run).read_text())["layers"]["wide.conv"]
    weight, output = layer["weight"], layer["output"]
    channel = " per channel" if weight and weight["per_channel"] else ""
    found = (
        f"{weight['bits']} {weight['mode']}{channel}" if weight else "None",
        f"{output['bits']} {output['mode']} {output['clip']}" if output else "None",
    )
    assert found == expected
    assert float(run.score()[0]) >= 95
    reloaded = good(f"--resume-from {run.folder / 'quantized_checkpoint.pth.tar'} --etes 0.2", folder)
    assert reloaded.score() == run.score()


def test_a_config_file_names_each_flag_that_it_replaces(folder: Path) -> None:
    config = ROOT / "schedules" / "ptq_8bit_per_channel.yaml"
    run = good(f"{DIGITS} --qe --qe-config-file {config} --qe-bits-acts 4 --qepc --qencl fc --etes 0.1", folder)
    warned = [line.split()[1] for line in run.lines if "(--qe-config-file) replaces it" in line]
    assert warned == ["--qe-bits-acts", "--qe-no-clip-layers", "--qe-per-channel"]
    assert "configs/ptq_8bit_per_channel.yaml" in run.files


def test_a_schedule_for_weights_alone_needs_no_statistics(tmp_path: Path) -> None:
    config = ROOT / "schedules" / "ptq_weights_only_4bit.yaml"
    run = good(f"{DIGITS} --qe --qe-config-file {config} --etes 0.1", tmp_path)
    assert not (tmp_path / "stats").exists()
    assert "weight: {bits: 4, mode: asym_u, per_channel: true}" in plan_of(run).read_text()


def test_a_distiller_file(folder: Path) -> None:
    (folder / "distiller.yaml").write_text(f"""
quantizers:
  post_train_quantizer:
    class: PostTrainLinearQuantizer
    bits_activations: 8
    bits_parameters: 8
    mode: ASYMMETRIC_UNSIGNED
    model_activation_stats: {STATS}
    per_channel_wts: True
    inputs_quant_auto_fallback: True
    overrides:
      wide.*:
        bits_weights: 4
      fc:
        clip_acts: NONE
        bits_activations: 16
""")
    run = good(f"{DIGITS} --qe --qe-config-file distiller.yaml", folder)
    layers = yaml.safe_load(plan_of(run).read_text())["layers"]
    assert {name: layer["weight"]["bits"] for name, layer in layers.items() if layer.get("weight")} == {
        **dict.fromkeys(("stem.conv", "depthwise.conv", "pointwise.conv", "narrow.conv", "fc"), 8),
        "wide.conv": 4,
    }
    assert layers["fc"]["output"]["bits"] == 16


def test_check_prints_the_table_and_stops(folder: Path, quantized: Run) -> None:
    flags = f"{DIGITS} --qe --qe-stats-file {STATS} --qe-no-quant-layers fc --check"
    run = good(flags, folder)
    rows = {cells[1]: cells[2:-1] for line in run.lines if len(cells := re.split(r" *\| *", line)) > 2}
    assert rows["Name"] == ["Kind", "Output", "W bits", "A bits", "Mode (weights / acts)", "Clip", "Set by"]
    assert rows["stem.conv"] == ["conv", "16x8x8", "8", "8", "sym / sym", "none", "defaults"]
    assert rows["stem.relu"][-1] == "computed by stem.conv"
    assert rows["fc"][2:4] + rows["fc"][6:] == ["float", "float", "--qe-no-quant-layers"]
    assert run.files == {"configs/digits_cnn_digits.yaml", "configs/run_config.yaml"}
    planned = good(f"{DIGITS} --check --qe-config-file '{plan_of(quantized)}'", folder)
    assert any("8 asym_u per channel" in line for line in planned.lines)


def test_check_shows_the_bits_of_an_input_and_who_set_them(folder: Path) -> None:
    text = f"""\
quantizers:
  linear:
    class: PostTrainLinearQuantizer
    model_activation_stats: {STATS}
    overrides:
      wide.conv:
        input_overrides: {{0: {{bits_activations: 4}}}}
"""
    (folder / "own.yaml").write_text(text)
    run = good(f"{DIGITS} --qe --qe-config-file own.yaml --check", folder)
    (line,) = (line for line in run.lines if line.startswith("| wide.conv "))
    assert re.split(r" *\| *", line)[5:-1] == ["8, input 0: 4", "sym / sym", "none", "own.yaml:7"]


SUMMARIES = {
    "compute": "Total MACs: 93,440",
    "sparsity": "Total sparsity: 0.00",
    "modules": "| fc                  | Linear      |",
    "model": "  (fc): Linear(in_features=128, out_features=10, bias=True)",
}


@pytest.mark.parametrize(("what", "line"), SUMMARIES.items(), ids=SUMMARIES)
def test_summary(tmp_path: Path, what: str, line: str) -> None:
    run = good(f"{DIGITS} --summary {what}", tmp_path)
    assert any(found.startswith(line) for found in run.lines), run.out
    assert "metrics.csv" not in run.files


def test_float_weights_are_kept_on_request(folder: Path, quantized: Run) -> None:
    kept = good(f"{QUANTIZED} --qe-save-fp-weights", folder)
    assert kept.score() == quantized.score()
    loaded = good(f"-e --exp-load-weights-from {kept.folder / 'quantized_checkpoint.pth.tar'}", folder)
    assert "=> created a digits_cnn model with the digits dataset" in loaded.lines
    assert loaded.score("fp32") == quantized.score("fp32")


def test_a_model_and_images_of_the_users_own(tmp_path: Path) -> None:
    arch, data = user_model(tmp_path), make_images(tmp_path / "images")
    assert not list((data / "val" / CLASSES[0]).iterdir())
    run = good(f"-a {arch} {data} --quantize-eval --qe-calibration 1 --qe-mode asym_u -b 5 --confusion", tmp_path)
    assert "Collecting quantization calibration stats based on 100.0% of train dataset" in run.lines
    assert "=> created a net.py:brightest model with the imagefolder dataset" in run.lines
    assert (tmp_path / "stats" / "net.py_brightest_imagefolder.yaml").exists()
    for what in ("fp32", "quantized"):  # 11 of 12 are right by construction
        assert run.score(what)[:2] == (str(100 * (11 / 12)), "100.0")
    assert run.metrics("quantized")["changed"] == "0.0"
    table = [line.split() for line in run.lines[run.lines.index("==> Confusion:") + 1 :][:4]]
    assert table == [["0", "0", "0", "0"], ["0", "3", "0", "0"], ["0", "0", "4", "0"], ["0", "1", "0", "4"]]
    again = good(f"-a {arch} {data} --resume-from {run.folder / 'quantized_checkpoint.pth.tar'}", tmp_path)
    assert again.score() == run.score()


def test_val_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images")
    shutil.rmtree(data / "train")
    run = good(f"-a {user_model(tmp_path)} --dataset imagefolder {data} -e", tmp_path)
    assert "\ttraining=0" in run.lines
    assert run.metrics("fp32")["samples"] == "12"


def test_a_named_dataset_tells_the_number_of_classes(tmp_path: Path) -> None:
    run = good("-a resnet20_cifar --dataset cifar100 --summary model", tmp_path)
    assert "(fc): Linear(in_features=64, out_features=100, bias=True)" in run.out


def test_a_cifar_model_on_an_image_folder(tmp_path: Path) -> None:
    data = make_images(tmp_path / "images", size=32)
    run = good(f"-a resnet20_cifar --dataset imagefolder {data} -e", tmp_path)
    assert any(line.startswith("Warning: the weights are random; give --pretrained") for line in run.lines)
    assert run.metrics("fp32")["samples"] == "12"


def test_corrupt_images_are_counted_and_left_out(tmp_path: Path) -> None:
    arch, data = user_model(tmp_path), make_images(tmp_path / "images")
    bad = data / "val" / "blue" / "009.png"
    bad.write_bytes(b"no image")
    run = good(f"-a {arch} {data} -e --skip-corrupt", tmp_path)
    assert f"Warning: 1 corrupt images were left out, the first is {bad}" in run.lines
    assert run.metrics("fp32")["samples"] == "11"


@pytest.mark.parametrize(
    ("gpus", "available", "device", "line"),
    [
        pytest.param((0,), 0, "cpu", "--gpus 0: this machine has no GPU; the run is on the CPU", id="no GPU"),
        pytest.param((3, 5), 0, "cpu", "--gpus 3,5: this machine has no GPU; the run is on the CPU", id="other ids"),
        pytest.param(None, 0, "cpu", "", id="no GPU, none asked for"),
        pytest.param((1,), 2, "cuda:1", "", id="a GPU"),
        pytest.param(None, 2, "cuda:0", "One GPU is used: 0", id="the first"),
        pytest.param((1, 0), 2, "cuda:1", "One GPU is used: 1", id="several"),
    ],
)
def test_the_device_that_the_flags_choose(
    gpus: tuple[int, ...] | None,
    available: int,
    device: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    caplog.set_level("INFO")
    assert str(choose_device(RunConfig(gpus=gpus))) == device
    assert caplog.messages == [line] * bool(line)


def test_a_gpu_that_is_not_among_those_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"^--gpus names GPU 63, but this machine has 0 to 1; use --cpu or another"):
        choose_device(RunConfig(gpus=(0, 63)))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(
            "-e --resume-from zero.pth",
            "The masks in checkpoint 'zero.pth' are applied: they zero 128 weights in 1 parameter; all of these"
            " weights are zero in the file",
            id="zero",
        ),
        pytest.param(
            "--qe --qe-calibration 0.02 --resume-from other.pth",
            "The masks in checkpoint 'other.pth' are applied: they zero 138 weights in 2 parameters; 10 of these"
            " weights are not zero (fc.bias 10)",
            id="not zero",
        ),
        pytest.param(
            "--summary sparsity --exp-load-weights-from other.pth",
            "The masks in checkpoint 'other.pth' are dropped, as --exp-load-weights-from asks: they zero 138 weights in"
            " 2 parameters; 10 of these weights are not zero (fc.bias 10)",
            id="dropped",
        ),
        pytest.param(
            "--lr 0.01 --epochs 1 --etrs 0.05 --evs 0.1 --exp-load-weights-from zero.pth",
            "The masks in checkpoint 'zero.pth' are dropped, as --exp-load-weights-from asks: they zero 128 weights in"
            " 1 parameter; all of these weights are zero in the file",
            id="trained on",
        ),
        pytest.param(
            "--epochs 1 --lr 0.01 --etrs 0.05 --evs 0.1 -a digits_cnn --kd-teacher digits_cnn --kd-resume zero.pth",
            "The masks in the teacher's checkpoint 'zero.pth' are not applied to the teacher: they zero 128 weights in"
            " 1 parameter; all of these weights are zero in the file",
            id="a teacher's",
        ),
        pytest.param(
            "--lr 0.01 --epochs 1 --etrs 0.05 --evs 0.1 --resume-from zero.pth",
            "The masks in checkpoint 'zero.pth' are kept in training: they zero 128 weights in 1 parameter; all of"
            " these weights are zero in the file",
            id="kept",
        ),
        pytest.param("-e --resume-from ones.pth", None, id="masks that zero nothing"),
    ],
)
def test_masks_in_a_checkpoint_are_never_dropped_silently(words: str, line: str | None, tmp_path: Path) -> None:
    state = create_model(find_model("digits_cnn"), pretrained=True).state_dict()
    mask = torch.ones(10, 128)
    mask[3] = 0
    state["fc.weight"][3] = 0
    for name, masks in {
        "ones": {"fc.weight": torch.ones(10, 128), "conv1.weight": None},
        "zero": {"module.fc.weight": mask, "fc.bias": None},
        "other": {"fc.weight": mask.bool(), "fc.bias": torch.zeros(10, dtype=torch.uint8)},
    }.items():
        content = {"arch": "digits_cnn", "state_dict": state, "compression_sched": {"masks_dict": masks}}
        torch.save(content, tmp_path / f"{name}.pth")
    run = good(f"{words} --etes 0.1", tmp_path)
    assert [each for each in run.lines if "The masks" in each] == ([] if line is None else [line])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_resnet20_of_distiller(tmp_path: Path) -> None:
    data, checkpoint = SHARED / "data/cifar10", SHARED / "checkpoints/resnet20_cifar_dense.pth.tar"
    reference = SHARED / "reference/resnet20_cifar_stats.yaml"
    flags = f"-a resnet20_cifar {data} --resume-from {checkpoint} --qe --qe-stats-file {reference} --etes 0.1 --qepc"
    one = finish(start(f"{flags} -j 1 -b 256", tmp_path, 1), tmp_path)
    two = finish(start(f"{flags} -j 0 -b 31", tmp_path, 2), tmp_path)
    assert (one.code, one.err, two.code, two.err) == (0, "", 0, "")
    assert one.score() == two.score()
    assert float(one.score("fp32")[0]) > 90
    assert abs(float(one.score()[2]) - float(one.score("fp32")[2])) < 0.02
