"""`--auto`: a ladder of settings, judged on images that calibration does not see."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from runs import Run, good, rows, run

import qlib.app.auto as auto
from qlib.models import create_model, find_model
from qlib.search.ladder import RUNGS

AUTO = "-a digits_cnn --pretrained --auto --auto-bits 3 --qe-calibration 0.03 --ptq-iterations 20 --sense-images 16"


@pytest.fixture(scope="module", autouse=True)
def _few_judges() -> object:
    patch = pytest.MonkeyPatch()
    patch.setattr(auto, "_MOST_IMAGES", 64)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """A target out of reach: the whole ladder."""
    return good(f"{AUTO} --auto-agree 100 --auto-drop 0", folder)


def test_the_whole_ladder(whole: Run) -> None:
    table = rows(whole.folder / "auto.csv")
    assert [row["rung"] for row in table] == [rung.name for rung in RUNGS]
    divergences = [float(row["divergence"]) for row in table]
    starred = next(line for line in whole.lines if line.startswith("| * "))
    assert starred.split("|")[2].strip() == table[divergences.index(min(divergences))]["rung"]
    assert any(line.startswith("Best: ") and line.endswith("Top1 at most 0 lower: NOT reached") for line in whole.lines)
    (nearest,) = (line for line in whole.lines if line.startswith("The best trial reaches "))
    least = table[divergences.index(min(divergences))]
    assert f"agreement {float(least['agreement']):.2f} % of 100 %" in nearest
    shares = re.findall(r"([\w.]+) \((\d+) %\)", next(line for line in whole.lines if line.startswith("Most is lost")))
    assert len(shares) == 5
    assert 0 < int(shares[-1][1]) <= int(shares[0][1]) <= 100
    assert "--auto: 39 train images calibrate, 64 others judge" in whole.lines
    assert "Warning" not in whole.out


def test_the_settings_repeat_the_winner(folder: Path, whole: Run) -> None:
    again = good(f"--run-config {whole.folder / 'auto_run_config.yaml'}", folder)
    assert again.score() == whole.score()
    assert "auto.csv" not in again.files


def test_what_was_tried_is_not_tried_again(folder: Path, whole: Run) -> None:
    again = good(f"{AUTO} --auto-agree 100 --auto-drop 0", folder)
    assert again.score() == whole.score()
    assert (again.folder / "auto.csv").read_text() == (whole.folder / "auto.csv").read_text()
    assert not any(line.startswith("--auto: trying") for line in again.lines)
    assert sum("was tried before" in line for line in again.lines) == len(RUNGS)


def test_a_broken_search_goes_on(folder: Path, whole: Run) -> None:
    """As if it was killed in a trial: what that one left is made again, with the same result."""
    judged = sorted((folder / "stats").glob("auto-*/*/judgement.csv"), key=lambda path: path.stat().st_mtime)
    assert len(judged) == len(RUNGS)
    judged[-1].write_text("agreement,drop\n1")
    shutil.rmtree(judged[-2].parent)
    (judged[-3].parent / "plan.yaml").unlink()
    judged[-4].write_text("agreement,drop,divergence,seconds\nnan,0,nan,1")
    again = good(f"{AUTO} --auto-agree 100 --auto-drop 0", folder)
    assert again.score() == whole.score()
    assert sum(line.startswith("--auto: trying") for line in again.lines) == 4


def test_another_folder_has_the_same_trials(tmp_path: Path, whole: Run) -> None:
    """Each that the time allows: the same command, the same winner."""
    again = good(f"{AUTO} --auto-agree 100 --auto-drop 0", tmp_path)
    first, second = (
        [{**row, "seconds": "", "settings": ""} for row in rows(each.folder / "auto.csv")] for each in (whole, again)
    )
    assert second == first
    assert again.score() == whole.score()


def test_a_budget_holds_in_each_trial(tmp_path: Path) -> None:
    """Its bits are chosen anew in each; layers at 8 bits would break it."""
    words = AUTO.replace("--auto-bits 3", "--qe-budget 2.3bits")
    done = good(f"{words} --auto-agree 100 --auto-drop 0", tmp_path)
    tried = [row["rung"] for row in rows(done.folder / "auto.csv")]
    assert len(tried) > 2
    assert tried == [rung.name for rung in RUNGS if not rung.sensitive][: len(tried)]
    plan = yaml.safe_load((done.folder / "layer_quant_params.yaml").read_text())
    model = create_model(find_model("digits_cnn"), num_classes=10)
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if hasattr(module, "weight")}
    bits = {name: layer["weight"]["bits"] for name, layer in plan["layers"].items() if "weight" in layer}
    assert sum(sizes[name] * each for name, each in bits.items()) <= 2.3 * sum(sizes[name] for name in bits)


def test_it_stops_at_the_target(folder: Path, whole: Run) -> None:
    table = rows(whole.folder / "auto.csv")
    reached = float(table[1]["agreement"])
    assert reached > float(table[0]["agreement"])
    done = good(f"{AUTO} --auto-agree {reached}", folder)
    assert [row["rung"] for row in rows(done.folder / "auto.csv")] == ["as asked", "asym_u activations, sym weights"]
    assert any(line.endswith(f"Target agreement {reached:g} %: reached") for line in done.lines)


def test_it_stops_when_the_time_is_over(folder: Path) -> None:
    done = good(f"{AUTO} --seed 3 --auto-agree 100 --auto-minutes 0.00001", folder)
    assert [row["rung"] for row in rows(done.folder / "auto.csv")] == ["as asked"]
    assert "--auto: 1e-05 minutes are over" in done.lines


def test_flags_of_the_user_stay(folder: Path) -> None:
    done = good(f"{AUTO} --qe-mode sym --qe-bits-wts 8 --auto-agree 100 --auto-minutes 0.2", folder)
    plan = (done.folder / "layer_quant_params.yaml").read_text()
    assert "mode: sym" in plan
    assert "asym" not in plan
    assert "weight: {bits: 8" in plan


def test_images_must_be_left_to_judge_by(folder: Path) -> None:
    done = run(f"{AUTO} --qe-calibration 1", folder)
    assert done.code == 2
    assert "--qe-calibration 1 leaves none; give a smaller fraction, such as 0.5" in done.err
