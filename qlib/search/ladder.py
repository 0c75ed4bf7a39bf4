"""The ladder that `--auto` climbs: what is tried, from cheap to dear, and which trial is the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["RUNGS", "Judgement", "Rung", "Target", "best_of", "sensitive_layers"]


@dataclass(frozen=True)
class Rung:
    """One step up: the settings that it changes in the best trial so far, by their names.

    `separable`: only where a layer has ranges per channel that differ much may it help: depthwise layers, or weights
    that share one scale. `few_bits`: only below 8 bits. `sensitive`: it gives the sensitive layers 8 bits.
    """

    name: str
    changes: Mapping[str, object]
    separable: bool = False
    few_bits: bool = False
    sensitive: bool = False


RUNGS: tuple[Rung, ...] = (
    Rung("as asked", {}),
    Rung("asym_u activations, sym weights", {"qe.mode_acts": "asym_u", "qe.mode_wts": "sym", "qe.per_channel": True}),
    Rung("ranges auto", {"qe.clip_acts": "auto"}),
    Rung("weight ranges mse", {"qe.clip_wts": "mse"}, few_bits=True),
    Rung("bias correction", {"ptq.bias_correction": "empirical"}),
    Rung("equalization", {"ptq.equalize": True}, separable=True),
    Rung("gptq", {"ptq.rounding": "gptq"}),
    Rung("sensitive layers at 8 bits", {}, few_bits=True, sensitive=True),
    Rung("brecq", {"ptq.rounding": "brecq"}),
)
"""From cheap to dear; each stands on the best so far.

Weights stay symmetric: with zero points, ONNX Runtime's depthwise convolutions take many times as long.
"""


@dataclass(frozen=True)
class Judgement:
    """A trial on images that it never saw, against the float model.

    `agreement` and the `drop` of Top1 in percent; `divergence` is the mean Kullback-Leibler divergence, in nats, of the
    predicted distribution from that of the float model.
    """

    agreement: float
    drop: float
    divergence: float


@dataclass(frozen=True)
class Target:
    """What is good enough: an agreement of at least `agree`, a drop of at most `drop`, whichever are given."""

    agree: float | None = None
    drop: float | None = None

    def met(self, judgement: Judgement) -> bool:
        """Whether a trial reaches it.

        >>> Target(agree=98.0).met(Judgement(98.0, 1.5, 0.01)), Target(drop=0.5).met(Judgement(98.0, 1.5, 0.01))
        (True, False)
        """
        enough = self.agree is None or judgement.agreement >= self.agree
        return enough and (self.drop is None or judgement.drop <= self.drop)

    def missing(self, judgement: Judgement) -> str:
        """What a trial has of what it does not reach; the empty text where it reaches all.

        >>> Target(agree=99.0, drop=0.5).missing(Judgement(98.0, 0.25, 0.01))
        'agreement 98.00 % of 99 %'
        """
        parts = []
        if self.agree is not None and judgement.agreement < self.agree:
            parts.append(f"agreement {judgement.agreement:.2f} % of {self.agree:g} %")
        if self.drop is not None and judgement.drop > self.drop:
            parts.append(f"Top1 {judgement.drop:.2f} lower, where {self.drop:g} is allowed")
        return " and ".join(parts)

    def __str__(self) -> str:
        parts = [f"agreement {self.agree:g} %"] if self.agree is not None else []
        parts += [f"Top1 at most {self.drop:g} lower"] if self.drop is not None else []
        return " and ".join(parts)


def best_of(judgements: Sequence[Judgement]) -> int:
    """The index of the trial with the least divergence, of equal ones the first (the cheapest).

    Divergence and not agreement: a hundred images tell agreement to a percent, and the divergence of each counts.

    >>> best_of([Judgement(97, 0, 0.02), Judgement(98, 0, 0.01), Judgement(99, 0, 0.01)])
    1
    """
    return min(range(len(judgements)), key=lambda index: judgements[index].divergence)


def sensitive_layers(divergences: Mapping[str, float], share: float = 0.5, most: float = 0.25) -> list[str]:
    """The layers that suffer most from few bits: those that make up `share` of all divergence, `most` of all layers.

    >>> sensitive_layers({"conv1": 0.5, "a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.1, "f": 0.1, "fc": 0.3})
    ['conv1', 'fc']
    """
    ranked = sorted(divergences, key=lambda name: -divergences[name])
    total, found, chosen = sum(divergences.values()), 0.0, []
    for name in ranked[: max(1, int(most * len(ranked)))]:
        if found >= share * total:
            break
        found += divergences[name]
        chosen.append(name)
    return chosen
