"""Sums of two products that leave 16 bits, and by how much: found where large weights meet large codes.

Both are rare, and the large codes of two neighbouring channels serve all weights on these channels, of any output
channel and kernel position. So a layer costs little more than one look at its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MAX_EXCESS", "Pairs", "Window", "hazardous_pairs"]

_LOW, _HIGH = -(2**15), 2**15 - 1
MAX_EXCESS = 2 * 255 * 128 + _LOW
"""No sum of two products leaves 16 bits by more."""


def hazardous_pairs(weight: Tensor, top: int) -> Tensor:
    """``[P, 2]``, the output channel and the pair, counted along the summed axis, that can leave 16 bits.

    `weight` are the deployed int8 codes ``[out, in / groups, ...]``, the input's deployed codes are ``0 .. top``: a
    pair is a hazard where ``top * (max(w0, 0) + max(w1, 0)) > 32767`` or ``top * (min(w0, 0) + min(w1, 0)) < -32768``.
    One product alone stays within 16 bits, so neither weights of two signs nor the odd last one can be.

    >>> hazardous_pairs(torch.tensor([[64, 64, 65, 64, 127, -128, 127]], dtype=torch.int8), 255).tolist()
    [[0, 1]]
    """
    summed = _summed_axis(weight).to(torch.int16)
    first, second = summed[:, :-1:2], summed[:, 1::2]
    highest, lowest = first.clamp(min=0) + second.clamp(min=0), first.clamp(max=0) + second.clamp(max=0)
    return ((highest > _HIGH // max(top, 1)) | (lowest < -(-_LOW // max(top, 1)))).nonzero()


def _summed_axis(weight: Tensor) -> Tensor:
    """``[out, K]``, in the order of the kernels: by kernel position, then by channel."""
    return weight.flatten(2).transpose(1, 2).flatten(1) if weight.ndim > 2 else weight


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution, one entry for each axis; a linear layer is one over a single position.

    `pads` are (before, after).
    """

    kernel: tuple[int, ...] = (1,)
    stride: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (1,)
    pads: tuple[tuple[int, int], ...] = ((0, 0),)
    groups: int = 1

    def offsets(self, position: Tensor) -> Tensor:
        """``[axes, ...]``: how far from the window's corner the kernel positions ``[...]`` read.

        >>> Window((2, 3), (1, 1), (1, 4), ((0, 0), (0, 0))).offsets(torch.tensor([2, 3])).tolist()
        [[0, 1], [8, 0]]
        """
        steps = zip(torch.unravel_index(position, self.kernel), self.dilation, strict=True)
        return torch.stack([index * step for index, step in steps])

    def padded(self, codes: Tensor) -> Tensor:
        """Centered codes with their zeros around them."""
        flat = [pad for pads in reversed(self.pads) for pad in pads]
        return F.pad(codes, flat) if any(flat) else codes


@dataclass(frozen=True)
class Pairs:
    """Hazards that read their codes in the same way: the first at places ``phase + stride * i``, the other `shift` on.

    They are sorted by the two channels that they read, ``[2, Q]``: those of column i stand from ``starts[i]`` to
    ``starts[i + 1]`` in `weight` ``[2, P]``, `out` ``[P]`` and `step` ``[axes, P]``. The codes at i, times a pair of
    weights, belong to the accumulator at ``i - step`` of output channel `out`.
    """

    phase: tuple[int, ...]
    shift: tuple[int, ...]
    channels: Tensor
    starts: tuple[int, ...]
    weight: Tensor
    out: Tensor
    step: Tensor

    @classmethod
    def of(cls, codes: Tensor, top: int, window: Window) -> list[Pairs]:
        """All of `hazardous_pairs`."""
        out, pair = hazardous_pairs(codes, top).T
        if not len(out):
            return []
        tap, width = torch.stack([2 * pair, 2 * pair + 1]), codes.shape[1]
        channel = out // (len(codes) // window.groups) * width + tap % width
        weight, offset = _summed_axis(codes)[out, tap].float(), window.offsets(tap // width)
        stride = torch.tensor(window.stride, device=out.device)[:, None]
        step, readings = offset[:, 0] // stride, torch.cat([offset[:, 0] % stride, offset[:, 1] - offset[:, 0]])
        kinds, kind = torch.unique(readings, dim=1, return_inverse=True)
        found = []
        for index, reading in enumerate(kinds.T.tolist()):
            chosen = (kind == index).nonzero()[:, 0]
            chosen = chosen[channel[0, chosen].argsort()]
            channels, counts = torch.unique_consecutive(channel[:, chosen], dim=1, return_counts=True)
            starts = (0, *counts.cumsum(0).tolist())
            phase, shift = tuple(reading[: len(stride)]), tuple(reading[len(stride) :])
            found.append(cls(phase, shift, channels, starts, weight[:, chosen], out[chosen], step[:, chosen]))
        return found

    def saturations(self, codes: Tensor, zero_point: int, window: Window) -> Iterator[tuple[Tensor, ...]]:
        """Sums beyond 16 bits over the padded centered `codes` ``[N, C, ...]``, deployed as ``codes + zero_point``.

        Yields excess, sample, output channel, and the place on each axis, which may lie outside; they may repeat.
        """
        both = self._read(codes, window.stride)
        bounds = zip(self.starts[:-1], self.starts[1:], strict=True)
        largest = torch.stack([self.weight[:, start:end].abs().amax(1) for start, end in bounds], 1)
        first, second = largest.view(2, -1, *[1] * (codes.ndim - 1))
        large = both[0] * first + both[1] * second > _HIGH - zero_point * (first + second)
        values = [part[large] + zero_point for part in both]
        places = large.nonzero().T[1:].contiguous()
        end = 0
        for pair, count in enumerate(large.flatten(1).sum(1).tolist()):
            start, end, hazards = end, end + count, slice(*self.starts[pair : pair + 2])
            a, b = (value[start:end, None] * weight[hazards] for value, weight in zip(values, self.weight, strict=True))
            sums = a.add_(b)
            excess = sums - sums.clamp(_LOW, _HIGH)
            place, which = excess.nonzero(as_tuple=True)
            if len(place):
                sample, *at = (axis[start:end].index_select(0, place) for axis in places)
                steps = (step.index_select(0, which) for step in self.step[:, hazards])
                moved = (index - step for index, step in zip(at, steps, strict=True))
                yield excess[place, which], sample, self.out[hazards].index_select(0, which), *moved

    def _read(self, codes: Tensor, stride: tuple[int, ...]) -> list[Tensor]:
        """The codes of either channel, ``[Q, N, ...]``, at the places that are read."""
        shifts, axes = [-shift for shift in self.shift], list(range(2, codes.ndim))
        moved = codes.roll(shifts, axes) if any(shifts) else codes  # what wraps around is beyond the last window
        every = (slice(start, None, step) for start, step in zip(self.phase, stride, strict=True))
        places = (slice(None), slice(None), *every)
        both = zip((codes, moved), self.channels, strict=True)
        return [part[places].transpose(0, 1).index_select(0, channel) for part, channel in both]
