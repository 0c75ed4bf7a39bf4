"""Installs the wheel into an environment of its own and compresses a small network there.

`python tools/check_wheel.py` takes the dependencies from the Python that runs it, and `qlib` from the wheel alone. The
exit code is 0 when the wheel holds all files of the package, every module can be imported from it, and calibration,
quantization under a YAML file of the package, export and verification succeed. Nothing is written into the repository.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIGITS = "-a digits_cnn --pretrained -j 0"
QUANTIZED = f"{DIGITS} --quantize-eval --qe-stats-file stats/digits_cnn_digits.yaml --qe-mode asym_u"
RUNS = (
    f"{DIGITS} --qe-calibration 0.2",
    f"{DIGITS} --quantize-eval --qe-config-file schedules/digits_4bit.yaml",
    f"{QUANTIZED} --export-onnx digits_int8.onnx --verify 64",
)
IMPORT_ALL = """
import importlib, pkgutil, sys, compress, qlib
names = [module.name for module in pkgutil.walk_packages(qlib.__path__, "qlib.")]
files = [module.__file__ for module in (compress, qlib, *map(importlib.import_module, names))]
strangers = [file for file in files if not file.startswith(sys.prefix)]
sys.exit(", ".join(strangers) or 0)
"""


def run(*command: str | Path, folder: Path) -> None:
    """Runs a command outside the repository; ends this program where it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}exit code {done.returncode}")


def sources() -> Iterator[Path]:
    """The files of the repository, without those that git ignores, relative to it."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return (Path(name) for name in listed.split("\0") if name and os.path.lexists(ROOT / name))


def build(folder: Path) -> Path:
    """The wheel, built from a copy of the sources, so that nothing of an earlier build is in it."""
    for path in sources():
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "source" / path, follow_symlinks=False)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, folder / "source", folder=folder)
    (wheel,) = folder.glob("qlib_compress-*.whl")
    return wheel


def missing(wheel: Path) -> list[str]:
    """The files of the package, and the YAML files beside it, that are not in the wheel."""
    held = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in sources() if path.parts[0] == "qlib" and not (ROOT / path).is_dir()]
    wanted = ["compress.py", *package, *(Path("qlib") / path for path in sources() if path.parts[0] == "schedules")]
    return sorted({path.as_posix() for path in map(Path, wanted)} - held)


def install(wheel: Path, folder: Path) -> Path:
    """The `bin` of a fresh environment with the wheel, which sees the packages of this one."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall")
    run(*pip, wheel, folder=folder)
    return folder / "bin"


def check(folder: Path) -> None:
    """Builds, installs and runs in `folder`; ends the program where something is wrong."""
    wheel = build(folder)
    if absent := missing(wheel):
        sys.exit(f"the wheel lacks {', '.join(absent)}")
    programs, work = install(wheel, folder / "environment"), folder / "work"
    work.mkdir()
    run(programs / "python", "-c", IMPORT_ALL, folder=work)
    for flags in RUNS:
        print(f"$ compress_classifier {flags}", flush=True)
        run(programs / "compress_classifier", *shlex.split(flags), folder=work)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        check(Path(name).resolve())
    print("The wheel runs on its own.")
