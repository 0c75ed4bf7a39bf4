"""Command lines in a folder that is watched: what each leaves behind, and whether it kept the law of all runs.

The law: exit code 0, 1, 2 or 130; no traceback, no Python object and no sentence without end on stderr; nothing
changed but the run's folder, `stats/` and the files that the command line names as its outputs.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from runs import make_images, run, user_model
from safetensors.torch import save_file

from qlib.cli import main
from qlib.data.subset import choose_subset

STATS = "stats/digits_cnn_digits.yaml"
HISTOGRAMS = "stats/digits_cnn_digits.safetensors"
SMALL = "--etes 0.02 --etrs 0.02 --evs 0.1 -b 16"
SCHEDULE = """\
quantizers:
  first:
    class: LSQQuantizer
    bits_activations: 4
    bits_weights: 4
    overrides:
      fc: {bits_weights: 8}
lr_schedulers:
  slower: {class: MultiStepLR, milestones: [1, 2], gamma: 0.1}
extensions:
  kd: {class: KnowledgeDistillation, teacher: digits_cnn, pretrained: true, match: {stem.conv: stem.conv}}
policies:
  - quantizer: {instance_name: first}
    starting_epoch: 0
    ending_epoch: 2
    frequency: 1
  - lr_scheduler: {instance_name: slower}
    epochs: [0]
  - extension: {instance_name: kd}
    starting_epoch: 0
    ending_epoch: 1
"""
SETTINGS = """\
quantizers:
  ptq:
    class: PostTrainLinearQuantizer
    bits_activations: 4
    bits_parameters: 8
    mode: {activations: ASYMMETRIC_UNSIGNED, weights: SYMMETRIC}
    clip_acts: percentile
    clip_percentile: 99.9
    model_activation_stats: stats/digits_cnn_digits.yaml
    overrides:
      stem.*: {bits_weights: 4, input_overrides: {0: {bits_activations: 8}}}
      fc: {fp16: true}
corrections: {rounding: gptq, images: 16, smooth: 0.5}
"""

_ALLOWED = ("work/logs/", "work/stats/", "work/latest_log_", "work/__pycache__/")
_OBJECT = re.compile(r"<[\w.]+ (object )?at 0x|\bNode\(|\btensor\(|<class '|<function |PosixPath\(|OrderedDict\(")
LONGEST = 4000  #: characters of a line on stderr


@dataclass(frozen=True)
class Case:
    """A command line, and files that are written before it runs."""

    kind: str
    words: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a case did; `problem` says how it broke the law, and is empty where it did not."""

    code: object
    err: str
    problem: str
    seconds: float


class Sandbox:
    """A folder `work`, made from a template for each case, beside another that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.template = root, root / "work", root / "template"
        (root / "home").mkdir(parents=True)
        (root / "home" / "precious").write_text("mine")
        _fill(self.template)

    def play(self, case: Case) -> Outcome:
        """Runs a case and judges it."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.template, self.work, symlinks=True)
        for name, content in case.files.items():
            (self.work / name).write_bytes(content)
        before, start = self._snapshot(), time.process_time()
        code, err = self._run(case)
        seconds = time.process_time() - start
        touched = [name for name in self._changes(before) if not self._may(name, case)]
        return Outcome(code, err, _judge(code, err, touched), seconds)

    def _run(self, case: Case) -> tuple[object, str]:
        out, err = io.StringIO(), io.StringIO()
        with self._inside(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: object = main(list(case.words))
            except SystemExit as stop:
                code = stop.code or 0
            except (Exception, KeyboardInterrupt) as error:
                code = type(error).__name__
                traceback.print_exc()
        return code, err.getvalue()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        before, home = Path.cwd(), os.environ.get("HOME")
        os.environ["HOME"] = str(self.root / "home")
        os.chdir(self.work)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                yield
        finally:
            os.chdir(before)
            torch.use_deterministic_algorithms(False)
            if home is not None:
                os.environ["HOME"] = home

    def _snapshot(self) -> dict[str, tuple[int, int, int]]:
        found: dict[str, tuple[int, int, int]] = {}
        for top in (self.work, self.root / "home"):
            for folder, folders, files in os.walk(top):
                for path in (Path(folder, name) for name in (*folders, *files)):
                    state = path.lstat()
                    size = 0 if path.is_dir() else state.st_size
                    mtime = 0 if path.is_dir() else state.st_mtime_ns
                    found[str(path.relative_to(self.root))] = (state.st_mode, size, mtime)
        return found

    def _changes(self, before: Mapping[str, object]) -> list[str]:
        after = self._snapshot()
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    def _may(self, name: str, case: Case) -> bool:
        """Whether a run may change a file: the outputs that it names are those whose names are words of it."""
        outputs = {f"work/{word.partition('=')[2] or word}" for word in case.words}
        named = any(name == each or name.startswith(f"{each}/") or each.startswith(f"{name}/") for each in outputs)
        return f"{name}/".startswith(_ALLOWED) or named


def _judge(code: object, err: str, touched: list[str]) -> str:
    if code not in (0, 1, 2, 130):
        return f"ended with {code}: {err.strip().splitlines()[-1][:300] if err.strip() else ''}"
    if "Traceback" in err:
        return "a traceback on stderr"
    if touched:
        return f"changed {', '.join(touched[:3])}"
    if found := _OBJECT.search(err):
        return f"a Python object in a sentence: {err[max(0, found.start() - 100) : found.end() + 60]}"
    if code == 2 and "error: " not in err:
        return "exit code 2 without a sentence"
    if long := [line for line in err.splitlines() if len(line) > LONGEST]:
        return f"a line of {len(long[0])} characters: {long[0][:200]}"
    return ""


def _fill(folder: Path) -> None:
    """The template: a file of each kind that a command line can name."""
    folder.mkdir()
    small = f"-a digits_cnn --pretrained {SMALL}"
    (folder / "schedule.yaml").write_text(SCHEDULE)
    (folder / "cached.yaml").write_text(SCHEDULE.replace("match: {stem.conv: stem.conv}", "cache: true"))
    (folder / "settings.yaml").write_text(SETTINGS)
    user_model(folder)
    make_images(folder / "images", train=40)
    done = run(f"{small} --quantize-eval --qe-calibration 0.02 --qe-histograms", folder)
    assert done.code == 0, done
    for source, name in {
        "quantized_checkpoint.pth.tar": "quantized.pth.tar",
        "layer_quant_params.yaml": "plan.yaml",
        "configs/run_config.yaml": "run.yaml",
    }.items():
        shutil.copy(done.folder / source, folder / name)
    done = run(f"{small} --compress schedule.yaml --epochs 2", folder)
    assert done.code == 0, done
    shutil.copy(done.folder / "checkpoint.pth.tar", folder / "training.pth.tar")
    assert run(f"{small} --compress cached.yaml --epochs 1", folder).code == 0
    trained = torch.load(done.folder / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    state = {name: value.contiguous() for name, value in trained.items()}
    torch.save({"state_dict": state, "arch": "digits_cnn"}, folder / "float.pth.tar")
    torch.save(state, folder / "legacy.pth.tar", _use_new_zipfile_serialization=False)
    save_file(state, folder / "weights.safetensors")
    (folder / "stop").write_text(str(choose_subset(40, 1.0, 0, shuffled=True)[-1]))
    assert run("-a net.py:brightest images --qe-calibration 1 -b 1", folder).code == 130
    (folder / "stop").unlink()
    shutil.rmtree(folder / "logs")
    for link in ("latest_log_dir", "latest_log_file"):
        (folder / link).unlink()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
