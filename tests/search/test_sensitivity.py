"""--sense quant: what is measured of each layer alone, the table, the files, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from runs import finish, good, run, start
from test_lapq import BATCHES, IMAGES, LABELS, graph_and_plan

from qlib.metrics import evaluate
from qlib.report.plots import plot_sensitivity
from qlib.search.replay import FLOAT, WEIGHT, Replay, grid_of, slots
from qlib.search.sensitivity import ACTIVATIONS, WEIGHTS, Sensitivity, Study, sqnr

DIGITS = "-a digits_cnn --pretrained"


def results(bits: tuple[int, ...] = (3, 8)) -> list[Sensitivity]:
    graph, _ = graph_and_plan()
    study = Study(graph, {each: graph_and_plan(each)[1] for each in bits})
    done = list(study.steps(BATCHES))
    assert len(done) == len(study) * len(BATCHES)
    assert sum(done) == len(study) * len(IMAGES)
    return study.results()


def test_each_layer_alone_is_what_a_model_with_only_that_layer_rounded_does() -> None:
    graph, plan = graph_and_plan(3)
    replay, found = Replay(graph), {(row.layer, row.what): row for row in results() if row.bits == 3}
    with torch.inference_mode():
        reference = graph(IMAGES)
    expected = set()
    for name, layer in plan.layers.items():
        for what in (WEIGHTS, ACTIVATIONS):
            point = FLOAT
            for slot in slots(name, layer):
                if (slot[1] == WEIGHT) == (what == WEIGHTS):
                    point = point.with_slot(slot, grid_of(layer, slot), graph.get_submodule(name))
            if point == FLOAT:
                continue
            expected.add((name, what))
            logits = replay.logits(replay.run(replay.start(IMAGES), 0, replay.end, point))
            whole, row = evaluate(lambda _, logits=logits: logits, [(IMAGES, LABELS)]), found[name, what]
            assert (row.loss, row.top1) == pytest.approx((whole.loss, whole.top1), rel=1e-6)
            noise = float((logits - reference).pow(2).sum())
            assert row.sqnr_logits == pytest.approx(sqnr(float(reference.pow(2).sum()), noise), abs=1e-3)
            p = reference.softmax(1)
            divergence = float((p * (p.log() - logits.softmax(1).log())).sum()) / len(IMAGES)
            assert row.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-7)
    assert set(found) == expected


def test_more_bits_hurt_less() -> None:
    rows = results((2, 4, 8))
    for few, some, many in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert (few.layer, few.what) == (some.layer, some.what) == (many.layer, many.what)
        assert (few.bits, some.bits, many.bits) == (2, 4, 8)
        assert few.sqnr_output < some.sqnr_output < many.sqnr_output


def test_the_output_of_the_last_layer_is_the_logits() -> None:
    for row in results():
        if row.layer == "fc":
            assert row.sqnr_output == row.sqnr_logits


def test_layers_in_float_are_left_out() -> None:
    graph, plan = graph_and_plan(4, bits_weights=0)
    assert len(Study(graph, {4: plan}, (WEIGHTS,))) == 0
    assert len(Study(graph, {4: plan}, (ACTIVATIONS,))) > 0


def test_the_ratio() -> None:
    assert sqnr(1000.0, 1.0) == pytest.approx(30)
    assert sqnr(0.0, 1.0) == -math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sense")
    good(f"{DIGITS} --qe-calibration 0.1", folder)
    return folder


STATS = "--qe-stats-file stats/digits_cnn_digits.yaml"


def test_a_run_as_a_user_runs_it(folder: Path) -> None:
    words = f"{DIGITS} --sense quant --sense-bits 3,8 --sense-images 40 {STATS} --qenql fc -j 0 -n look"
    done = finish(start(words, folder), folder)
    assert (done.code, done.err) == (0, "")
    with (done.folder / "look_sensitivity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:7] == ["layer", "what", "bits", "sqnr_output", "sqnr_logits", "loss", "top1"]
    assert {row["bits"] for row in rows} == {"3", "8"}
    assert {row["what"] for row in rows} == {WEIGHTS, ACTIVATIONS}
    layers = {row["layer"] for row in rows}
    assert "stem.conv" in layers
    assert "fc" not in layers
    table = [line.split("|") for line in done.lines if line.startswith("| ")][1:]
    assert len(table) == len(rows) / 2
    worst = [float(line[5]) for line in table]
    assert worst == sorted(worst, reverse=True)
    assert f"Sensitivity: {len(layers)} layers, {len(rows)} variants, each on 40 calibration images" in done.lines
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert (done.folder / "look_sensitivity.png").exists() == plotted
    assert ("No plot: matplotlib is not installed; pip install 'qlib-compress[plot]'" in done.lines) == (not plotted)


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_sensitivity(tmp_path / "plot.png", results())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_gives_the_same_numbers_again(folder: Path) -> None:
    words = f"{DIGITS} --sense quant --sense-bits 4 --sense-images 40 {STATS}"
    first, second = ((good(words, folder).folder / "sensitivity.csv").read_text() for _ in range(2))
    assert first == second


REFUSED = [
    ("all in float", f"--sense quant {STATS} --qeba 0 --qebw 0", "--sense finds nothing to measure: all layers are"),
    ("a plan", "--sense quant --qe-config-file plan.yaml", "--sense needs settings, but --qe-config-file is a plan; "),
    (
        "dynamic settings",
        "--sense quant --qe-config-file q.yaml",
        "--sense needs fixed ranges, but q.yaml names no mod",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_is_refused(words: str, sentence: str, folder: Path) -> None:
    if "plan.yaml" in words:
        made = good(f"{DIGITS} --qe {STATS}", folder)
        (folder / "plan.yaml").write_bytes((made.folder / "layer_quant_params.yaml").read_bytes())
    (folder / "q.yaml").write_text("quantizers: {q: {class: PostTrainLinearQuantizer, bits_activations: 8}}\n")
    done = run(f"{DIGITS} {words}", folder)
    assert done.code == 2
    assert done.err.startswith(f"compress.py: error: {sentence}")
    assert len(done.err.splitlines()) == 1
