"""Faults of a disk at any call that changes it, what they leave, and whether the same command then makes the same.

A run is small and goes in this process: a fault costs a tenth of a second. For the disk it is killed where nothing that
it does reaches the disk any more. The calls are those that Python makes; what libraries write by themselves lies in
scratch folders of the system.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from runs import Run, make_images, run, user_model

import qlib.app.calibrate
import qlib.deploy.export
from qlib.checkpoint.read import read_checkpoint

MAKES = frozenset({"open", "write", "mkdir", "symlink", "fsync"})
CHANGES = MAKES | {"rename", "unlink", "rmdir"}
NEVER = sys.maxsize
OLD = b"what was there before"


@dataclass(frozen=True)
class Fault:
    """Which calls fail, and with which number; without one, the run is killed."""

    calls: frozenset[str]
    number: int | None = None


FAULTS: Mapping[str, Fault] = {
    "ENOSPC": Fault(MAKES, errno.ENOSPC),
    "EROFS": Fault(CHANGES, errno.EROFS),
    "EMFILE": Fault(frozenset({"open", "read"}), errno.EMFILE),
    "EIO": Fault(CHANGES, errno.EIO),
    "SIGKILL": Fault(CHANGES),
}


class Killed(BaseException):
    """Ends a run; what it does on its way out does not reach the disk."""


@dataclass
class Disk:
    """What stands between the program and `folder`: from call `at` on, all of those that `fault` has fail.

    A write that fails has written the first half.
    """

    folder: Path
    fault: Fault
    at: int = NEVER
    calls: list[str] = field(default_factory=list)

    def call(self, what: str, path: Any) -> bool:
        """Counts a call; whether it fails."""
        if what not in self.fault.calls or not self._concerns(path):
            return False
        self.calls.append(what)
        return len(self.calls) >= self.at

    def _concerns(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and self.folder in Path(os.path.abspath(path)).parents

    def fail(self, path: Any) -> None:
        """Raises the error, or ends the run."""
        if self.fault.number is not None:
            raise OSError(self.fault.number, os.strerror(self.fault.number), str(path))
        if len(self.calls) == self.at:
            raise Killed

    @contextlib.contextmanager
    def installed(self) -> Iterator[Disk]:
        """All calls of this process go through it within the block."""
        with contextlib.ExitStack() as stack:
            for what in ("mkdir", "unlink", "rmdir", "symlink", "replace"):
                name = "rename" if what == "replace" else what
                stack.enter_context(mock.patch.object(os, what, self._guarded(name, getattr(os, what))))
            stack.enter_context(mock.patch.object(os, "fsync", self._guarded_sync(os.fsync)))
            stack.enter_context(mock.patch.object(os, "open", self._guarded_open(os.open)))
            stack.enter_context(mock.patch.object(io, "open", self._opened))
            stack.enter_context(mock.patch.object(builtins, "open", self._opened))
            stack.enter_context(mock.patch.object(shutil, "_USE_CP_SENDFILE", False))
            yield self

    def _guarded(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            path = args[1] if what == "symlink" else args[0]
            return self.fail(path) if self.call(what, path) else real(*args, **more)

        return call

    def _guarded_sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            return self.fail(path) if self.call("fsync", path) else real(descriptor)

        return call

    def _guarded_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *args: Any, **more: Any) -> int:
            what = "open" if flags & os.O_CREAT else "read"
            if self.call(what, path):
                self.fail(path)
                raise Killed
            return real(path, flags, *args, **more)

        return call

    def _opened(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, *more: Any,
        **others: Any,
    ) -> Any:  # fmt: skip
        """`open`, of files whose every write is a call."""
        writes = bool(set(mode) & set("wax+"))
        if self.call("open" if writes else "read", file):
            self.fail(file)
            raise Killed
        if not writes or not self._concerns(file):
            return _OPEN(file, mode, buffering, encoding, errors, *more, **others)
        raw = _Written(file, mode.replace("b", "").replace("t", ""))
        raw.disk = self
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, *more, **others)


_OPEN = open


class _Written(io.FileIO):
    """A file of a `Disk`."""

    disk: Disk

    def write(self, data: Any, /) -> int:
        if not self.disk.call("write", self.name):
            return super().write(data)
        content = memoryview(data).cast("B")
        if self.disk.fault.number is not None or len(self.disk.calls) == self.disk.at:
            super().write(content[: len(content) // 2])
        self.disk.fail(self.name)
        return len(content)


SCHEDULE = """\
quantizers:
  linear: {class: QuantAwareTrainRangeLinearQuantizer, bits_activations: 8, bits_weights: 8}
policies:
  - {quantizer: {instance_name: linear}, starting_epoch: 0, ending_epoch: 1, frequency: 1}
"""

WORDS: Mapping[str, str] = {
    "calibration": "-a net.py:brightest images --qe-calibration 1 --qe-histograms -p 1",
    "training": "-a net.py:trained images --epochs 1 --lr 0.01 -b 16 --save-every 0 --compress schedule.yaml",
    "export": "-a net.py:brightest images --quantize-eval --qe-calibration 1 --export-onnx model.onnx"
    " --export-encodings ort",
}
"""What is run."""


def prepare(folder: Path) -> Path:
    """Images and a model, and a file that was there before."""
    make_images(folder / "images", train=36, val=6)
    user_model(folder)
    model = folder / "net.py"
    model.write_text(
        model.read_text() + "\ndef trained():\n    model = Brightest()\n"
        "    model.train_transform = Brightest.transform\n    return model\n"
    )
    (folder / "schedule.yaml").write_text(SCHEDULE)
    (folder / "model.onnx").write_bytes(OLD)
    return folder


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """The state of a calibration is saved after each batch; each model is captured for ONNX once."""
    import onnx_ir as ir

    made: dict[str, Any] = {}
    export = qlib.deploy.export._export

    def once(model: Any, example: Any, opset: int) -> Any:
        if "model" not in made:
            made["model"] = ir.to_proto(export(model, example, opset))
        return ir.from_proto(made["model"])

    with (
        mock.patch.object(qlib.deploy.export, "_export", once),
        mock.patch.object(qlib.app.calibrate, "_SAVE_EVERY_SECONDS", 0.0),
    ):
        yield


@dataclass(frozen=True)
class Case:
    """A command line, the folder that it is run in a copy of, and what it makes there undisturbed."""

    words: str
    template: Path
    made: Mapping[str, bytes]
    same: set[frozenset[tuple[str, str]]] = field(default_factory=set)
    """States of the folder from which the same command is known to make the same."""

    @classmethod
    def of(cls, name: str, folder: Path) -> Case:
        """The case of `WORDS`, in a new folder."""
        template = prepare(folder / "template")
        undisturbed = Path(shutil.copytree(template, folder / "undisturbed"))
        done = run(WORDS[name], undisturbed)
        assert done.code == 0, done
        return cls(WORDS[name], template, made_by(done.folder, undisturbed))

    def calls(self, fault: Fault) -> int:
        """How many calls of a run can fail so."""
        with self._copy() as folder, Disk(folder, fault).installed() as disk:
            run(self.words, folder)
        return len(disk.calls)

    def check(self, fault: Fault, at: int) -> str:
        """Runs it with a fault; how that ended. Raises AssertionError where something was lost."""
        with self._copy() as folder:
            done = self._faulty(Disk(folder, fault, at))
            self._whole(folder)
            assert fault.number in (None, errno.EROFS, errno.EIO) or not scratch(folder), scratch(folder)
            self._again(folder)
        if done is None:
            return "killed"
        assert done.code in (0, 2), done
        assert done.code == 2 or done.err == "", done
        reason = os.strerror(fault.number or 0)
        assert done.code == 0 or re.fullmatch(
            rf"(?i)compress\.py: error: .+ \(?{reason}.*\n|.* too many files .*\n", done.err
        ), done
        return "told" if done.code else "done"

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        folder = self.template.with_name("run")
        shutil.copytree(self.template, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def _faulty(self, disk: Disk) -> Run | None:
        """A run on such a disk; None where it was killed."""
        try:
            with disk.installed():
                return run(self.words, disk.folder)
        except Killed:
            return None

    def _whole(self, folder: Path) -> None:
        """Each file that was made is that of an undisturbed run, but for what is written again later."""
        for log in (folder / "logs").glob("*"):
            for name, content in made_by(log, folder).items():
                if name.endswith((".pth.tar", ".partial.safetensors")):
                    read_checkpoint(folder / name.replace("RUN", str(log)))
                else:
                    lines = zip(self.made[name].splitlines(), content.splitlines(), strict=False)
                    grows = name.endswith(".csv") and all(line.startswith(start) for line, start in lines)
                    assert grows or content == self.made[name] or (name == "model.onnx" and content == OLD), name

    def _again(self, folder: Path) -> None:
        """The same command makes the same, and clears up."""
        state = kept(folder)
        if state not in self.same:
            done = run(self.words, folder)
            assert done.code == 0, done
            assert made_by(done.folder, folder) == self.made
            assert [path for path in scratch(folder) if "logs" not in path.parts] == []
            self.same.add(state)


def made_by(log: Path, folder: Path) -> dict[str, bytes]:
    """Each file that a run with the folder `log` made, but for logs and reports, which tell the time."""
    paths = [*folder.glob("stats/[!.]*"), folder / "model.onnx", *log.rglob("[!.]*")]
    found = sorted(path for path in paths if path.is_file() and path.suffix != ".log" and path.stem != "report")
    found = [path for path in found if not path.parent.name.startswith(".")]
    return {str(path).replace(str(log), "RUN").replace(f"{folder}/", ""): _content(path) for path in found}


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name == "training.csv":  # its last column has the seconds
        content = b"\n".join(line.rpartition(b",")[0] for line in content.splitlines())
    return content


def kept(folder: Path) -> frozenset[tuple[str, str]]:
    """Names and hashes of the files outside the folders of runs: what decides how the next run goes."""
    files = (path for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts)
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return frozenset((name, text) for name, text in found.items() if not re.search("latest|__pycache__", name))


def scratch(folder: Path) -> list[Path]:
    """What stays of writes that were not finished."""
    return list(folder.rglob(".*"))
