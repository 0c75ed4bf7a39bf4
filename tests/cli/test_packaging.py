"""What a user has who installed the package: its files, its schedules by name, and a command of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from runs import ROOT, good, make_images, run, user_model

PYPROJECT = (ROOT / "pyproject.toml").read_text()
SCHEDULES = ROOT / "schedules"


def test_the_wheel_is_told_of_every_file() -> None:
    """`tools/check_wheel.py` builds one and looks."""
    (line,) = re.findall(r"^qlib = (\[.+\])$", PYPROJECT, re.MULTILINE)
    patterns = re.findall(r'"(.+?)"', line)
    package = ROOT / "qlib"
    paths = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    paths += [package / "schedules" / path.name for path in SCHEDULES.iterdir()]
    assert all(path.is_file() for path in paths)
    names = [str(path.relative_to(package)) for path in paths]
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("name", ["qat_lsq_4bit.yaml", "schedules/qat_lsq_4bit.yaml"])
def test_a_schedule_of_the_package_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    checked = good(f"-a digits_cnn --compress {name} --epochs 10 --check", tmp_path)
    assert "LSQQuantizer" in checked.out
    written = (checked.folder / "configs" / "qat_lsq_4bit.yaml").read_bytes()
    assert written == (SCHEDULES / "qat_lsq_4bit.yaml").read_bytes()


def test_a_file_that_exists_comes_before_that_of_the_package(tmp_path: Path) -> None:
    own = (SCHEDULES / "ptq_weights_only_4bit.yaml").read_text()
    (tmp_path / "digits_4bit.yaml").write_text(own.replace("bits_parameters: 4", "bits_parameters: 5"))
    checked = good("-a digits_cnn --qe --qe-config-file digits_4bit.yaml --check", tmp_path)
    assert re.search(r"^\| fc +\| linear +\| 10 +\| 5 +\| float +\|", checked.out, re.MULTILINE)


@pytest.mark.parametrize("name", ["qat_lsq4bit.yaml", "schedules/qat_lsq4bit.yaml", "other/qat_lsq_4bit.yaml"])
def test_a_name_that_is_none_tells_which_there_are(tmp_path: Path, name: str) -> None:
    refused = run(f"-a digits_cnn --compress {name}", tmp_path)
    there = ", ".join(sorted(path.name for path in SCHEDULES.glob("*.yaml")))
    assert refused.code == 2
    assert f"a file that exists, or one that comes with the package: {there}; did you mean" in refused.err


def script(folder: Path) -> Path:
    """`compress_classifier` as an installer writes it from pyproject.toml."""
    ((module, function),) = re.findall(r'^compress_classifier = "(.+):(.+)"$', PYPROJECT, re.MULTILINE)
    file = folder / "compress_classifier"
    file.write_text(f"import sys\nfrom {module} import {function}\nif __name__ == '__main__': sys.exit({function}())\n")
    return file


def test_the_command_lines_of_distiller(tmp_path: Path) -> None:
    """Calibration, and evaluation of the quantized model, in the words and the order that its users know.

    Each by another name of the program.
    """
    make_images(tmp_path / "images")
    model = f"-a {user_model(tmp_path)} -p 10 -j 2 images"
    stats = "stats/net.py_brightest_imagefolder.yaml"
    for program, flags in (
        (ROOT / "compress.py", "--qe-calibration 0.5"),
        (script(tmp_path), f"--quantize-eval --qe-per-channel --qe-stats-file {stats}"),
    ):
        words = [sys.executable, str(program), *model.split(), *flags.split()]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert "==> Top1: 91.667" in done.stdout
