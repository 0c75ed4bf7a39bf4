"""Files of every kind that a run reads, cut short and with flipped bytes: each is refused, or read as what it was.

Plain text that people edit and formats of others without a checksum cannot tell a changed digit: for these only the
first half of the law holds, that nothing but an error of ours is raised.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from qlib.app.policies import read_schedule
from qlib.app.teacher import read_logits
from qlib.checkpoint.corrected import load_weights, save_weights
from qlib.checkpoint.fingerprint import content_hash
from qlib.checkpoint.fit import load_state, model_state
from qlib.checkpoint.quantized import QuantizedHeader, read_header, restore_quantized, save_quantized
from qlib.checkpoint.read import read_checkpoint
from qlib.config.flags.groups import TrainArgs
from qlib.config.layers.resolve import resolve
from qlib.config.layers.settings import PtqConfig
from qlib.errors import QlibError
from qlib.graph import capture
from qlib.lower import lower
from qlib.ptq.planner import layer_infos, plan_post_train_linear
from qlib.quant.plan_file import plan_text, read_plan, write_plan
from qlib.stats.collect import Collector
from qlib.stats.histogram_file import histogram_path
from qlib.stats.stats_file import read_stats, write_stats
from qlib.stats.tensor_stats import ModelStats
from qlib.tensor_file import write_tensors
from qlib.train.best import EpochScore
from qlib.train.loop import Progress, Running, Trainee
from qlib.train.state import TrainingState

__all__ = ["CUTS", "FLIPS", "Kind", "kinds", "measure"]

CUTS, FLIPS = 20, 200
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
FINGERPRINT = {"arch": "net", "samples": 4}
SCHEDULE = """\
lr_schedulers:
  decay: {class: MultiStepLR, milestones: [10, 20], gamma: 0.1}
policies:
  - lr_scheduler: {instance_name: decay}
    starting_epoch: 0
    ending_epoch: 30
    frequency: 1
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file: where one is, and what reads it: a text that stands for all that was read, None for "made anew".

    `checked`: the file tells any damage. `why` says what stands against that.
    """

    path: Path
    read: Callable[[], str | None]
    checked: bool = True
    why: str = ""


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def _training() -> TrainingState:
    model = nn.Linear(4, 3)
    trainee = Trainee.of(TrainArgs(optimizer="adam"), model, list(model.parameters()), [])
    return TrainingState(model, trainee, Progress(), [])


def kinds(folder: Path) -> dict[str, Kind]:
    """Name -> one of each kind, written into the folder."""
    graph = capture(_model(), IMAGES[:2])
    collector = Collector(graph, histograms=True)
    collector.update(IMAGES)
    stats = ModelStats(collector.result(), FINGERPRINT)
    plan = plan_post_train_linear(graph, resolve(PtqConfig(), layer_infos(graph)), stats)
    lowered, state = lower(graph, plan), _model().state_dict()

    files = {
        "float": folder / "float.pth",
        "legacy": folder / "legacy.pth",
        "foreign": folder / "foreign.safetensors",
        "quantized": folder / "quantized.pth.tar",
        "training": folder / "training.pth.tar",
        "statistics": folder / "stats" / "net.yaml",
        "partial": folder / "net.partial.safetensors",
        "corrected": folder / "corrected.safetensors",
        "cache": folder / "cache.safetensors",
        "plan": folder / "plan.yaml",
        "schedule": folder / "schedule.yaml",
    }
    torch.save(state, files["float"])
    torch.save(state, files["legacy"], _use_new_zipfile_serialization=False)
    save_file(state, files["foreign"])
    save_quantized(files["quantized"], QuantizedHeader("net", "images", 3, plan), lowered, {})
    run = _training()
    run.weights(torch.ones(2, 4)).sum().backward()
    run.trainee.optimizer.step()
    run.progress = Progress(2, 3, Running({"Overall Loss": 2.5}, 24))
    run.best[:] = [EpochScore(1, 50.0, 90.0, 1.0, 0.0, 12)]
    run.save(files["training"], {"arch": "net", "dataset": "images", "num_classes": 3}, None)
    write_stats(files["statistics"], stats)
    collector.save(files["partial"], FINGERPRINT)
    save_weights(files["corrected"], graph, "fingerprint")
    write_tensors(files["cache"], {"logits": torch.randn(20, 3)}, "the teacher's logits")
    write_plan(files["plan"], plan)
    files["schedule"].write_text(SCHEDULE)

    def weights(path: Path) -> str:
        model = _model()
        load_state(model, model_state(read_checkpoint(path)), str(path))
        return content_hash(model.state_dict())

    def integers() -> str:
        checkpoint = read_checkpoint(files["quantized"])
        header = read_header(checkpoint, "it")
        restored = restore_quantized(checkpoint, header, capture(_model(), IMAGES[:2]), "it")
        return plan_text(header.plan) + content_hash(restored.state_dict())

    def training() -> str:
        again = _training()
        again.load(read_checkpoint(files["training"]), "it", steps_per_epoch=10)
        return content_hash(again.trainee.optimizer.state_dict()) + repr((again.progress, again.best))

    def partial() -> str | None:
        again = Collector(graph, histograms=True)
        return repr(again.result()) if again.load(files["partial"], FINGERPRINT, total=10) else None

    def corrected() -> str:
        again = capture(_model(), IMAGES[:2])
        load_weights(files["corrected"], again, "fingerprint")
        return content_hash(again.state_dict())

    def logits() -> str | None:
        found = read_logits(files["cache"], (20, 3))
        return None if found is None else content_hash(found)

    no_checksum = "no checksum in the format: another value is another weight"
    edited = "people edit it: another digit is an edit"
    return {
        "float checkpoint": Kind(files["float"], lambda: weights(files["float"])),
        "float checkpoint before torch 1.6": Kind(
            files["legacy"], lambda: weights(files["legacy"]), False, no_checksum
        ),
        "safetensors of others": Kind(files["foreign"], lambda: weights(files["foreign"]), False, no_checksum),
        "quantized checkpoint": Kind(files["quantized"], integers),
        "training checkpoint": Kind(files["training"], training),
        "statistics": Kind(files["statistics"], lambda: repr(read_stats(files["statistics"]))),
        "histograms": Kind(histogram_path(files["statistics"]), lambda: repr(read_stats(files["statistics"]))),
        "partial statistics": Kind(files["partial"], partial),
        "corrected weights": Kind(files["corrected"], corrected),
        "teacher's cache": Kind(files["cache"], logits),
        "plan": Kind(files["plan"], lambda: plan_text(read_plan(files["plan"])), False, edited),
        "schedule": Kind(files["schedule"], lambda: repr(read_schedule(files["schedule"], 40)), False, edited),
    }


def _damages(whole: bytes, cuts: int, flips: int, seed: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    yield from (whole[: len(whole) * part // cuts] for part in range(cuts))
    for _ in range(flips):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= chance.randrange(1, 256)
        yield bytes(damaged)


def measure(kind: Kind, cuts: int = CUTS, flips: int = FLIPS, seed: int = 0) -> Counter[str]:
    """How often a damaged file was `refused`, read as the `same` or as `other`, or raised what is not ours."""
    whole, expected, counts = kind.path.read_bytes(), kind.read(), Counter[str]()
    assert expected is not None
    for damaged in _damages(whole, cuts, flips, seed):
        kind.path.write_bytes(damaged)
        try:
            found = kind.read()
            counts["refused" if found is None else "same" if found == expected else "other"] += 1
        except QlibError:
            counts["refused"] += 1
        except Exception as error:
            counts[f"{type(error).__name__}: {error}"[:100]] += 1
    kind.path.write_bytes(whole)
    return counts
