"""Kills a run of training at random steps, resumes it, and compares every byte of the last checkpoints.

    python benchmarks/resume.py [--kills 20] [--seed 0]

The network of the digits under a schedule with two quantizers, the second of which begins later, distillation and a
learning rate that decays; two epochs and a half are needed for each kill. Exit code 1 if one differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

COMPRESS = Path(__file__).resolve().parents[1] / "compress.py"
STEPS_AN_EPOCH, EPOCHS = 19, 3
WORDS = f"-a digits_cnn --pretrained --compress s.yaml --epochs {EPOCHS} --lr 0.02 -b 64 -p 1 --save-every 0 --cpu -j 0"
SCHEDULE = """\
quantizers:
  linear: {class: QuantAwareTrainRangeLinearQuantizer, bits_activations: 8, bits_weights: 8}
  lsq: {class: LSQPlusQuantizer, bits_activations: 4, bits_weights: 3, rounding: stochastic, dampening: 0.001}
lr_schedulers:
  decay: {class: StepLR, step_size: 1, gamma: 0.5}
extensions:
  teacher: {class: KnowledgeDistillation, teacher: self, temperature: 4}
policies:
  - {quantizer: {instance_name: linear}, starting_epoch: 0, ending_epoch: 3, frequency: 1}
  - {quantizer: {instance_name: lsq}, starting_epoch: 1, ending_epoch: 3, frequency: 1}
  - {extension: {instance_name: teacher}, starting_epoch: 1, ending_epoch: 3, frequency: 1}
  - {lr_scheduler: {instance_name: decay}, starting_epoch: 0, ending_epoch: 3, frequency: 1}
"""


def command(name: str, *more: str) -> list[str]:
    """The command line of a run of this name."""
    return [sys.executable, str(COMPRESS), *WORDS.split(), "--name", name, *more]


def checkpoint(name: str) -> Path:
    """The last checkpoint of a run."""
    (folder,) = Path("logs").glob(f"{name}___*")
    return folder / f"{name}_checkpoint.pth.tar"


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def kill_at(step: int, name: str) -> None:
    """Runs until so many steps are printed, then kills without warning."""
    with subprocess.Popen(command(name), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step -= line.startswith("Epoch: [") and "Overall Loss" in line
            if step == 0:
                process.kill()
                break


def main() -> int:
    """Prints a line for each kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("s.yaml").write_text(SCHEDULE)
        subprocess.run(command("whole"), check=True, stdout=subprocess.DEVNULL)
        expected = torch.load(checkpoint("whole"), weights_only=True)
        for number in range(args.kills):
            step = choose.randrange(1, EPOCHS * STEPS_AN_EPOCH)
            kill_at(step, f"killed{number}")
            resumed = command(f"resumed{number}", "--resume-from", str(checkpoint(f"killed{number}")))
            subprocess.run(resumed, check=True, stdout=subprocess.DEVNULL)
            equal = same(torch.load(checkpoint(f"resumed{number}"), weights_only=True), expected)
            wrong += not equal
            print(f"killed at step {step:2d}: {'the same bytes' if equal else 'OTHER BYTES'}", flush=True)
    print(f"{args.kills - wrong} of {args.kills} ended in the same bytes")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
