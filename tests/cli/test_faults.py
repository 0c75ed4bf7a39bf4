"""Disks that are full, broken or read-only, files that cannot be opened, and kills, at the calls of three small runs.

Law: a run ends with one sentence or as if nothing had been; each file is whole; the same command then makes the same
bytes. Here are all calls of one kind and some of each other; `benchmarks/faults.py` has them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import FAULTS, WORDS, Case, quick

ALL, SOME = 1, 29
SPACING = {("calibration", "ENOSPC"): ALL}


@pytest.fixture(scope="module", params=WORDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    pytest.importorskip("onnx_ir")
    with quick():
        yield Case.of(request.param, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_loses_nothing(case: Case, name: str, request: pytest.FixtureRequest) -> None:
    fault = FAULTS[name]
    calls = case.calls(fault)
    assert calls > 50
    step = SPACING.get((request.node.callspec.params["case"], name), SOME)
    ends = {case.check(fault, at) for at in range(1, calls + 1, step)}
    assert ends & {"told", "killed"}
