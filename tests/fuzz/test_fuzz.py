"""No command line, YAML tree or damaged file breaks the law of all runs: some of the cases of `benchmarks/fuzz.py`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import bytes_cases, command_lines, pickles, trees, yaml_texts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sandbox import Case, Sandbox

from qlib.checkpoint.read import read_checkpoint
from qlib.errors import CheckpointError, ConfigError
from qlib.yaml_tree import parse_yaml

EXAMPLES = {"command lines": 60, "trees": 60, "bytes": 60}
STRATEGIES: dict[str, Callable[[Path], st.SearchStrategy[Case]]] = {
    "command lines": lambda template: command_lines(),
    "trees": trees,
    "bytes": bytes_cases,
}


def drawn(examples: int) -> settings:
    """The same cases each time, without a search for a smaller one that fails."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example]
    once = settings(max_examples=examples, derandomize=True, deadline=None, phases=[Phase.generate])
    return settings(once, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.filterwarnings("default")
def test_the_law_of_all_runs(sandbox: Sandbox, name: str) -> None:
    @drawn(EXAMPLES[name])
    @given(STRATEGIES[name](sandbox.template))
    def play(case: Case) -> None:
        outcome = sandbox.play(case)
        assert not outcome.problem, f"{outcome.problem}\n{' '.join(case.words)}\n{outcome.err[-2000:]}"

    play()


@drawn(300)
@given(yaml_texts())
def test_text_that_is_more_or_less_yaml(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse_yaml(text, "a.yaml").file == "a.yaml"


@drawn(300)
@given(pickles())
def test_bytes_that_are_more_or_less_a_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert isinstance(read_checkpoint(tmp_path / "a.pth"), dict)


# The law itself can fail: a sandbox in which a run does what none may.


def test_a_run_that_touches_what_is_not_its_own(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(words: list[str]) -> int:
        (sandbox.root / "home" / "precious").write_text("yours")
        return 0

    monkeypatch.setattr("sandbox.main", careless)
    try:
        assert sandbox.play(Case("careless", ())).problem == "changed home/precious"
    finally:
        (sandbox.root / "home" / "precious").write_text("mine")


@pytest.mark.parametrize(
    ("code", "text", "problem"),
    [
        (0, "", ""),
        (2, "compress.py: error: no", ""),
        (2, "no", "exit code 2 without a sentence"),
        (2, "compress.py: error: it is <qlib.a.B object at 0x7f>", "a Python object in a sentence"),
        (2, "compress.py: error: " + "x" * 5000, "a line of 5020 characters"),
        (130, "", ""),
        (3, "", "ended with 3"),
        (1, "Traceback (most recent call last):", "a traceback on stderr"),
    ],
)
def test_what_breaks_the_law(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, code: int, text: str, problem: str
) -> None:
    def wrong(words: list[str]) -> int:
        sys.stderr.write(text)
        return code

    monkeypatch.setattr("sandbox.main", wrong)
    found = sandbox.play(Case("wrong", ())).problem
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_a_run_that_raises(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.main", lambda words: 1 // 0)
    assert sandbox.play(Case("wrong", ())).problem.startswith("ended with ZeroDivisionError")
