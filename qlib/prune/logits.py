"""The last repair: all that is left learns the logits of the model that was pruned, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from qlib.progress import track
from qlib.prune.masks import apply_masks

__all__ = ["match_logits"]

_RATE = 1e-3


def match_logits(
    pruned: nn.Module,
    dense: Callable[[Tensor], Tensor],
    masks: Mapping[str, Tensor],
    batches: Iterable[Tensor],
    steps: int,
) -> None:
    """Changes the weights of `pruned`, in evaluation mode, by ``min mean (logits - dense logits)^2`` on images.

    Adam, whose rate falls to 0 along a cosine; what the masks zero stays zero, and batch-norm statistics stay.

    References: Frantar and Alistarh, "Optimal brain compression", 2022, appendix (global correction).
    """
    pruned.eval()
    optimizer = torch.optim.Adam([each for each in pruned.parameters() if each.requires_grad], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shown = {"Error": 0.0}
    for images in track(
        itertools.islice(batches, steps), total_images=steps, batch_size=1, description="Matching logits",
        print_freq=max(1, steps // 10), fields=lambda: shown, count=lambda _: 1, unit="steps",
    ):  # fmt: skip
        with torch.no_grad():
            wanted = dense(images)
        error = (pruned(images) - wanted).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        apply_masks(pruned, masks)
        shown["Error"] = float(error.detach())
