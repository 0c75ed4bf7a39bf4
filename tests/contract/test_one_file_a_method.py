"""The promise: a new method is one new file, a new layer kind one file and one row of the table of kinds.

Each of `one_file/` is put into a copy of the package, and is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

PLACES = {
    "octav.py": "clip",
    "sawb.py": "qat/methods",
    "stochastic.py": "correct",
    "winsorize.py": "correct",
    "sigmoid.py": "lower/ops",
}
EXAMPLES = Path(__file__).resolve().parents[1] / "one_file"
ROW = '    LayerKind("sigmoid", (nn.Sigmoid,), _BYTES, onnx=("Sigmoid",)),\n'
DIGITS = ("-a", "digits_cnn", "--pretrained", "--cpu")

SCHEDULE = """\
quantizers:
  q: {class: SAWBQuantizer, bits_activations: 4, bits_weights: 3, range_factor: 1.25}
policies:
  - {quantizer: {instance_name: q}, epochs: [0]}
"""
SETTINGS = """\
quantizers:
  q: {class: PostTrainLinearQuantizer, clip_acts: octav, clip_octav_steps: 3}
corrections: {rounding: stochastic, winsorize: 0.9}
"""
PROGRAM = """
import doctest
import qlib.clip.octav
print(doctest.testmod(qlib.clip.octav).failed)
from qlib.app.policies import read_schedule
from qlib.config.layers.read import load_ptq_config
from qlib.errors import ConfigError
from qlib.ptq.activation_ranges import plan_tensor
from qlib.stats.histogram import Histogram
from qlib.stats.tensor_stats import TensorStats
try:
    read_schedule("wrong.yaml", 1)
except ConfigError as error:
    print(error)
config = load_ptq_config("q.yaml")
print(config.corrections)
seen = Histogram(0.0, 0.25, (250, 250, 250, 249, *[0] * 35, 1))
stats = TensorStats(count=1000, samples=1, min=0.0, max=10.0, histogram=seen)
print(*(plan_tensor(stats, config.defaults.with_settings({"clip_octav_steps": n}, {}), False).max for n in (1, 9)))
"""

KINDS = """
import torch
from torch import nn
from qlib.config.layers.settings import LayerSettings
from qlib.graph import fold, kind_of
from qlib.lower import lower
from qlib.lower.fake import lower_fake
from qlib.lower.qdq import lower_qdq
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan_file import plan_from_text, plan_text
from qlib.report.tables import arithmetic_lines
from qlib.stats.collect import Collector
from qlib.stats.tensor_stats import ModelStats
torch.manual_seed(0)
images = torch.randn(4, 3, 8, 8)
graph = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 2)), images).graph
collector = Collector(graph)
collector.update(images)
for bits in (8, 12):
    settings = LayerSettings(mode_activations="asym_u", bits_activations=bits)
    each = {info.name: settings for info in layer_infos(graph)}
    plan = plan_post_train_linear(graph, each, ModelStats(collector.result()))
    assert plan_from_text(plan_text(plan), "plan") == plan
    exact = lower(graph, plan)
    print(plan.layers["1"].kind, type(exact.get_submodule("1")).__name__)
    print(*arithmetic_lines(graph, plan), sep="; ")
    for other in (lower_fake(graph, plan), lower_qdq(exact), graph):
        print(float((other(images) - exact(images)).detach().abs().max()) < 0.05)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and all examples in it."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "qlib", folder / "qlib", ignore=shutil.ignore_patterns("__pycache__"))
    for name, place in PLACES.items():
        shutil.copy(EXAMPLES / name, folder / "qlib" / place)
    kinds = folder / "qlib/graph/kinds.py"
    before, move, after = kinds.read_text().partition('    LayerKind("move"')
    kinds.write_text(before + ROW + move + after)
    return folder


def answer(package: Path, *words: str) -> str:
    """What a command line prints, or a program if the first word is `-c`."""
    command = words if words[0] == "-c" else ("-c", "import sys; from qlib.cli import main; sys.exit(main())", *words)
    run = subprocess.run(
        [sys.executable, *command],
        cwd=package,
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return run.stdout + run.stderr


def test_every_example_has_a_place() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} - {"conftest.py"} == set(PLACES)


def test_contributing_quotes_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert ROW.strip() in text
    sections = re.findall(r"^### (.+)$([^#]+)", text, re.MULTILINE)
    assert len(sections) == 4
    for title, section in sections:
        files = re.findall(r"`qlib/([\w/]+)/(\w+\.py)`", title)
        assert all(PLACES[name] == place for place, name in files)
        code = "".join((EXAMPLES / name).read_text() for _, name in files)
        quoted = re.findall(r"```python\n(.+?)```", section, re.DOTALL)
        assert quoted
        assert [each for each in quoted if each not in code] == []


def test_help_offers_them(package: Path) -> None:
    text = " ".join(answer(package, "--help").split())
    assert "lp,auto,octav}" in text
    assert "--qe-clip-octav-steps F Newton steps of octav (default: 10.0)" in text
    assert "{nearest,gptq,adaround,brecq,qdrop,stochastic}" in text
    assert "--ptq-winsorize SHARE clamp the weights" in text


def test_a_value_that_is_out_of_bounds_is_an_error(package: Path) -> None:
    text = answer(package, *DIGITS, "--qe", "--qeca", "octav", "--qe-clip-octav-steps", "0")
    assert "--qe-clip-octav-steps '0' is not allowed: it must be a number from 1 to 100" in text


def test_yaml_knows_them_and_a_parameter_reaches_the_method(package: Path) -> None:
    (package / "wrong.yaml").write_text(SCHEDULE.replace("1.25", "-1"))
    (package / "q.yaml").write_text(SETTINGS)
    failed, wrong, corrections, ranges = answer(package, "-c", PROGRAM).splitlines()
    assert failed == "0"
    assert wrong == "wrong.yaml:2: range_factor is -1; allowed: a number above 0"
    assert corrections == "{'winsorize': 0.9, 'rounding': 'stochastic'}"
    first, last = map(float, ranges.split())
    assert 0 < first < last <= 10


def test_a_run_plans_and_corrects_with_them(package: Path) -> None:
    flags = "--qe --qe-calibration 0.1 --qeca octav --qe-clip-octav-steps 5 --ptq-winsorize 0.9"
    run = answer(package, *DIGITS, *flags.split(), "--ptq-rounding", "stochastic")
    assert "Winsorized stem.conv: " in run
    assert "Corrections changed" in run
    (plan,) = package.glob("logs/*/layer_quant_params.yaml")
    assert "clip: octav" in plan.read_text()


def test_a_schedule_trains_with_it(package: Path) -> None:
    (package / "s.yaml").write_text(SCHEDULE)
    run = answer(package, *DIGITS, "--epochs", "1", "--lr", "0.01", "--compress", "s.yaml", "--etrs", "0.2")
    assert re.search(r"SAWBQuantizer quantizes [1-9]\d* layers from epoch 0 on", run), run
    assert "--- test" in run


def test_a_layer_kind_is_planned_lowered_and_reported(package: Path) -> None:
    in_integers, all_of_it, *close, in_float, most_of_it, a, b, c = answer(package, "-c", KINDS).splitlines()
    assert in_integers == "sigmoid ExactSigmoid"
    assert all_of_it == "100.0 % of the multiply-accumulates are computed in integers: 3 of 3 layers"
    assert in_float == "sigmoid FloatOp"
    assert most_of_it == (
        "100.0 % of the multiply-accumulates are computed in integers: 2 of 3 layers;   in float: the integer"
        " form is that of at most 8 bits: 1 layer (1)"
    )
    assert [*close, a, b, c] == ["True"] * 6
