"""A calibration that was stopped, by a kill or Ctrl-C, goes on and ends in the bytes of an unbroken one."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import Run, finish, good, make_images, run, start, user_model

from qlib.data.subset import choose_subset

STATS = Path("stats/net.py_brightest_imagefolder.yaml")
PARTIAL = Path("stats/net.py_brightest_imagefolder.partial.safetensors")
CALIBRATE = "-a net.py:brightest images --qe-calibration 1"
IMAGES = 96
# Images by number: class after class (blue, green, red), then in the order in which calibration reads them.
SORTED = (*range(64, 96), *range(32, 64), *range(32))
ORDER = [SORTED[index] for index in choose_subset(IMAGES, 1.0, seed=0, shuffled=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    user_model(tmp_path)
    make_images(tmp_path / "images", train=IMAGES, val=3)
    return tmp_path


def stop_at(folder: Path, position: int | None) -> None:
    """From now on Ctrl-C comes when the image at this position is read."""
    (folder / "stop").unlink(missing_ok=True)
    if position is not None:
        (folder / "stop").write_text(str(ORDER[position]))


def unbroken(folder: Path, flags: str = "") -> bytes:
    good(f"{CALIBRATE} {flags}", folder)
    written = (folder / STATS).read_bytes()
    (folder / STATS).unlink()
    return written


def stopped(folder: Path, position: int, flags: str = "") -> Run:
    stop_at(folder, position)
    broken = run(f"{CALIBRATE} {flags}", folder)
    stop_at(folder, None)
    assert broken.code == 130
    assert (folder / PARTIAL).exists()
    assert not (folder / STATS).exists()
    return broken


@pytest.mark.parametrize(("first", "then"), [("-b 7", "-b 64"), ("-b 64", "-b 1")], ids=["b7 b64", "b64 b1"])
def test_ctrl_c_twice(folder: Path, first: str, then: str) -> None:
    expected = unbroken(folder)
    broken = stopped(folder, 40, first)
    sentence = "calibration stopped after 32 of 96 images; run the same command again to go on"
    assert broken.err == f"compress.py: {sentence}\n"
    assert f"Interrupted. {sentence}" in broken.log
    again = stopped(folder, 90, then)
    assert "Going on from a broken collection: 32 of 96 images are done" in again.lines
    assert "stopped after 80 of 96" in again.err
    last = good(f"{CALIBRATE} {then}", folder)
    assert "Going on from a broken collection: 80 of 96 images are done" in last.lines
    assert (folder / STATS).read_bytes() == expected
    assert not (folder / PARTIAL).exists()


@pytest.mark.parametrize("position", [15, 50], ids=["before the first batch", "later"])
def test_ctrl_c_leaves_what_was_there(folder: Path, position: int) -> None:
    good(f"{CALIBRATE} --qe-calibration 0.5", folder)
    before = (folder / STATS).read_bytes()
    stop_at(folder, position)
    broken = run(CALIBRATE, folder)
    assert broken.err.startswith(f"compress.py: calibration stopped after {position // 16 * 16} of 96 images")
    assert (folder / PARTIAL).exists() == (position > 16)
    assert (folder / STATS).read_bytes() == before


def test_images_that_were_left_out_count(folder: Path) -> None:
    """A whole batch of damaged images moves the place to go on from as well."""
    for number in (*ORDER[:20], ORDER[35]):
        channel = ("red", "green", "blue")[number // 32]
        (folder / "images" / "train" / channel / f"{number:03d}.png").write_bytes(b"no image")
    expected = unbroken(folder, "--skip-corrupt -b 5")
    broken = stopped(folder, 60, "--skip-corrupt -b 64")
    assert "stopped after 27 of 96 images" in broken.err
    last = good(f"{CALIBRATE} --skip-corrupt", folder)
    assert "Going on from a broken collection: 48 of 96 images are done" in last.lines
    assert (folder / STATS).read_bytes() == expected


def test_another_calibration_begins_anew(folder: Path) -> None:
    stopped(folder, 40)
    other = good(f"{CALIBRATE} --qe-calibration 0.5", folder)
    assert not any("Going on" in line for line in other.lines)
    assert not (folder / PARTIAL).exists()


def test_a_damaged_state_is_not_used(folder: Path) -> None:
    expected = unbroken(folder)
    stopped(folder, 40)
    partial = folder / PARTIAL
    partial.write_bytes(partial.read_bytes()[:100])
    good(CALIBRATE, folder)
    assert (folder / STATS).read_bytes() == expected


def wait_for_state(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until the process has saved a new state, and stays busy a little longer."""
    began, seconds = time.time(), time.monotonic()
    while not (folder / PARTIAL).exists() or (folder / PARTIAL).stat().st_mtime < began:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - seconds < 60
        time.sleep(0.02)
    time.sleep(0.1)


def test_real_signals(folder: Path) -> None:
    expected = finish(start(f"{CALIBRATE} -j 1", folder), folder)
    assert (expected.code, expected.err) == (0, "")
    written = (folder / STATS).read_bytes()
    (folder / STATS).unlink()
    (folder / "slow").touch()
    for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(f"{CALIBRATE} -j 0", folder)
        wait_for_state(process, folder)
        process.send_signal(end)
        broken = finish(process, folder)
        assert broken.code == code, broken
        assert not (folder / STATS).exists()
    assert broken.err.startswith("compress.py: calibration stopped after ")
    assert broken.err.endswith(" of 96 images; run the same command again to go on\n")
    (folder / "slow").unlink()
    last = finish(start(f"{CALIBRATE} -j 2", folder), folder)
    assert any(line.startswith("Going on from a broken collection: ") for line in last.lines)
    assert (folder / STATS).read_bytes() == written
