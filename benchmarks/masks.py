"""What masks cost in a step of training, next to one without: resnet20 of CIFAR-10, random images.

    python benchmarks/masks.py [--batch-size 128] [--rounds 10] [--level 0.8]

Each round times a step without masks, with masks that last, and with a regularizer; the ratio is that of the medians of
the time that the process had the CPU for, which other processes move less than the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from tabulate import tabulate

from qlib.config.flags.groups import TrainArgs
from qlib.config.schedule.types import Component, PolicySpec
from qlib.graph import lay_out
from qlib.models import create_model, find_model
from qlib.prune.magnitude import smallest_elements_mask
from qlib.regularize._base import REGULARIZERS
from qlib.train.loop import Running, StepSettings, Trainee, backward, forward
from qlib.train.masking import Masking
from qlib.train.policy import Batch, Policy
from qlib.train.regularizing import Regularizing

SETTINGS = StepSettings(batch_size=64, seed=0, print_freq=1)


def stepper(policies: Callable[[Masking], Sequence[Policy]], level: float, batch: Batch) -> Callable[[], float]:
    """One step of training, which answers its seconds."""
    model = lay_out(create_model(find_model("resnet20_cifar")))
    masking = Masking(model, {})
    trainee = Trainee.of(TrainArgs(lr=1e-3), model.train(), list(model.parameters()), policies(masking))
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and level:
            masking.set(name, smallest_elements_mask(weight, level))

    def step() -> float:
        start = time.process_time()
        losses = forward(trainee, batch, SETTINGS, Running())
        backward(trainee, batch, losses, SETTINGS, torch.amp.GradScaler("cpu", enabled=False))
        return time.process_time() - start

    return step


def lasso(masking: Masking) -> Sequence[Policy]:
    """A group lasso of the filters of all convolutions."""
    names = {f"layer{i}.{j}.conv{k}.weight": (1e-4, "Filters") for i in (1, 2, 3) for j in (0, 1, 2) for k in (1, 2)}
    spec = PolicySpec(Component("regularizers", "r", "GroupLassoRegularizer", {}), 0, 1)
    regularizer = REGULARIZERS["GroupLassoRegularizer"](reg_regims=names)  # type: ignore[call-arg]
    return [Regularizing(spec, regularizer, regularizer.names, masking), masking]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--level", type=float, default=0.8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    batch = Batch(0, 0, list(range(args.batch_size)), images, torch.randint(10, (args.batch_size,)))
    steps = {
        "without masks": stepper(lambda masking: [], 0.0, batch),
        f"masks, {args.level:.0%} pruned": stepper(lambda masking: [masking], args.level, batch),
        "group lasso, no masks": stepper(lasso, 0.0, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            times[name].append(step())
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    rows = [[name, 1000 * median, median / medians["without masks"]] for name, median in medians.items()]
    print(tabulate(rows, ["step", "ms", "ratio"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
