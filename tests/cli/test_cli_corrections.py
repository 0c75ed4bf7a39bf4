"""Corrections from the command line: flags, YAML, files, and what goes with what."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run
from runs import run as run_in

from qlib.quant.plan_file import read_plan

MODEL = "-a digits_cnn --pretrained"
LOW = "--qe --qe-calibration 0.2 --qebw 3 --qeba 4 --qema asym_u --ptq-images 128 --ptq-iterations 30"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(words: str) -> Run:
    """A command line in the current folder."""
    return run_in(words, Path.cwd())


def top1(done: Run) -> float:
    return float(done.out.split("==> Top1: ")[1].split()[0])


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with block reconstruction, in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("rounded"))
        return run(f"{MODEL} {LOW} --ptq-rounding brecq --ptq-bias-correction empirical")


def test_rounding_beats_the_nearest_code(rounded: Run) -> None:
    nearest = run(f"{MODEL} --qe --qe-calibration 0.2 --qebw 3 --qeba 4 --qema asym_u")
    assert rounded.code == nearest.code == 0
    assert top1(rounded) > top1(nearest) + 1
    assert "Corrections changed" in rounded.out
    assert "Reconstruction: [" in rounded.out


def test_the_plan_names_the_weights_beside_it_and_gives_the_same_integers(rounded: Run) -> None:
    plan = rounded.folder / "layer_quant_params.yaml"
    assert read_plan(plan).weights == "corrected_weights.safetensors"
    again = run(f"{MODEL} --qe --qe-config-file {plan}")
    assert again.out.split("==> ")[1].splitlines()[0] == rounded.out.split("==> ")[1].splitlines()[0]
    assert (again.folder / "corrected_weights.safetensors").exists()
    lost = Path("plan.yaml")
    lost.write_text(plan.read_text())
    refused = run(f"{MODEL} --qe --qe-config-file {lost}")
    assert refused.code == 2
    assert "the plan needs corrected_weights.safetensors, which cannot be read" in refused.err
    assert "keep it beside the plan" in refused.err


def test_the_checkpoint_holds_the_corrected_integers(rounded: Run) -> None:
    restored = run(f"--resume-from {rounded.folder / 'quantized_checkpoint.pth.tar'}")
    assert restored.code == 0
    assert restored.out.split("==> Top1")[1].splitlines()[0] == rounded.out.split("==> Top1")[1].splitlines()[0]


def test_the_yaml_section_says_what_the_flags_say(rounded: Run) -> None:
    Path("q.yaml").write_text(
        """\
quantizers:
  q:
    class: PostTrainLinearQuantizer
    bits_activations: 4
    bits_weights: 3
    mode: {activations: asym_u, weights: sym}
    model_activation_stats: stats.yaml
corrections: {rounding: brecq, bias_correction: empirical, images: 128, iterations: 999}
"""
    )
    Path("stats.yaml").write_text((rounded.folder / "acts_quantization_stats.yaml").read_text())
    done = run(f"{MODEL} --qe --qe-config-file q.yaml --ptq-iterations 30")  # a flag has the last word
    assert done.out.split("==> Top1")[1].splitlines()[0] == rounded.out.split("==> Top1")[1].splitlines()[0]


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("{rounding: brec}", "q.yaml:3: rounding is 'brec'; allowed: nearest, gptq, adaround, brecq, qdrop"),
        ("{smooth: 2}", "q.yaml:3: smooth is 2; allowed: a number from 0 to 1, or null for none"),
        ("{images: 0}", "q.yaml:3: images is 0; allowed: a whole number from 1"),
        ("{equalise: true}", "q.yaml:3: unknown key 'equalise'; allowed: equalize"),
    ],
)
def test_mistakes_in_the_section(section: str, sentence: str) -> None:
    text = f"quantizers: {{q: {{class: PostTrainLinearQuantizer}}}}\n\ncorrections: {section}\n"
    Path("q.yaml").write_text(text)
    done = run(f"{MODEL} --qe --qe-config-file q.yaml")
    assert done.code == 2
    assert sentence in done.err


def test_statistics_belong_to_the_corrections_they_were_collected_with() -> None:
    collected = run(f"{MODEL} --qe-calibration 0.1 --ptq-equalize")
    assert collected.code == 0
    assert Path("stats/digits_cnn_digits_equalize.yaml").exists()
    fits = run(f"{MODEL} --qe --qe-stats-file stats/digits_cnn_digits_equalize.yaml --ptq-equalize")
    assert fits.code == 0
    refused = run(f"{MODEL} --qe --qe-stats-file stats/digits_cnn_digits_equalize.yaml")
    assert refused.code == 2
    assert "were collected with the corrections 'equalize', and this run has 'none'; collect them again" in refused.err


WRONG = [
    (
        "--qe --ptq-data-free --qe-calibration 0.1",
        "--ptq-data-free uses no images, and --qe-calibration needs some; drop one of them",
    ),
    ("--qe --ptq-data-free --ptq-rounding brecq", "--ptq-data-free uses no images, and --ptq-rounding needs some"),
    ("--qe --qe-dynamic --ptq-rounding gptq", "corrections of a plan need fixed ranges, which --qe-dynamic has not"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[words for words, _ in WRONG])
def test_what_cannot_be_combined(words: str, sentence: str) -> None:
    done = run(f"{MODEL} {words}")
    assert done.code == 2
    assert sentence in done.err


IDLE = [
    ("-e --ptq-rounding brecq", "--ptq-rounding has no effect without --quantize-eval"),
    ("--qe --qe-calibration 0.05 --ptq-images 9", "--ptq-images has no effect: no correction looks at images"),
    (
        "--qe --qe-calibration 0.05 --ptq-rounding gptq --ptq-images 32 --ptq-iterations 9",
        "--ptq-iterations has no effect: --ptq-rounding gptq does not iterate",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), IDLE, ids=[words for words, _ in IDLE])
def test_flags_without_effect_are_named(words: str, sentence: str) -> None:
    done = run(f"{MODEL} {words}")
    assert done.code == 0
    assert sentence in done.out


@pytest.mark.parametrize(
    "flags",
    [
        "--ptq-equalize --ptq-absorb-bias --ptq-bias-correction analytic",
        "--ptq-bn-reestimation --ptq-images 64",
        "--ptq-rounding adaround --ptq-iterations 10 --ptq-images 64 --qepc",
        "--ptq-rounding qdrop --ptq-iterations 10 --ptq-images 64 --qe-scale pow2",
        "--ptq-rounding gptq --ptq-images 64 --qeba 0",
        "--ptq-data-free",
    ],
)
def test_every_correction_runs_and_its_checkpoint_is_the_same_model(flags: str) -> None:
    calibration = "" if "data-free" in flags else "--qe-calibration 0.1"
    done = run(f"{MODEL} --qe {calibration} {flags}")
    assert done.code == 0, done.out
    assert top1(done) > 80
    restored = run(f"--resume-from {done.folder / 'quantized_checkpoint.pth.tar'}")
    assert restored.out.split("==> Top1")[1].splitlines()[0] == done.out.split("==> Top1")[1].splitlines()[0]
