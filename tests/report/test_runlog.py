"""The folder and log of a run, and the progress over batches."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from qlib import runlog
from qlib.errors import ModelError, OutputError
from qlib.progress import track
from qlib.runlog import open_run

LOGS = Path("logs")
_log = logging.getLogger("qlib.test")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [(None, r"\d{4}\.\d\d\.\d\d-\d{6}"), ("first", r"first___\d{4}\.\d\d\.\d\d-\d{6}")],
    ids=["no name", "name"],
)
def test_names_of_folder_and_file(name: str | None, pattern: str) -> None:
    with open_run(LOGS, name) as run:
        pass
    assert re.fullmatch(pattern, run.folder.name)
    assert run.folder.parent == Path("logs").absolute()
    assert run.file == run.folder / f"{run.folder.name}.log"


def test_two_runs_in_one_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "2026.01.02-030405")
    names = []
    for _ in range(3):
        with open_run(LOGS) as run:
            names.append(run.folder.name)
    assert names == ["2026.01.02-030405", "2026.01.02-030405-2", "2026.01.02-030405-3"]


def test_file_lines_have_the_time_and_console_lines_are_bare(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(LOGS, cpu=True) as run:
        _log.info("==> Top1: %.3f", 92.1)
        _log.debug("only with --verbose")
        logging.getLogger("onnxscript").info("Skipping constant folding")
    where = f"Log file for this run: {run.file}"
    assert capsys.readouterr().out.splitlines() == [where, "==> Top1: 92.100", where]
    lines = run.file.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - ", line) for line in lines)
    bare = [line.split(" - ", 1)[1] for line in lines]
    assert bare[0] == bare[-1] == where
    assert bare[-2] == "==> Top1: 92.100"
    assert {"GPUs: not used (--cpu)", f"Python: {sys.version.split()[0]}"} <= set(bare)


def test_verbose_shows_our_debug_messages_and_no_one_elses(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(LOGS, verbose=True):
        _log.debug("ours")
        logging.getLogger("PIL").debug("theirs")
    out = capsys.readouterr().out
    assert "ours" in out
    assert "theirs" not in out
    assert "Command line" not in out


def test_warnings_of_others_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(LOGS):
        logging.getLogger("onnxscript").warning("an odd graph")
    assert capsys.readouterr().out.splitlines()[1] == "an odd graph"


def test_logging_is_as_before_after_the_run() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, warnings.showwarning)
    with open_run(LOGS):
        assert len(root.handlers) == len(before[0]) + 2
    assert (list(root.handlers), root.level, warnings.showwarning) == before


def test_configs_are_copied() -> None:
    stats, settings = Path("stats") / "x.yaml", Path("x.yaml")
    stats.parent.mkdir()
    stats.write_text("stats")
    settings.write_text("settings")
    with open_run(LOGS, settings="arch: vgg11\n", inputs=(stats, None, Path("absent"), settings)) as run:
        found = {file.name: file.read_text() for file in run.configs.iterdir()}
    assert found == {"run_config.yaml": "arch: vgg11\n", "x.yaml": "stats", "copy_of_x.yaml": "settings"}


def test_links_point_at_the_latest_run() -> None:
    for _ in range(2):
        with open_run(LOGS) as run:
            pass
    assert Path("latest_log_dir").resolve() == run.folder.resolve()
    assert Path("latest_log_file").resolve() == run.file.resolve()
    assert {file.name for file in Path().iterdir()} == {"logs", "latest_log_dir", "latest_log_file"}


@pytest.mark.parametrize("name", ["latest_log_dir", "latest_log_file"])
@pytest.mark.parametrize("kind", ["file", "folder", "full folder"])
def test_files_of_the_users_own_are_not_replaced_by_links(name: str, kind: str) -> None:
    own = Path(name) if kind == "file" else Path(name) / "own"
    own.parent.mkdir(exist_ok=True)
    if kind != "folder":
        own.write_text("mine")
    with open_run(LOGS) as run:
        pass
    assert kind == "folder" or own.read_text() == "mine"
    assert not Path(name).is_symlink()
    assert run.file.read_text().count(f"Warning: {name} is no link to a run but yours, and stays; rename it") == 1
    assert {file.name for file in Path().iterdir()} == {"logs", "latest_log_dir", "latest_log_file"}


def test_a_folder_that_cannot_be_written() -> None:
    Path("taken").touch()
    with pytest.raises(OutputError) as error, open_run(Path("taken")):
        pass
    assert str(error.value) == "--out-dir taken cannot be written: File exists; give another folder"


def test_warnings_are_logged_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), open_run(LOGS) as run:
        warnings.simplefilter("always")
        for text in ("a", "b", "a"):
            warnings.warn(text, stacklevel=1)
    lines = [line.split(" - ", 1)[1] for line in run.file.read_text().splitlines()]
    assert [line for line in lines if "Warning" in line] == ["UserWarning: a", "UserWarning: b"]
    assert capsys.readouterr().err == ""


FAILURES = [
    ("failure of ours", ZeroDivisionError("oops"), False, "The run failed.\nTraceback", True),
    ("user's mistake", ModelError("unknown model"), False, "error: unknown model", False),
    ("user's mistake, verbose", ModelError("unknown model"), True, "error: unknown model\nTraceback", True),
    ("interrupt", KeyboardInterrupt("resume with: A"), False, "Interrupted. resume with: A", False),
]


@pytest.mark.parametrize(
    ("error", "verbose", "text", "traceback"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES]
)
def test_why_a_run_ended_is_in_the_file(
    error: BaseException, verbose: bool, text: str, traceback: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with open_run(LOGS, verbose=verbose):
            raise error

    with pytest.raises(type(error)):
        fail()
    log = Path("latest_log_file").read_text()
    assert text in log
    assert ("Traceback" in log) == traceback
    assert log.splitlines()[-1].endswith(f"Log file for this run: {Path('latest_log_file').readlink()}")
    assert text.partition("\n")[0] not in capsys.readouterr().out


def test_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert runlog._git_revision() == "not a git checkout"
    assert runlog._version("no-such-package") == "not installed"


BATCHES = [([0] * size, [0] * size) for size in (4, 4, 4, 2)]


def _run_over(
    batches: Sequence[tuple[list[int], list[int]]], print_freq: int = 2, images_done: int = 0
) -> tuple[int, int]:
    """The number of batches, and how often the fields were asked for."""
    asked = seen = 0

    def fields() -> dict[str, float]:
        nonlocal asked
        asked += 1
        return {"Loss": 0.25, "Top1": 50.0, "Top5": 100.0}

    with open_run(LOGS):
        for _ in track(
            batches,
            total_images=14,
            batch_size=4,
            description="Test",
            print_freq=print_freq,
            fields=fields,
            images_done=images_done,
        ):
            seen += 1
    return seen, asked


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINES = [
    ("every 2", BATCHES, 2, 0, [2, 4]),
    ("every 3", BATCHES, 3, 0, [3]),
    ("every 10", BATCHES, 10, 0, []),
    ("resumed after 2", BATCHES[2:], 1, 8, [3, 4]),
]


@pytest.mark.parametrize(
    ("batches", "freq", "done", "steps"), [row[1:] for row in LINES], ids=[row[0] for row in LINES]
)
def test_plain_progress(
    batches: Sequence[tuple[list[int], list[int]]],
    freq: int,
    done: int,
    steps: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run_over(batches, freq, done) == (len(batches), len(steps))
    shown = capsys.readouterr()
    tail = "Loss 0.250000    Top1 50.000000    Top5 100.000000    "
    assert shown.out.splitlines()[1:-1] == [f"Test: [{step:5d}/    4]    {tail}" for step in steps]
    assert shown.err == ""


@pytest.mark.parametrize("piped", [False, True], ids=["terminal", "stdout piped"])
def test_progress_bar_on_a_terminal(piped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO() if piped else _Terminal(), _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert _run_over(BATCHES) == (4, 2)
    assert "Test: " in err.getvalue()
    assert "/14 [" in err.getvalue()
    assert ("Test: [    2/    4]    Loss" in out.getvalue()) == piped
    assert "Test: [    2/    4]    Loss" in Path("latest_log_file").read_text()


def test_a_read_only_folder_has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with open_run(LOGS) as run:
        pass
    text = run.file.read_text()
    assert "The link latest_log_dir was not updated: Permission denied" in text
    assert "The link latest_log_file was not updated: Permission denied" in text
