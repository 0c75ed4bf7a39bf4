"""What changed from one run to another, image by image, and over draws of calibration images."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import Run, good, rows, run

from qlib.metrics import mcnemar

DIGITS = "-a digits_cnn --pretrained"
QUANTIZE = f"{DIGITS} --quantize-eval --qe-calibration 0.02"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def drawn(folder: Path) -> Run:
    return good(f"{QUANTIZE} --qe-bits-acts 5 --seeds 3 --seed 5 --export-onnx m.onnx", folder)


def test_draws_have_images_of_their_own_and_are_told_together(folder: Path, drawn: Run) -> None:
    found = rows(drawn.folder / "seeds.csv")
    assert [row["seed"] for row in found] == ["5", "6", "7"]
    assert len({row["loss"] for row in found}) == 3
    losses = [float(row["loss"]) for row in found]
    line = next(line for line in drawn.lines if line.startswith("| loss "))
    assert [float(cell) for cell in line.split("|")[2:5]] == pytest.approx(
        [sum(losses) / 3, min(losses), max(losses)], abs=6e-6
    )
    assert "3 draws of calibration images, seeds 5, 6, 7:" in drawn.lines


def test_a_draw_is_the_run_with_that_seed(folder: Path, drawn: Run) -> None:
    alone = good(f"{QUANTIZE} --qe-bits-acts 5 --seed 6", folder)
    table = rows(drawn.folder / "seed_6" / "metrics.csv")
    assert [row["loss"] for row in table if row["what"] == "quantized"] == [alone.metrics("quantized")["loss"]]


def test_only_the_first_draw_is_handed_over(folder: Path, drawn: Run) -> None:
    assert drawn.out.count("Exported") <= 1
    assert (folder / "m.onnx").exists()
    assert not list((drawn.folder / "seed_6").glob("*.onnx"))
    assert (folder / "stats" / "digits_cnn_digits.yaml").exists()
    assert (folder / "stats" / "digits_cnn_digits_seed7.yaml").exists()


def test_predictions_of_each_image(drawn: Run) -> None:
    table = rows(drawn.folder / "predictions.csv")
    right = {what: sum(row[what] == row["label"] for row in table) for what in ("quantized", "fp32")}
    assert len(table) == len({row["image"] for row in table}) == 500
    for what, count in right.items():
        assert float(drawn.metrics(what)["top1"]) == pytest.approx(count / 5)
    changed = drawn.metrics("quantized")
    flips = dict(pair.split(":") for pair in changed["flips"].split())
    assert sum(map(int, flips.values())) == sum(row["quantized"] != row["fp32"] for row in table)
    assert float(changed["mcnemar_p"]) == mcnemar(int(changed["lost"]), int(changed["won"]))


def test_compare_to(folder: Path, drawn: Run) -> None:
    coarse = good(f"{QUANTIZE} --qe-bits-acts 2 --compare-to {drawn.folder}", folder)
    mine, theirs = (rows(each.folder / "predictions.csv") for each in (coarse, drawn))
    same = sum(a["quantized"] == b["quantized"] for a, b in zip(mine, theirs, strict=True))
    found = coarse.metrics(f"compared to {drawn.folder.name}")
    assert float(found["agreement"]) == pytest.approx(same / 5)
    assert any(line.startswith(f"Agreement with {drawn.folder.name}: {same / 5:.2f} %, ") for line in coarse.lines)
    again = good(f"{DIGITS} -e --compare-to latest_log_dir", folder)
    assert again.metrics(f"compared to {coarse.folder.name}")["lost"] == coarse.metrics("quantized")["won"]


TABLES = {
    "empty": ("", "it is no table of predictions"),
    "header alone": ("image,label,fp32\n", "it is no table of predictions"),
    "no model": ("image,label\na,1\n", "it is no table of predictions"),
    "words": ("image,label,fp32\na,1,cat\n", "it is no table of predictions"),
    "a class below 0": ("image,label,fp32\na,1,-3\n", "it is no table of predictions"),
    "a huge class": ("image,label,fp32\na,1,99999999999999999999\n", "it is no table of predictions"),
    "a short row": ("image,label,fp32\na,1\n", "it is no table of predictions"),
    "other images": ("image,label,fp32\na,1,1\n", "looked at 1 images and this one at 500, which are not the same"),
    "none": (None, "(No such file or directory)"),
}


@pytest.mark.parametrize(("text", "sentence"), TABLES.values(), ids=TABLES)
def test_predictions_that_cannot_be_compared(folder: Path, tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "predictions.csv").write_text(text)
    done = run(f"{DIGITS} -e --compare-to {tmp_path}", folder)
    assert done.code == 2
    assert sentence in done.err
    assert "Traceback" not in done.err
