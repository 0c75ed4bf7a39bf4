"""Training from scratch beside plain torch code: the same losses, epoch by epoch, and the same weights to the bit.

    python benchmarks/scratch.py ../shared [--epochs 2] [--share 0.25]

resnet20 of CIFAR-10 on the JPEG images under schedules/train_resnet20_cifar.yaml, whose milestones are those of the
ancestor's baseline. The plain loop reads the images as our loader gives them; all else is torch's own.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn

from qlib.cli import main as compress
from qlib.data.augmented import augmented
from qlib.data.datasets import open_dataset
from qlib.data.loader import make_loader
from qlib.data.subset import epoch_order
from qlib.models import create_model, find_model
from qlib.models.transforms import training_transform

SCHEDULE = Path(__file__).resolve().parents[1] / "schedules" / "train_resnet20_cifar.yaml"
BATCH = 128


def plain(folder: Path, epochs: int, share: float) -> tuple[nn.Module, list[float]]:
    """The model and the mean loss of each epoch, as anyone would write it."""
    spec = find_model("resnet20_cifar")
    torch.manual_seed(0)
    model = create_model(spec, num_classes=10).to(memory_format=torch.channels_last).train()
    data = open_dataset("cifar10", folder, "train", spec.transform, num_classes=10)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.MultiStepLR(sgd, [82, 123], 0.1)
    means = []
    for epoch in range(epochs):
        images = augmented(data, training_transform(spec, "cifar10"), 0, epoch)
        order, total = epoch_order(range(len(data)), share, 0, epoch), 0.0
        for batch, labels in make_loader(images, batch_size=BATCH, indices=order):
            loss = F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), labels)
            sgd.zero_grad()
            torch.autograd.backward(loss)
            sgd.step()
            total += loss.item() * len(labels)
        rates.step()
        means.append(total / len(order))
    return model, means


def main() -> None:
    """Prints the losses, and whether the weights are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.25, help="of the training images, in each epoch")
    args = parser.parse_args()
    folder = args.shared.resolve() / "data" / "cifar10-jpeg"
    model, means = plain(folder, args.epochs, args.share)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(out)
        words = f"-a resnet20_cifar {folder} --lr 0.1 -b {BATCH} --vs 0 --etrs {args.share} --evs 0.02 --etes 0.02"
        code = compress([*words.split(), "--epochs", str(args.epochs), "--compress", str(SCHEDULE), "--cpu", "-j", "0"])
        assert code == 0
        (run,) = Path("logs").iterdir()
        rows = list(csv.DictReader((run / "training.csv").open(newline="")))
        state = torch.load(run / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    table = [[row["epoch"], row["train Objective Loss"], mean] for row, mean in zip(rows, means, strict=True)]
    print(tabulate(table, ["epoch", "loss", "plain torch"], tablefmt="github", floatfmt=".12g"))
    equal = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    print(f"weights: {'the same, to the bit' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
