"""The page of a run: well-formed, complete, alone in the world, and deaf to whatever its texts say."""

from __future__ import annotations

import re
import types
from collections import Counter
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from runs import CLASSES, good, make_images, user_model

from qlib.report.html.charts import Point, curves, histogram
from qlib.report.html.page import run_page
from qlib.report.plain import from_plain, to_plain
from qlib.report.record import RunReport
from qlib.report.record_file import read_report, report_text
from qlib.report.record_parts import Bars

HOSTILE = "</script></style>\"'><script>alert(1)</script><img src=https://example.com/x onerror=alert(2)>\u202e&lt;"

VOID = {"br", "img", "input", "link", "meta"}
LOADS = ("src", "srcset", "href", "action", "formaction", "data", "poster", "background")


class Checker(HTMLParser):
    """Reads a page and notes what is wrong: elements that do not match, ids that are not there, what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[name] += 1
        if name not in VOID:
            self.open.append(name)
        self._attributes(name, attrs)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[name] += 1
        if "svg" not in self.open:
            self.wrong.append(f"<{name}/> outside SVG")
        self._attributes(name, attrs)

    def handle_endtag(self, name: str) -> None:
        if not self.open or self.open.pop() != name:
            self.wrong.append(f"</{name}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def _attributes(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        if len(dict(attrs)) != len(attrs):
            self.wrong.append(f"<{name}> has an attribute twice")
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key.startswith("on"):
                self.wrong.append(f"<{name} {key}>")
            if key in ("aria-labelledby", "data-filters"):
                self.refers.append(str(value))
            if key in LOADS and not str(value).startswith(("#", "data:image/jpeg;base64,")):
                self.wrong.append(f"<{name} {key}={value}>")
            if key == "href":
                self.refers.append(str(value).removeprefix("#"))
        if name == "img" and not dict(attrs).get("alt"):
            self.wrong.append("an image without alt")
        if name == "svg" and not dict(attrs).get("aria-label"):
            self.wrong.append("a chart without a name")


def checked(page: str) -> Checker:
    """The page, of which nothing is wrong."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.wrong == []
    assert checker.open == []
    assert [name for name, count in Counter(checker.ids).items() if count > 1] == []
    assert set(checker.refers) <= set(checker.ids)
    assert (checker.seen["script"], checker.seen["style"], checker.seen["h1"], checker.seen["main"]) == (1, 1, 1, 1)
    assert not re.search(r"url\(|@import", page)
    return checker


def filled(kind: Any, text: str, many: int = 2) -> Any:
    """A value of a type in which everything is there, and every text is `text`: a new section is tested with it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return filled(next(each for each in args if each is not type(None)), text, many)
    if origin is tuple:
        return tuple(filled(args[0], text, many) for _ in range(many))
    if origin is not None:
        return {f"{text}{index}": filled(args[1], text, many) for index in range(many)}
    if is_dataclass(kind):
        return kind(**{name: filled(each, text, many) for name, each in get_type_hints(kind).items()})  # type: ignore[operator]
    return {str: text, int: 1, float: 0.25, bool: True}[kind]


def full(text: str, layers: int = 2) -> RunReport:
    report: RunReport = filled(RunReport, text)
    assert report.auto is not None
    assert report.tested is not None
    layer = replace(report.layers[0], name="{}", histogram=Bars(-1.0, 0.1, tuple(range(64))), channels=(0.5,) * 64)
    return replace(
        report,
        version=1,
        confusion=tuple(replace(each, counts=((0, 0, 7), (0, 1, 3))) for each in report.confusion),
        changed=tuple(replace(each, thumbnail="/9j/AAAA") for each in report.changed),
        layers=tuple(replace(layer, name=f"{text}{index}") for index in range(layers)),
    )


@pytest.fixture(scope="module")
def hostile() -> str:
    return run_page(full(HOSTILE))


def test_a_full_report_is_the_same_after_reading(tmp_path: Path) -> None:
    report = full(HOSTILE)
    assert from_plain(RunReport, to_plain(report)) == report
    (tmp_path / "report.json").write_text(report_text(report))
    assert read_report(tmp_path) == report


def test_whatever_texts_say_they_stay_texts(hostile: str) -> None:
    page = checked(hostile)
    assert "alert(1)" in "".join(page.text)
    assert "onerror=alert(2)" in "".join(page.text)
    assert "\u202e" not in hostile


def test_every_section_is_there(hostile: str) -> None:
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", hostile)
    assert titles == [
        *("Results", "Images whose prediction changed", "Layers", "Sensitivity", "What pruning kept"),
        *("Sensitivity to pruning", "Budget", "Settings that were tried", "Training", "Verification"),
        *("Confusion before and after", "Where it comes from"),
    ]


def test_a_browser_may_load_nothing(hostile: str) -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', hostile)
    assert policy.startswith("default-src &#x27;none&#x27;; style-src")
    assert "http" not in policy


OPTIONAL = [each for each in fields(RunReport) if each.name not in ("version", "origin")]


@pytest.mark.parametrize("hide", OPTIONAL, ids=[each.name for each in OPTIONAL])
def test_a_page_without_one_section(hide: Field[Any]) -> None:
    nothing = hide.default if hide.default_factory is MISSING else hide.default_factory()
    checked(run_page(replace(full("x"), **{hide.name: nothing})))


def test_200_layers_weigh_less_than_3_megabytes() -> None:
    page = run_page(full("layer4.2.a_rather_long_block_name.conv", layers=200))
    checked(page)
    assert len(page.encode()) < 3_000_000


def test_hostile_folders_and_files(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    names = ["<script>alert(1)<", "b&amp;\"'", "c\u202e", "d"]
    for split in ("train", "val"):
        for old, new in zip(CLASSES, names, strict=True):
            (images / split / old).rename(images / split / new)
    for file in (images / "val").rglob("*.png"):
        file.rename(file.with_name(f"<img src=x onerror=alert(3)>{file.name}"))
    done = good(f"-a {user_model(tmp_path)} {images} --quantize-eval --qe-calibration 1 --qe-bits-acts 2", tmp_path)
    page = checked((done.folder / "report.html").read_text())
    assert set(names) - {"c\u202e"} <= {text.strip() for text in page.text}
    assert f"Report of this run: {done.folder / 'report.html'}" in done.out


def test_a_chart_of_nothing_and_of_what_no_axis_holds() -> None:
    assert curves({"a": [Point(0.0, float("nan")), Point(1e300, 1.0)]}, "x", "y") == "<p>nothing to draw</p>"
    assert "circle" in curves({"a": [Point(0.0, 0.0)], "b": [Point(float("inf"), 0.0)]}, "x", "y")
    assert "path" in histogram(Bars(0.0, 0.0, (0, 0)), None, None, None, None)


def test_codes_are_drawn_where_they_are_few() -> None:
    bars = Bars(-1.0, 0.5, (1, 2, 3, 4))
    drawn = {bits: 'class="codes"' in histogram(bars, -1.0, 1.0, 0.1, bits) for bits in (4, 8)}
    assert drawn == {4: True, 8: False}
