"""What the system refuses: sentences, streams that take no more, folders that a killed process left."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import numpy as np
import pytest
from runs import ROOT, main

from qlib import runlog
from qlib.data.datasets import ImageArray, ImageDataset, ImageFiles
from qlib.data.loader import make_loader
from qlib.errors import DataError, OutputError, SystemRefusal
from qlib.files import write_text
from qlib.runlog import open_run
from qlib.streams import Stream, log_stream, standard_streams
from qlib.system import answered, refusal

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
TENSORS = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ... "


def code_of(number: int, *name: str) -> OSError:
    return OSError(number, os.strerror(number), *name)


REFUSED = [
    pytest.param(RuntimeError(f"{TENSORS}unable to open shared memory object </torch_1_2_3>"), "-j 0", id="shm"),
    pytest.param(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It"), "-j 0", id="bus error"),
    pytest.param(RuntimeError("received 0 items of ancdata"), "/dev/shm; give -j 0", id="files of other processes"),
    pytest.param(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed", id="killed"),
    pytest.param(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "was killed", id="gone"),
    pytest.param(MemoryError(), "not enough memory; give a lower -b", id="Python's memory"),
    pytest.param(MemoryError("Unable to allocate 9 TiB"), "not enough memory; give a lower -b", id="numpy's memory"),
    pytest.param(
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        "not enough memory; give a lower -b",
        id="torch's memory",
    ),
    pytest.param(RuntimeError("CUDA out of memory. Tried to allocate"), "not enough memory", id="memory of a GPU"),
    pytest.param(ImportError("libtorch.so: failed to map segment"), "not enough memory", id="memory for libraries"),
    pytest.param(ImportError("libgomp.so: Too many open files"), "too many files are open", id="files of libraries"),
    pytest.param(RuntimeError("can't start new thread"), "no thread can be started", id="threads"),
    pytest.param(code_of(errno.EMFILE, "a.png"), "'a.png' (Too many open files); allow more", id="files"),
    pytest.param(code_of(errno.EACCES, "a.png"), "'a.png' (Permission denied); give another", id="rights"),
    pytest.param(code_of(errno.ENAMETOOLONG, "a"), "'a' (File name too long); give a shorter", id="name"),
    pytest.param(code_of(errno.ENOENT), "the current folder is no longer there; change", id="current folder"),
    pytest.param(UnicodeEncodeError("utf-8", "r\udcff", 1, 2, "no"), "is not UTF-8, which is needed here", id="bytes"),
    pytest.param(code_of(errno.EAGAIN), "(Resource temporarily unavailable); end other", id="processes"),
]


@pytest.mark.parametrize(("error", "words"), REFUSED)
def test_what_the_system_refuses_is_a_sentence(error: Exception, words: str) -> None:
    with pytest.raises(SystemRefusal) as told, answered():
        raise error
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), OSError("what a program says"), ValueError("Too many open files")]
)
def test_what_a_program_raises_is_left_alone(error: Exception) -> None:
    assert refusal(error) is None
    with pytest.raises(type(error), match=str(error)), answered():
        raise error


def test_a_killed_worker_is_a_sentence() -> None:
    def kill(image: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    images = ImageArray("zeros", np.zeros((1, 2, 2), np.uint8))
    loader = make_loader(ImageDataset(images, [0], ["a"], kill), batch_size=1, workers=1)
    with pytest.raises(SystemRefusal, match="a process that reads images was killed"), answered():
        list(loader)


def test_processes_without_queues_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise code_of(errno.ENOSPC)

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    images = ImageArray("zeros", np.zeros((1, 2, 2), np.uint8))
    loader = make_loader(ImageDataset(images, [0], ["a"], lambda image: image), batch_size=1, workers=1)
    with pytest.raises(SystemRefusal, match=r"cannot be started \(No space left on device\); give -j 0, or room in"):
        list(loader)


@pytest.mark.parametrize(("number", "kind"), [(errno.EMFILE, SystemRefusal), (errno.EIO, DataError)])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_is_not_damaged_where_no_file_can_be_opened(
    workers: int, number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ImageFiles, index: int) -> None:
        raise code_of(number, "a.png")

    monkeypatch.setattr(ImageFiles, "read", refuse)
    dataset = ImageDataset(ImageFiles(["a.png"]), [0], ["a"], lambda image: image)
    with pytest.raises(kind) as error:
        list(make_loader(dataset, batch_size=1, workers=workers, skip_corrupt=True))
    assert "Traceback" not in str(error.value)


@contextlib.contextmanager
def full_device() -> Iterator[TextIO]:
    with FULL.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def broken_pipe() -> Iterator[TextIO]:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as file:
        yield file


@needs_full
@pytest.mark.parametrize(("taken", "missed"), [(full_device, True), (broken_pipe, False)], ids=["full", "pipe"])
def test_a_stream_loses_what_is_not_taken(taken: object, missed: bool) -> None:
    with taken() as file:  # type: ignore[operator]
        stream = Stream(file)
        for _ in range(3):
            print("text" * 10_000, file=cast("TextIO", stream))
            stream.flush()
        assert (stream.lost is not None) == missed


def test_a_stream_that_was_closed_takes_nothing() -> None:
    file = io.StringIO()
    stream = Stream(file)
    file.close()
    stream.write("text")
    stream.flush()
    assert stream.lost is None


def test_what_an_encoding_lacks_is_escaped() -> None:
    content = io.BytesIO()
    stream = Stream(io.TextIOWrapper(content, "ascii"))
    stream.write("50 \xb1 3 %, \udcff\n")
    stream.flush()
    assert content.getvalue() == b"50 \\xb1 3 %, \\udcff\n"


CHECK = ["-a", "digits_cnn", "--check", "--qe", "--qe-dynamic", "--cpu"]
SAID = [
    pytest.param(CHECK, full_device, 2, "cannot write all that was said to 'stdout' (No space left", id="run, full"),
    pytest.param(CHECK, broken_pipe, 0, "", id="run, pipe"),
    pytest.param(["--help"], full_device, 2, "cannot write all that was said to 'stdout'", id="help, full"),
    pytest.param(["--help"], broken_pipe, 0, "", id="help, pipe"),
]


@needs_full
@pytest.mark.parametrize(("words", "out", "code", "sentence"), SAID)
def test_stdout_that_takes_no_more(
    words: list[str], out: object, code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    err = io.StringIO()
    with out() as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(err):  # type: ignore[operator]
        try:
            done = main(words)
        except SystemExit as stop:
            done = int(stop.code or 0)
    assert done == code
    assert err.getvalue().startswith(f"compress.py: error: {sentence}" if sentence else "")
    assert err.getvalue().count("\n") == bool(sentence)
    if words is CHECK:
        log = Path("latest_log_file").read_text().splitlines()
        assert "wide.conv" in "".join(log)
        assert "Log file for this run: " in log[-1]


def test_names_that_are_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, whose reports must be UTF-8 to be sent
    name, out = os.fsdecode(b"r\xff"), io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(out):
        assert main([*CHECK, "--name", name, "--out-dir", name]) == 0
    assert b"r\\udcff___" in out.buffer.getvalue()  # type: ignore[attr-defined]
    (log,) = Path(name).glob("*/*.log")
    assert log.name.startswith(f"{name}___")
    assert "/r\\udcff___" in log.read_text()


@needs_full
def test_stderr_that_takes_nothing() -> None:
    with full_device() as file, contextlib.redirect_stderr(file):
        assert main(["--nosuch"]) == 2


PROGRAM = f"{sys.executable} {ROOT / 'compress.py'}"


@pytest.mark.parametrize(
    ("words", "code"),
    [("--help >&-", 0), ("--nosuch 2>&-", 2), ("--nosuch <&- >&- 2>&-", 2), ("--help | head -n 1", 0)],
)
def test_streams_of_a_process(words: str, code: int) -> None:
    done = subprocess.run(["sh", "-c", f"{PROGRAM} {words}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.count("\n") == ("head" in words)


def test_a_closed_stream_lends_its_number_to_no_file() -> None:
    code = (
        "import os\nfrom qlib.streams import standard_streams\nwith standard_streams():\n"
        "    os._exit(os.open(os.devnull, os.O_RDONLY))"
    )
    done = subprocess.run(["sh", "-c", f"{sys.executable} -c '{code}' <&- >&- 2>&-"], cwd=ROOT)
    assert done.returncode > 2


def test_standard_streams_are_as_before_afterwards() -> None:
    before = sys.stdout, sys.stderr
    with standard_streams() as (out, _):
        assert sys.stdout is cast("TextIO", out)
    assert before == (sys.stdout, sys.stderr)


@needs_full
def test_a_full_disk_under_the_log_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runlog, "log_stream", lambda file: log_stream(FULL))
    reached = []

    def lines() -> None:
        with open_run(Path("logs")):
            for number in range(3):
                logging.getLogger("qlib").info("a line")
                reached.append(number)

    with pytest.raises(OutputError, match=r"cannot write all lines of the log '.*\.log' \(No space left on device\)"):
        lines()
    assert reached == [0, 1, 2]


def test_a_current_folder_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path.cwd()
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    try:
        (tmp_path / "gone").rmdir()
        assert main(["-a", "digits_cnn", "-e"]) == 2
    finally:
        os.chdir(before)
    assert (
        capsys.readouterr().err == "compress.py: error: the current folder is no longer there; change to one that is\n"
    )


KILLED = """
import os, signal
from pathlib import Path
from qlib.files import write_whole
def write(file):
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path("plan.yaml"), write, "plan")
"""


def test_the_next_write_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("old")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, env=env)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".*")
    assert left.name.startswith(".qlib-scratch-")
    assert (tmp_path / "plan.yaml").read_text() == "old"
    write_text(tmp_path / "other.yaml", "new", "plan")
    assert {path.name for path in tmp_path.iterdir()} == {"plan.yaml", "other.yaml"}


def test_a_write_leaves_alone_what_is_not_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a link stands for, and one of another user."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".qlib-scratch-link").symlink_to(tmp_path / "own")
    write_text(tmp_path / "run" / "a", "text", "plan")
    assert (tmp_path / "own" / "file").exists()
    (tmp_path / "run" / ".qlib-scratch-other").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: -1)
    write_text(tmp_path / "run" / "a", "text", "plan")
    assert (tmp_path / "run" / ".qlib-scratch-other").exists()
