"""The statistics file: round trips, Distiller's own files, and what a broken file says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qlib.errors import OutputError, StatsError
from qlib.stats.histogram import Histogram
from qlib.stats.stats_file import check_fingerprint, read_stats, write_stats
from qlib.stats.tensor_stats import LayerStats, ModelStats, TensorStats

SHARED = Path(__file__).resolve().parents[2] / "../shared"
DISTILLER = SHARED / "reference/resnet20_cifar_stats.yaml"

RECORD = TensorStats(
    count=24, samples=2, min=-1.0, max=1e-05, avg_min=-0.1, avg_max=0.0, mean=1 / 3, std=2.5e20, b=0.25, shape=(2, 12)
)
STATS = ModelStats(
    {"features.0": LayerStats((RECORD, RECORD), RECORD), "0": LayerStats((), RECORD), "on": LayerStats((), RECORD)},
    {"arch": "vgg11", "weights": "c0ffee", "dataset": "/data/my: images", "split": "train", "samples": 2},
)


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    write_stats(tmp_path / "made/for it/a.yaml", STATS)
    read = read_stats(tmp_path / "made/for it/a.yaml")
    assert read == STATS
    write_stats(tmp_path / "b.yaml", read)
    assert (tmp_path / "b.yaml").read_bytes() == (tmp_path / "made/for it/a.yaml").read_bytes()
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["b.yaml"], "no temporary file stays"


def test_any_yaml_reader_reads_what_we_write(tmp_path: Path) -> None:
    write_stats(tmp_path / "a.yaml", STATS)
    loaded = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert len(loaded["qlib_stats"].pop("hash")) == 16
    assert loaded["qlib_stats"] == {"version": 1, **STATS.fingerprint}
    record = loaded["features.0"]["inputs"][1]
    assert list(record) == ["min", "max", "avg_min", "avg_max", "mean", "std", "b", "shape", "total_numel", "samples"]
    assert (record["max"], record["std"], record["shape"], record["total_numel"]) == (1e-05, 2.5e20, "(2, 12)", 24)
    assert list(loaded) == ["qlib_stats", "features.0", "0", "on"]


def without_hash(text: str) -> str:
    """What a user deletes who changes statistics by hand."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("  hash: "))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max: 1.0e-05", "max: 2.0e-05"),
        ('arch: "', 'arch: "x'),
        ("features.0", "features.1"),
        ("samples: ", "samples: 1"),
    ],
    ids=["a number", "a name", "a layer", "a digit more"],
)
def test_what_was_changed_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "a.yaml"
    write_stats(path, STATS)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(StatsError) as error:
        read_stats(path)
    assert str(error.value) == (
        f"the statistics in {path} were changed after they were collected; collect them again with --qe-calibration,"
        " or delete the line 'hash' in their header to use them as they are"
    )
    path.write_text(without_hash(path.read_text()))
    assert read_stats(path) != STATS


def test_a_hash_that_is_called_otherwise_is_no_header(tmp_path: Path) -> None:
    write_stats(tmp_path / "a.yaml", STATS)
    (tmp_path / "a.yaml").write_text((tmp_path / "a.yaml").read_text().replace("  hash: ", "  hasi: ", 1))
    with pytest.raises(StatsError, match=r"a\.yaml:\d+: unknown key 'hasi' in qlib_stats; .*; did you mean hash\?"):
        read_stats(tmp_path / "a.yaml")


def test_how_it_is_written_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    write_stats(path, STATS)
    path.write_bytes(b"# a comment\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_stats(path) == STATS


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(low=finite, high=finite, mean=st.none() | finite, shape=st.lists(st.integers(1, 9), max_size=4))
def test_numbers_round_trip_exactly(
    tmp_path_factory: pytest.TempPathFactory, low: float, high: float, mean: float | None, shape: list[int]
) -> None:
    record = TensorStats(count=3, samples=1, min=min(low, high), max=max(low, high), mean=mean, shape=tuple(shape))
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    write_stats(path, ModelStats({"conv": LayerStats((record,), record)}))
    assert read_stats(path).layers["conv"].inputs == (record,)


@pytest.mark.skipif(not DISTILLER.exists(), reason="needs the shared reference files")
def test_file_of_distiller() -> None:
    stats = read_stats(DISTILLER)
    assert stats.fingerprint == {}
    assert len(stats.layers) == 72
    first = stats.layers["conv1"].inputs[0]
    assert (first.count, first.samples, first.shape) == (3124224, 1017, (128, 3, 32, 32))
    assert stats.layers["conv1"].output.b == 0.6098615558215416
    check_fingerprint(stats, "anything", "at all")


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        pytest.param({"shape": "(4, 5)"}, (20, 4, None), id="no total_numel: those of the first batch"),
        pytest.param({}, (1, 1, None), id="no shape"),
        pytest.param({"b": 0.5, "shape": "(4, 5)", "total_numel": 60}, (60, 12, 0.5), id="samples derived"),
    ],
)
def test_what_older_files_lack(
    tmp_path: Path, rest: dict[str, object], expected: tuple[int, int, float | None]
) -> None:
    (tmp_path / "old.yaml").write_text("# by hand\n" + yaml.safe_dump({"fc": {"output": {"min": 0, "max": 1, **rest}}}))
    record = read_stats(tmp_path / "old.yaml").layers["fc"].output
    assert (record.count, record.samples, record.b) == expected


def test_a_module_that_never_ran_is_left_out(tmp_path: Path) -> None:
    largest = 1.7976931348623157e308
    (tmp_path / "a.yaml").write_text(
        f"aux:\n  output: {{min: {largest}, max: -{largest}, avg_min: 0, mean: 0, shape: '', total_numel: 0}}\n"
        "fc:\n  output: {min: 0.0, max: 1.0}\n"
    )
    assert list(read_stats(tmp_path / "a.yaml").layers) == ["fc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "F:1: the file is empty; collect the statistics again with --qe-calibration", id="empty"),
        pytest.param("- a", "F:1: the file is a list, not a mapping; this is no statistics file", id="a list"),
        pytest.param("{}", "F:1: the file holds no statistics; collect them with --qe-calibration", id="no layer"),
        pytest.param("fc: 3", "F:1: layer 'fc' is 3, not a mapping; this is no statistics file", id="layer a number"),
        pytest.param(
            "fc: {inputs: {}}", "F:1: layer 'fc' lacks 'output'; collect the statistics again", id="no output"
        ),
        pytest.param(
            "fc:\n  output:\n    min: 0\n    max: .nan",
            "F:4: max of the output of layer 'fc' is nan; statistics must be finite: collect them again",
            id="nan",
        ),
        pytest.param(
            "fc:\n  inputs:\n    0: {min: -.inf, max: 0}\n  output: {min: 0, max: 1}",
            "F:3: min of input 0 of layer 'fc' is -inf; statistics must be finite: collect them again",
            id="infinite",
        ),
        pytest.param(
            "fc:\n  output: {min: 2, max: 1}",
            "F:2: min 2.0 of the output of layer 'fc' is above max 1.0; collect again",
            id="min above max",
        ),
        pytest.param(
            "fc:\n  output: {min: 2}",
            "F:2: the output of layer 'fc' lacks 'max'; collect the statistics again",
            id="no max",
        ),
        pytest.param(
            "fc:\n  output: {min: 0, max: yes}",
            "F:2: max of the output of layer 'fc' is true; it must be a number",
            id="not a number",
        ),
        pytest.param(
            "fc:\n  output: {min: 0, max: 1, std: -1}",
            "F:2: std of the output of layer 'fc' is -1.0; it cannot be negative",
            id="negative std",
        ),
        pytest.param(
            "fc:\n  output: {min: 0, max: 1, avgmin: 0}",
            "F:2: unknown key 'avgmin' in the output of layer 'fc'; allowed: min, max, avg_min, avg_max, mean, std, b, "
            "shape, total_numel, samples; did you mean avg_min or min or avg_max?",
            id="unknown key",
        ),
        pytest.param(
            "fc:\n  inputs:\n    1: {min: 0, max: 1}\n  output: {min: 0, max: 1}",
            "F:3: input '1' of layer 'fc' is out of order; inputs are numbered 0, 1, ...",
            id="inputs from 1",
        ),
        pytest.param(
            "fc:\n  output: {min: 0, max: 1, shape: big}",
            "F:2: shape of the output of layer 'fc' is 'big'; it must be like (128, 3, 32, 32)",
            id="shape",
        ),
        pytest.param(
            "fc:\n  output: {min: 0, max: 1, samples: 1.5}",
            "F:2: samples of the output of layer 'fc' is 1.5; it must be a whole number from 0",
            id="samples",
        ),
        pytest.param(
            "qlib_stats: {version: 9}\nfc:\n  output: {min: 0, max: 1}",
            "F:1: qlib_stats version is 9; this program reads version 1: update it",
            id="version",
        ),
        pytest.param(
            "fc: !!python/object/apply:os.system [ls]",
            "F:1: the tag !!python/object/apply:os.system is not allowed; write plain values; collect the statistics "
            "again with --qe-calibration",
            id="hostile tag",
        ),
    ],
)
def test_broken_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(StatsError) as caught:
        read_stats(path)
    assert str(caught.value) == message.replace("F:", f"{path}:", 1)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StatsError, match=r"none\.yaml: cannot be read: No such file or directory"):
        read_stats(tmp_path / "none.yaml")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    broken = TensorStats(count=1, samples=1, min=0.0, max=1.0, std=value)
    with pytest.raises(StatsError, match=f"std of input 0 of layer 'conv1' is {value}; statistics must be finite"):
        write_stats(tmp_path / "a.yaml", ModelStats({"conv1": LayerStats((broken,), broken)}))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write statistics '.*a\.yaml' \(File exists\); give"):
        write_stats(tmp_path / "file/a.yaml", STATS)


def test_fingerprint_of_another_model() -> None:
    check_fingerprint(STATS, "vgg11", "c0ffee")
    with pytest.raises(StatsError, match=r"another model \(weights 'c0ffee', this one is 'beef'\); collect them again"):
        check_fingerprint(STATS, "vgg11", "beef")


# ------------------------------------------------------------------------------------------------ histograms

SEEN = Histogram(-2.0, 0.25, (1, 0, 5, 2**40), zeros=3)
WITH = ModelStats(
    {
        "conv1": LayerStats((replace(RECORD, histogram=SEEN), RECORD), replace(RECORD, histogram=SEEN.merge(SEEN))),
        "fc": LayerStats((), RECORD),
    },
    {"arch": "vgg11"},
)


def test_histograms_round_trip_and_same_bytes(tmp_path: Path) -> None:
    write_stats(tmp_path / "a.v1.yaml", WITH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.v1.safetensors", "a.v1.yaml"]
    read = read_stats(tmp_path / "a.v1.yaml")
    assert read == WITH
    write_stats(tmp_path / "b.yaml", read)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.v1.safetensors").read_bytes()
    assert (tmp_path / "b.yaml").read_bytes() == (tmp_path / "a.v1.yaml").read_bytes()


def test_histograms_that_are_gone_leave_the_rest(tmp_path: Path) -> None:
    write_stats(tmp_path / "a.yaml", WITH)
    (tmp_path / "a.safetensors").unlink()
    assert [layer.output for layer in read_stats(tmp_path / "a.yaml").layers.values()] == [RECORD, RECORD]


def test_histograms_of_other_statistics_are_refused(tmp_path: Path) -> None:
    write_stats(tmp_path / "a.yaml", WITH)
    (tmp_path / "a.safetensors").write_bytes(b"other")
    with pytest.raises(StatsError) as caught:
        read_stats(tmp_path / "a.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/a.safetensors does not hold the histograms of {tmp_path}/a.yaml, which names other ones; "
        "collect both again with --qe-calibration and --qe-histograms"
    )


def test_a_layer_added_by_hand_has_no_histogram(tmp_path: Path) -> None:
    write_stats(tmp_path / "a.yaml", WITH)
    text = without_hash((tmp_path / "a.yaml").read_text())
    (tmp_path / "a.yaml").write_text(text + "new:\n  output: {min: 0.0, max: 1.0}\n")
    read = read_stats(tmp_path / "a.yaml").layers
    assert read["new"].output.histogram is None
    assert read["conv1"] == WITH.layers["conv1"]


def test_histograms_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write histograms '.*a\.safetensors' \(File exists\); give"):
        write_stats(tmp_path / "file/a.yaml", WITH)
