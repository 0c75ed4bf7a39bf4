"""Time and memory that files and flags can ask for are bounded; numbers and values that are too large are told."""

from __future__ import annotations

import re
import threading
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlib.app.policies import SECTIONS
from qlib.cli import parse
from qlib.config.flags.kinds import split_names
from qlib.config.flags.run_config import read_run_config
from qlib.config.layers import patterns
from qlib.config.layers.budget import parse_budget
from qlib.config.layers.patterns import SlowPattern, matching, pattern_problem
from qlib.config.layers.read import load_ptq_config
from qlib.config.layers.resolve import LayerInfo, resolve
from qlib.config.layers.settings import PtqConfig, Rule
from qlib.config.schedule.read import load_schedule
from qlib.errors import ConfigError, QlibError, UsageError, did_you_mean
from qlib.quant.plan_file import read_plan
from qlib.stats.stats_file import read_stats
from qlib.values import Interval, real, whole
from qlib.yaml_tree import parse_yaml

# ------------------------------------------------------------------------------------------------ patterns

NAMES = ["a" * 60, *(f"layer{block}.{index}.conv" for block in range(50) for index in range(100))]
CATASTROPHES = ["(a+)+b", "(a|a)*b", "((a*)*)*b", "(.*)*(.*)*(.*)*b", "(?=(a+)+b)a", r"(a+)+\.b"]


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 0.1)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_a_catastrophic_pattern_is_named_with_its_place(pattern: str) -> None:
    layers = [LayerInfo(name, "conv", True) for name in NAMES]
    start = time.process_time()
    with pytest.raises(ConfigError, match=re.escape(f"a.yaml:3: {pattern!r} takes more than a second to match")):
        resolve(PtqConfig(rules=(Rule(pattern, {}, {}, "a.yaml:3"),)), layers)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("pattern", ["layer.*", ".*conv", "(layer[0-9]+[.])+.*", "(?!layer1).*", "|".join(NAMES[:300])])
def test_patterns_that_people_write_are_fast_enough(pattern: str) -> None:
    assert matching(pattern, NAMES) == {name for name in NAMES if re.fullmatch(pattern, name)}


def test_a_thread_has_no_timer_and_matches_all_the_same() -> None:
    found: list[frozenset[str]] = []
    thread = threading.Thread(target=lambda: found.append(matching("a.*", NAMES)))
    thread.start()
    thread.join()
    assert found == [frozenset({"a" * 60})]


@pytest.mark.usefixtures("hurry")
def test_the_timer_is_off_afterwards() -> None:
    with pytest.raises(SlowPattern):
        matching("(a+)+b", NAMES)
    start = time.process_time()
    while time.process_time() - start < 0.2:  # a timer that still ran would end the process
        pass


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a{99999999999}", "is not a regular expression: the repetition number is too large; write a simpler one"),
        ("(" * 3000 + ")" * 3000, "is not a regular expression: maximum recursion depth exceeded"),
        ("x" * 10_001, "has 10001 characters; a regular expression of layers has at most 10000"),
        ("(?P<x", "is not a regular expression: missing >, unterminated name at position 4"),
        ("[[a]]", ""),
        ("module.*", ""),
    ],
    ids=["overflow", "nested", "long", "invalid", "what a later Python may read otherwise", "without module. invalid"],
)
def test_patterns_that_cannot_be_compiled(pattern: str, problem: str) -> None:
    assert problem in pattern_problem(pattern)
    assert bool(problem) == bool(pattern_problem(pattern))
    if not problem:
        assert Rule(pattern, {}, {}, "a.yaml:1").matched(["module1", "a"]) == matching(pattern, ["module1", "a"])


# ------------------------------------------------------------------------------------------------ YAML

LAUGHS = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi"))
DEEP = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}}}\n" for n in range(1, 60))
READERS: dict[str, Callable[[Path], object]] = {
    "settings": load_ptq_config,
    "schedule": lambda path: load_schedule(path, 3, {name: each.classes for name, each in SECTIONS._items.items()}),
    "run config": read_run_config,
    "plan": read_plan,
    "statistics": read_stats,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LAUGHS, r"more than (50000|1000000) values, an alias counted as what it stands for"),
        (DEEP, "lists and mappings are nested more than 50 deep"),
        ("a: &a [*a]", "an anchor contains itself"),
        ("a: &a {<<: *a}", "an anchor contains itself"),
        ("a: [" + "1," * 1_100_000 + "]", r"more than (50000|1000000) values"),
        ("# " + "x" * 17 * 2**20, "has 17 MiB, and a YAML file may have 16; give another file"),
        ("? " * 40_000, "nested more than 50 deep"),
        ("a: " + "9" * 400, r"'9+\.\.\. \(\d+ characters\) \.\.\.9+' is beyond any whole number that is allowed"),
        ("a: 0x" + "f" * 9000, "is beyond any whole number that is allowed"),
        ("a: -" + "9" * 5000, "is not a valid int|is beyond"),
        ("a: 1:30", "1:30 is 90 to YAML; write that, or quotes around a text"),
        ("a: 1:30.5", "1:30.5 is 90.5 to YAML"),
        ("a: 010", "010 is 8 to YAML"),
        ("a: !!int ''", "'' is not a valid int"),
        ("a: !!map [1]", "the tag !!map is not allowed; write plain values"),
        ("a: !!set {b}", "the tag !!set is not allowed"),
    ],
    ids=[
        *("laughs", "deep", "anchor in itself", "merged into itself", "values", "size", "keys in keys", "400 digits"),
        *("hexadecimal", "5000 digits", "sexagesimal", "sexagesimal fraction", "octal", "empty int", "map", "set"),
    ],
)
def test_yaml_without_end(tmp_path: Path, name: str, text: str, problem: str) -> None:
    if name in ("statistics", "plan") and "1," * 1000 in text:
        pytest.skip("takes the time of a million values")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(QlibError, match=problem) as error:
        READERS[name](path)
    assert len(str(error.value)) < 1000


def test_a_value_takes_few_bytes() -> None:
    text = "a: [" + "1," * 20_000 + "]"
    tracemalloc.start()
    try:
        (node,) = (parse_yaml(text, "a").mapping or {}).values()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(node.value, tuple)
    assert peak < 150 * len(node.value)  # so that a million of them take less than 150 MB


def test_what_yaml_reads_as_people_do() -> None:
    text = "{a: 0x10, b: 1_000, c: 0, d: 0.5, e: -0.0, f: 2024-01-01, g: '1:30', h: 08, i: 1.5e+3}"
    expected = (16, 1000, 0, 0.5, -0.0, "2024-01-01", "1:30", "08", 1500.0)
    found = {key: node.value for key, node in (parse_yaml(text, "a").mapping or {}).items()}
    assert found == dict(zip("abcdefghi", expected, strict=True))


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("number", [10**400, -(10**400), float("inf"), float("nan"), 10**309])
def test_numbers_beyond_float(number: float) -> None:
    assert number not in Interval(-1e300)
    assert not real(Interval(0)).accepts(number)
    assert not whole(0).accepts(number)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("-b 1" + "0" * 30, ", and at most 1000000000"),
        ("-b " + "9" * 400, "it must be a whole number, 1 or more, and at most 1000000000"),
        ("-b " + "9" * 5000, "it must be a whole number, 1 or more"),
        ("--lr 1e400", "--lr '1e400' is not allowed: it must be a number above 0"),
        ("--lr nan", "--lr 'nan' is not allowed"),
        ("--lr 3.5e38", r"--lr '3.5e38' is not allowed: it must be a number above 0, and at most 3.4e\+38"),
        ("--qe --qe-budget " + "9" * 300 + "TB", "it must be a number above 0 with its unit"),
        ("--qe --qe-no-quant-layers " + "a," * 100_000, "lists 100000 names, and may list 1000"),
        ("--qe --qe-mode " + "x" * 5000, r"--qe-mode 'x+\.\.\. \(4882 characters\) \.\.\.x+' is not allowed"),
        ("--" + "x" * 5000, r"there is no flag --x+\.\.\. \(4883 characters\) \.\.\.x+; --help lists the flags"),
        (" ".join(["x"] * 5000), r"one DATASET_DIR is allowed, not 5000: x x"),
    ],
    ids=[
        *(
            "10**30",
            "400 digits",
            "5000 digits",
            "1e400",
            "nan",
            "beyond float32",
            "budget",
            "commas",
            "long value",
            "long flag",
        ),
        "many folders",
    ],
)
def test_flags_beyond_what_can_be(words: str, sentence: str) -> None:
    start = time.process_time()
    with pytest.raises(UsageError, match=sentence) as error:
        parse(["-a", "digits_cnn", "-e", *words.split()])
    assert len(str(error.value)) < 2000
    assert time.process_time() - start < 5


@given(st.text(alphabet=",ab[](){}", max_size=30))
def test_names_are_split_as_by_the_pattern_that_took_quadratic_time(text: str) -> None:
    assert split_names(text) == [name for name in re.split(r",(?![^\[({]*[\])}])", text) if name.strip()]


@given(st.floats(1e-12, 1e15), st.sampled_from(["B", "KB", "MB", "bits", "GBOPs"]))
def test_the_text_of_a_budget_is_a_budget(amount: float, unit: str) -> None:
    budget = parse_budget(f"{amount:.20f}{unit}")
    assert parse_budget(str(budget)).amount == pytest.approx(budget.amount, rel=1e-9)


def test_budgets_are_finite() -> None:
    assert parse_budget("999999999999999MB").limit(10) == 8 * int(999999999999999e6)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("-evaluate", "--evaluate"),
        ("-eval", "--evaluate"),
        ("-pretrained", "--pretrained"),
        ("-batch-size=4", "--batch-size"),
        ("-arch", "--arch"),
        ("-qe-mode", "--qe-mode"),
        ("-qe-mod", "--qe-mode or --qe-mode-acts or --qe-mode-wts"),
    ],
)
def test_a_long_flag_with_one_dash(word: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"^there is no flag {word.partition('=')[0]}; did you mean {meant}\?$"):
        parse([word, "-a", "digits_cnn"])


def test_short_flags_in_one_word_are_still_read() -> None:
    config = parse(["-eadigits_cnn", "-b16", "-j0", "-nrun"])
    assert (config.evaluate, config.arch, config.batch_size, config.workers, config.name) == (
        *(True, "digits_cnn"),
        *(16, 0, "run"),
    )


# ------------------------------------------------------------------------------------------------ sentences


@pytest.mark.parametrize(
    "value", ["x" * 5000, "x y" * 2000, "it's " * 1000, '"' * 3000, "\n" * 3000, "' \"" * 2000], ids=repr
)
def test_no_value_is_echoed_whole(value: str) -> None:
    sentence = str(QlibError(f"--name {value!r} is not allowed; give another"))
    assert len(sentence) <= 2000
    assert sentence.startswith("--name ")
    assert sentence.endswith("give another")


def test_sentences_of_usual_length_are_left_alone() -> None:
    sentence = f"the user's '{'a/' * 90}' isn't PyTorch's own: {'a word and ' * 30}'another'"
    assert str(QlibError(sentence)) == sentence


def test_many_problems_are_counted() -> None:
    lines = str(ConfigError([f"a.yaml:{n}: {'x' * 999}" for n in range(5000)])).splitlines()
    assert (lines[0], len(lines), lines[-1]) == ("5000 problems:", 52, "  and 4950 more")
    assert max(map(len, lines)) < 300


def test_no_suggestion_for_a_name_without_end() -> None:
    assert did_you_mean("evaluate" * 20, ["evaluate" * 20 + "s"]) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epochs: {a: 1}", "run.yaml:1: train.epochs is a mapping; allowed: a value, or a list of values"),
        ("summary: [[model]]", "run.yaml:1: summary is a list; allowed: a value, or a list of values"),
        ("given: --lr", "run.yaml:1: given is '--lr'; allowed: a list of flags"),
        ("given: 5", "run.yaml:1: given is 5; allowed: a list of flags"),
        ("data: [a, b]", "run.yaml:1: data is a list; allowed: the path of a folder"),
        ("batch_size: 2024-01-01", "a whole number, 1 or more (in run.yaml)"),
    ],
)
def test_values_that_no_flag_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text if "epochs" not in text else f"train:\n  {text}".replace(":1:", ":2:"))
    with pytest.raises(QlibError) as error:
        parse(["--run-config", "run.yaml", "-e", "-a", "digits_cnn"])
    assert str(error.value).endswith(problem.replace(":1: train", ":2: train"))


@pytest.mark.parametrize(
    ("reader", "text", "problem"),
    [
        (
            "settings",
            "quantizers: {q: {class: PostTrainLinearQuantizer}}\ncorrections: [rounding]",
            "a.yaml:2: corrections must be a mapping of names to values, not a list",
        ),
        ("schedule", "quantizers: {q: {class: [LSQQuantizer]}}", "a.yaml:1: class is a list; allowed: "),
        ("schedule", "policies: [{quantizer: {instance_name: [q]}}]", "there is no quantizer 'a list'"),
    ],
)
def test_no_python_object_in_a_sentence(tmp_path: Path, reader: str, text: str, problem: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        READERS[reader](path)
    assert problem in str(error.value)
    assert "Node(" not in str(error.value)
