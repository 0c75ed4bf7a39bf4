"""Command lines run as a user runs them, and what they leave; small image folders and a model with known answers."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shlex
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image

from qlib.cli import main

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared"

CLASSES = ("black", "blue", "green", "red")  # of these no image is black

USER_MODEL = '''
import time
from pathlib import Path
import numpy as np
import torch
from torch import nn

class Brightest(nn.Module):
    """The class is the brightest colour."""

    dataset, input_shape = "imagefolder", (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        rows = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
        self.conv.weight.data = torch.tensor(rows, dtype=torch.float32)[:, :, None, None]

    @staticmethod
    def transform(image):
        if Path("slow").exists():
            time.sleep(0.05)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        stop = Path("stop")
        if stop.exists() and pixels[0, 0, 1] * 255 == float(stop.read_text()):
            raise KeyboardInterrupt
        return pixels

    def forward(self, x):
        return torch.flatten(self.pool(self.relu(self.conv(x))), 1)

def brightest():
    return Brightest()

def broken():
    model = Brightest()
    model.conv.weight.data[1] = float("nan")
    return model

def overflowing():
    model = Brightest()
    model.conv.weight.data[1] = 3e38
    model.transform = lambda image: 10 * Brightest.transform(image)
    return model
'''


@dataclass(frozen=True)
class Run:
    """What a command line did: exit code, what it printed, and the folder of its run (of a later one, if one came)."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def lines(self) -> list[str]:
        """The lines on stdout, without those that name the log file and the report."""
        named = ("Log file for this run: ", "Report of this run: ")
        return [line for line in self.out.splitlines() if not line.startswith(named)]

    @property
    def log(self) -> str:
        """The text of the log file."""
        return (self.folder / f"{self.folder.name}.log").read_text()

    @property
    def files(self) -> set[str]:
        """All files of the run's folder, but for the log and the report."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return {str(path) for path in found} - {f"{self.folder.name}.log", "report.json", "report.html"}

    def metrics(self, what: str) -> dict[str, str]:
        """A row of metrics.csv, to the last digit."""
        with (self.folder / "metrics.csv").open(newline="") as file:
            (row,) = (row for row in csv.DictReader(file) if row["what"] == what)
        return row

    def score(self, what: str = "quantized") -> tuple[str, str, str]:
        """Top1, Top5 and loss, to the last digit."""
        row = self.metrics(what)
        return row["top1"], row["top5"], row["loss"]


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def run(words: str, folder: Path, workers: int = 0) -> Run:
    """A command line in this process, with `folder` as the current one; `workers` others read the images."""
    out, err = io.StringIO(), io.StringIO()
    device = [] if "--gpus" in words else ["--cpu"]
    with _folder(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*shlex.split(words), "-j", str(workers), *device])
    return Run(code, out.getvalue(), err.getvalue(), _last(folder))


def good(words: str, folder: Path) -> Run:
    """A run that succeeds and says nothing on stderr."""
    done = run(words, folder)
    assert (done.code, done.err) == (0, ""), done
    return done


def _last(folder: Path) -> Path:
    return (folder / "latest_log_dir").resolve()


def start(words: str, folder: Path, threads: int = 1, trains: bool = False) -> subprocess.Popen[str]:
    """A command line as a process of its own.

    With ``-j 0`` it is a fork of this process, which has torch already, and the program that would be executed is never
    reached. Where this one computes in several threads, or that one `trains`, it is not: neither torch's threads nor
    its autograd survive a fork.
    """
    forked = "-j 0" in words and torch.get_num_threads() == 1 and not trains
    arguments = [str(ROOT / "compress.py"), *shlex.split(words), "--cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, such as those of pytest-xdist
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: _become(arguments, threads) if forked else _default_signals(),
        )


def _default_signals() -> None:
    """Where the tests run in the background of a shell, Ctrl-C is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _become(argv: list[str], threads: int) -> NoReturn:
    """Runs a command line in this process, a fork, as Python would run it from the start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.closerange(3, 10_000)  # with that by which the parent waits for the program
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, "rw"[fd > 0], encoding="utf-8") for fd in range(3))
    warnings.resetwarnings()
    for category in (DeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    torch.set_num_threads(threads)
    sys.argv = argv
    try:
        code = main(argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(process: subprocess.Popen[str], folder: Path) -> Run:
    """Waits for the process."""
    out, err = process.communicate(timeout=120)
    return Run(process.returncode, out, err, _last(folder))


def make_images(folder: Path, train: int = 12, val: int = 12, size: int = 8) -> Path:
    """An ImageFolder of `CLASSES`: each image has one bright channel, and its own brightness at one pixel.

    The last image of val stands in the wrong class.
    """
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            channel = index * 3 // count  # all of a class in a row: red, green, blue
            pixels = np.zeros((size, size, 3), np.uint8)
            pixels[..., channel] = 200
            pixels[0, 1, 0] = index
            wrong = split == "val" and index == count - 1
            name = "red" if wrong else ("red", "green", "blue")[channel]
            Image.fromarray(pixels).save(folder / split / name / f"{index:03d}.png")
    return folder


def user_model(folder: Path) -> str:
    """Writes the model file; the `-a` of its model."""
    (folder / "net.py").write_text(USER_MODEL)
    return "net.py:brightest"
