"""`--compare`: runs side by side from their reports, and reports that cannot be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import good, rows, run

from qlib.metrics import mcnemar, wilson_interval
from qlib.report.comparison import different_layers, different_settings, front, sides
from qlib.report.record import VERSION, Origin, Predicted, Result, RunReport, Versus
from qlib.report.record_file import REPORT, report_text
from qlib.report.record_parts import Layer

LABELS = (0, 1, 2, 0, 1, 2, 0, 1)


def report(predictions: tuple[int, ...], bits: int = 8, **settings: str) -> RunReport:
    """A run that quantized the weights of one layer, of 100 bytes a bit."""
    samples = len(predictions)
    share = sum(one == other for one, other in zip(predictions, LABELS, strict=False)) / samples
    result = Result("quantized", samples, 100 * share, *wilson_interval(share, samples), 100.0, 0.5)
    tested = Predicted("abc", ("a", "b", "c"), LABELS[:samples], {"quantized": predictions, "fp32": LABELS[:samples]})
    layer = Layer("fc", "linear", (3,), 300, integer=True, weight_bits=bits, bytes=100 * bits, float_bytes=3200)
    return RunReport(
        version=VERSION,
        origin=Origin("quantize", "1", "m", "d", 3, "2026-01-01T00:00:00Z", 1.0, 0, "c", "r", "f", "hash"),
        settings=settings,
        results=(result,),
        tested=tested,
        versus=(Versus("quantized", "fp32", samples, 90.0, 80.0, 95.0, 1, 0, 1.0),),
        layers=(layer, Layer("relu", "relu", (3,))),
    )


RUNS = {
    "eight": report(LABELS, bits=8, seed="0"),
    "four": report((0, 1, 2, 0, 1, 2, 0, 2), bits=4, seed="1"),
    "five": report((0, 1, 2, 0, 1, 2, 2, 2), bits=5, seed="1"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, each in RUNS.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / REPORT).write_text(report_text(each))
    return tmp_path


def test_a_folder_of_runs_in_one_page_and_one_table(folder: Path) -> None:
    done = good("--compare runs", folder)
    table = {row["run"]: row for row in rows(done.folder / "compare.csv")}
    assert {name: (row["top1"], row["bytes"], row["best_at_its_bytes"]) for name, row in table.items()} == {
        "eight": ("100.0", "800", "True"),
        "five": ("75.0", "500", "False"),
        "four": ("87.5", "400", "True"),
    }
    assert [line for line in done.lines if line.startswith("| * ")] == [
        "| *  | eight | 100.00 | 67.56 to 100.00 | 0.50000 | 800                |",
        "| *  | four  | 87.50  | 52.91 to 97.76  | 0.50000 | 400                |",
    ]
    page = (done.folder / "compare.html").read_text()
    for text in ("Comparison of 3 runs", "Pareto front", "Settings that differ", "W4", "eight against"):
        assert text in page
    assert not (done.folder / REPORT).exists()
    assert f"Comparison of 3 runs: {done.folder / 'compare.html'}" in done.lines


def test_every_two_of_them(folder: Path) -> None:
    done = good("--compare runs/four runs/eight/report.json runs/four", folder)
    (row,) = rows(done.folder / "pairs.csv")
    assert [row[name] for name in ("first", "second", "lost", "won", "agreement")] == [
        *("four", "eight", "0", "1"),
        "87.5",
    ]
    assert float(row["mcnemar_p"]) == mcnemar(0, 1)


def test_it_can_be_repeated(folder: Path) -> None:
    done = good("--compare runs/four runs/eight", folder)
    again = good(f"--run-config {done.folder / 'configs/run_config.yaml'}", folder)
    assert (again.folder / "compare.csv").read_bytes() == (done.folder / "compare.csv").read_bytes()


def test_what_differs() -> None:
    found = sides(RUNS)
    assert different_settings(found) == {"seed": ["0", "1", "1"]}
    assert different_layers(found) == {"fc": ["W8 , 3", "W4 , 3", "W5 , 3"]}


@pytest.mark.parametrize(
    ("costs", "gains", "best"),
    [
        pytest.param([1, 1], [5, 6], [1], id="same cost"),
        pytest.param([1, 2], [5, 5], [0], id="same gain"),
        pytest.param([1, 1], [5, 5], [0], id="twins"),
        pytest.param([3, 2, 1], [3, 2, 1], [2, 1, 0], id="all"),
    ],
)
def test_the_front(costs: list[float], gains: list[float], best: list[int]) -> None:
    assert front(costs, gains) == best


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(
            lambda each: replace(each, tested=replace(each.tested, images="other")),
            "the run 'four' looked at 8 images and 'eight' at 8, which are not the same; compare runs with",
            id="other images",
        ),
        pytest.param(
            lambda _: report(LABELS[:4]), "the run 'four' looked at 4 images and 'eight' at 8, which are", id="fewer"
        ),
        pytest.param(lambda each: replace(each, results=()), "the run 'four' tested no model, so", id="no results"),
        pytest.param(lambda each: replace(each, tested=None), "the run 'four' tested no model, so", id="no test"),
        pytest.param(
            lambda each: replace(each, tested=replace(each.tested, predictions={})),
            "the report of 'four' is damaged: it has not one prediction for each image; run it again",
            id="no predictions",
        ),
        pytest.param(
            lambda each: replace(each, tested=replace(each.tested, predictions={"quantized": (10**30,) * 8})),
            "is no report of a run: tested.predictions.quantized[0] is a number beyond all bounds; run the",
            id="beyond",
        ),
        pytest.param(
            lambda each: replace(each, tested=replace(each.tested, predictions={"quantized": (-1,) * 8})),
            "the report of 'four' is damaged: it has predictions that are no class; run it again",
            id="no class",
        ),
    ],
)
def test_runs_that_cannot_be_compared(change: Callable[[RunReport], RunReport], why: str, folder: Path) -> None:
    (folder / "runs/four" / REPORT).write_text(report_text(change(RUNS["four"])))
    _refused("--compare runs/eight runs/four", why, folder)


def _refused(words: str, why: str, folder: Path) -> None:
    done = run(words, folder)
    assert done.code == 2
    assert why in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        pytest.param("--compare runs/four", "--compare found 1 runs; give 2 to 200, or a folder that holds", id="one"),
        pytest.param("--compare runs/four runs/four", "--compare found 1 runs; give 2 to 200", id="twice"),
        pytest.param("--compare empty", "--compare 'empty' holds no report.json, and no folder of a run", id="empty"),
        pytest.param("--compare runs broken.json", "'broken.json' is no report of a run: line 1 is not", id="broken"),
    ],
)
def test_words_that_are_no_runs(words: str, why: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "broken.json").write_text("{")
    done = run(words, folder)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert why in done.err.replace(f"{folder}/", "")


HOSTILE: list[tuple[tuple[Any, ...], Any]] = [
    (("results", 0, "top1"), "nan"),
    (("results", 0, "top1"), 1e308),
    (("results", 0, "samples"), -1),
    (("layers", 0, "bytes"), 10**300),
    (("layers", 0, "macs"), -(10**40)),
    (("layers", 0, "name"), "<script>\u202e"),
    (("settings", "seed"), "<img src=x onerror=y>"),
    (("origin", "seconds"), "inf"),
    (("versus", 0, "agreement"), "nan"),
]


@pytest.mark.parametrize(("place", "value"), HOSTILE)
def test_a_hostile_report_gives_a_page_or_one_sentence(place: tuple[Any, ...], value: Any, folder: Path) -> None:
    tree = json.loads((folder / "runs/four" / REPORT).read_text())
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / "runs/four" / REPORT).write_text(json.dumps(tree))
    shutil.rmtree(folder / "runs/five")
    done = run("--compare runs", folder)
    assert done.code in (0, 2), done.err
    assert done.err.count("\n") == (done.code == 2)
    if done.code == 0:
        page = (done.folder / "compare.html").read_text()
        assert page.count("<script") == 1
        assert "<img" not in page
