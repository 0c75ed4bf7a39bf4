"""The record of a run: what each verb hands over, the same after writing and reading, and files that are none."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, Run, good, rows

from qlib.errors import DataError
from qlib.report.record import VERSION, Origin, RunReport
from qlib.report.record_file import REPORT, read_report, report_schema, report_text
from qlib.report.record_parts import Epoch, Training

DIGITS = "-a digits_cnn --effective-test-size 0.2 -b 64"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Run:
    words = f"{DIGITS} --quantize-eval --qe-calibration 0.1 --qe-histograms --qe-bits-wts 3 --confusion"
    return good(words, tmp_path_factory.mktemp("quantized"))


def test_the_schema_in_the_docs_is_that_of_the_types() -> None:
    assert (ROOT / "docs/report.schema.json").read_text() == report_schema()


def test_written_and_read_it_is_the_same(quantized: Run) -> None:
    file = quantized.folder / REPORT
    assert report_text(read_report(file)) == file.read_text()
    assert read_report(quantized.folder) == read_report(file)


def test_what_json_lacks_is_the_same_too(tmp_path: Path) -> None:
    history = Training((Epoch(0, {"loss": math.inf, "top1": -math.inf}),))
    report = replace(_empty(), training=history, environment={"a": '"\n\u2028</script>\U0001f600'})
    (tmp_path / REPORT).write_text(report_text(report))
    assert read_report(tmp_path) == report


def _empty() -> RunReport:
    return RunReport(VERSION, Origin("evaluate", "1", "a", "b", 2, "2026-01-01T00:00:00Z", 1.0, 0, "", "", "f"))


def test_results_of_a_quantized_run(quantized: Run) -> None:
    report, row = read_report(quantized.folder), quantized.metrics("quantized")
    assert [each.model for each in report.results] == ["quantized", "fp32"]
    first = report.results[0]
    assert [first.top1, first.low, first.high, first.loss] == [
        float(row[name]) for name in ("top1", "top1_low", "top1_high", "loss")
    ]
    (versus,) = report.versus
    assert (versus.model, versus.other, versus.agreement, versus.p_value) == (
        *("quantized", "fp32"),
        float(row["agreement"]),
        float(row["mcnemar_p"]),
    )
    assert report.tested is not None
    listed = rows(quantized.folder / "predictions.csv")
    assert report.tested.labels == tuple(int(each["label"]) for each in listed)
    for model in ("quantized", "fp32"):
        assert report.tested.predictions[model] == tuple(int(each[model]) for each in listed)


def test_images_whose_prediction_changed(quantized: Run) -> None:
    report = read_report(quantized.folder)
    listed = {row["image"]: row for row in rows(quantized.folder / "predictions.csv")}
    changed = {name for name, row in listed.items() if row["fp32"] != row["quantized"]}
    assert {each.image for each in report.changed} <= changed
    assert len(report.changed) == min(24, len(changed))
    assert len(changed) > 2
    for each in report.changed:
        row = listed[each.image]
        assert [each.label, each.before, each.after] == [int(row[name]) for name in ("label", "fp32", "quantized")]
        assert each.thumbnail.startswith("/9j/")  # a JPEG
    margins = [each.margin_before for each in report.changed]
    assert margins == sorted(margins, reverse=True)
    assert all(0 < margin <= 1 for margin in margins)


def test_confusion_before_and_after(quantized: Run) -> None:
    report = read_report(quantized.folder)
    printed = [list(map(int, line.split())) for line in re.findall(r"^(?: *\d+){10}$", quantized.out, re.MULTILINE)]
    found = [[0] * 10 for _ in range(10)]
    for label, predicted, count in report.confusion[0].counts:
        found[label][predicted] = count
    assert found == printed
    assert [each.model for each in report.confusion] == ["quantized", "fp32"]


def test_layers(quantized: Run) -> None:
    report = read_report(quantized.folder)
    layers = {each.name: each for each in report.layers}
    assert sum(each.macs or 0 for each in report.layers) == 93_440
    assert all(each.integer and not each.why_float for each in report.layers)
    first = next(each for each in report.layers if each.weight_bits)
    assert (first.weight_bits, first.bits, first.histogram is None) == (3, 8, False)
    assert first.weight_sqnr is not None
    assert 0 < first.weight_sqnr < 20
    assert layers["fc"].channel_count == 10
    noise = [each.sqnr for each in report.layers if each.sqnr is not None]
    assert all(5 < each < 60 for each in noise)
    assert noise[0] > noise[-1]  # it adds up
    assert layers["fc"].sqnr == noise[-1]
    assert layers["fc"].bytes < layers["fc"].float_bytes / 4


def test_where_it_comes_from(quantized: Run) -> None:
    report = read_report(quantized.folder)
    assert (report.origin.verb, report.origin.arch, report.origin.classes) == ("quantize", "digits_cnn", 10)
    assert report.origin.repeat.endswith("configs/run_config.yaml")
    assert report.settings["qe.bits_wts"] == "3"
    assert "--qe-bits-wts" in report.given
    assert "torch" in report.environment
    (file,) = report.files
    content = (quantized.folder / file.name).read_bytes()
    assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("words", "sections"),
    [
        pytest.param("-e", {"results", "tested", "confusion", "layers"}, id="evaluate"),
        pytest.param("--qe-calibration 0.05", {"calibration", "layers"}, id="calibrate"),
        pytest.param(
            "--sense quant --sense-bits 4 --sense-images 16 --qe-calibration 0.05",
            {"calibration", "layers", "sensitivity"},
            id="sense",
        ),
        pytest.param(
            "--quantize-eval --qe-calibration 0.05 --qe-budget 4bits --qe-bits-choices 3,8 --sense-images 16",
            {*("results", "versus", "tested", "confusion", "changed", "calibration", "layers", "files")}
            | {"sensitivity", "tradeoff"},
            id="budget",
        ),
        pytest.param(
            "--epochs 1 --lr 0.01 --etrs 0.05",
            {"results", "tested", "confusion", "training"},
            id="train",
        ),
    ],
)
def test_what_each_verb_hands_over(words: str, sections: set[str], tmp_path: Path) -> None:
    report = read_report(good(f"{DIGITS} {words}", tmp_path).folder)
    always = {"version", "origin", "settings", "given", "environment"}
    assert {name for name, value in vars(report).items() if value not in ((), None)} - always == sections


@pytest.mark.parametrize(
    ("more", "told"),
    [
        pytest.param("", "are the same to the last digit", id="same"),
        pytest.param("--qe-bits-wts 8", r"differ: quantized top1 was [\d.]+ and is [\d.]+; .*loss was .*", id="bits"),
        pytest.param("--etes 0.1", "differ: other images were tested", id="images"),
    ],
)
def test_a_run_that_is_repeated_says_whether_numbers_are_the_same(
    more: str, told: str, quantized: Run, tmp_path: Path
) -> None:
    done = good(f"--run-config {quantized.folder / 'configs/run_config.yaml'} {more}", tmp_path)
    (line,) = (line for line in done.lines if line.startswith("Numbers of the run that is repeated"))
    assert re.fullmatch(f"Numbers of the run that is repeated, {quantized.folder.name}: they {told}", line)


def test_a_damaged_report_of_the_run_that_is_repeated(tmp_path: Path) -> None:
    first = good(f"{DIGITS} -e", tmp_path)
    (first.folder / REPORT).write_text("{")
    done = good("--run-config latest_log_dir/configs/run_config.yaml", tmp_path)  # a link that the new run moves
    assert any("whether the numbers are the same is not known" in line for line in done.lines)


@pytest.mark.parametrize("words", [pytest.param("-e --no-report", id="flag"), pytest.param("--check", id="printed")])
def test_no_report(words: str, tmp_path: Path) -> None:
    folder = good(f"{DIGITS} {words}", tmp_path).folder
    assert not list(folder.glob("report.*"))


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(_set("results", to={}), "results is a mapping, not a list", id="a mapping"),
        pytest.param(_set("results", 0, "top1", to="99"), "results[0].top1 is '99', not a number", id="text"),
        pytest.param(_set("results", 0, "samples", to=1.5), "results[0].samples is 1.5, not a whole number", id="1.5"),
        pytest.param(_set("results", 0, "samples", to=True), "samples is True, not a whole number", id="truth"),
        pytest.param(_set("results", 0, "top1", to=10**400), "results[0].top1 is a number beyond", id="beyond"),
        pytest.param(_set("origin", "arch", to=None), "origin.arch is null, not text", id="null"),
        pytest.param(_set("more", to=1), "it has 'more', which is no field of it", id="unknown"),
        pytest.param(_set("version", to=VERSION + 1), f"it is of version {VERSION + 1}, and this program", id="newer"),
        pytest.param(lambda tree: tree.pop("origin"), "it lacks origin", id="lacks"),
    ],
)
def test_a_report_that_was_changed_is_refused(
    change: Callable[[Any], None], why: str, quantized: Run, tmp_path: Path
) -> None:
    tree = json.loads((quantized.folder / REPORT).read_text())
    change(tree)
    (tmp_path / REPORT).write_text(json.dumps(tree))
    _refused(tmp_path, why)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        pytest.param(b"", "line 1 is not valid JSON", id="empty"),
        pytest.param(b"[]", "it is a list, not a mapping", id="list"),
        pytest.param(b'{"version": NaN}', "NaN is no JSON", id="NaN"),
        pytest.param(b"\xff\xfe", "'utf-8' codec can't decode", id="not UTF-8"),
        pytest.param(b"[" * 200_000, "it is nested too deep", id="deep"),
        pytest.param(b'{"version": ' + b"9" * 5000 + b"}", "", id="digits"),
    ],
)
def test_a_file_that_is_no_report_is_refused(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_bytes(content)
    _refused(tmp_path, why)


def _refused(folder: Path, why: str) -> None:
    with pytest.raises(DataError) as refused:
        read_report(folder)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory; give the folder of a run"):
        read_report(tmp_path)
