"""The page in a real browser: it asks for nothing, complains of nothing, sorts, filters, changes its colors, prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import FILTERED, SORTED, THEMED, Browser, browser, find_browser

from qlib.report.html.page import run_page
from qlib.report.record import VERSION, Origin, RunReport
from qlib.report.record_parts import Bars, Layer

PROGRAM = find_browser()


def test_the_page_in_chromium(tmp_path: Path) -> None:
    if PROGRAM is None:
        pytest.skip("no Chromium is installed")
    layers = tuple(
        Layer(
            f"block{i}.conv",
            "conv",
            (8, 4, 4),
            1000 * (i * 7 % 30),
            weight_bits=4,
            bits=8,
            histogram=Bars(0.0, 0.1, (i, 9)),
        )
        for i in range(30)
    )
    origin = Origin("quantize", "1", "m", "d", 3, "2026-01-01T00:00:00Z", 1.0, 0, "c", "r", "f", "hash")
    file = tmp_path / "report.html"
    file.write_text(run_page(RunReport(VERSION, origin, layers=layers)))
    with browser(PROGRAM) as page:
        _check(page, file)


def _check(page: Browser, file: Path) -> None:
    page.open(file)
    assert [page.run(script) for script in (SORTED, FILTERED, THEMED)] == [True, True, True]
    assert (page.requests, page.errors) == ([], [])
    page.run("fetch('https://example.com/x').catch(() => 0)")
    assert any("Content Security Policy" in each for each in page.errors)
    assert page.pdf().startswith(b"%PDF")
