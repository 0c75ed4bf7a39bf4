"""The pruning methods, as their files register them: names, what each needs. None is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qlib.config.flags.kinds import Kind
from qlib.registry import registered

__all__ = ["CHANNEL_PRUNERS", "PRUNERS", "REPAIRS", "SCOPES", "ChannelBudget", "PrunerFacts", "budget", "pattern"]

SCOPES = ("row", "layer", "global")
"""Where weights are compared with each other."""

REPAIRS = ("none", "norms", "weights", "logits")
"""What a pruned model gets back, each with those before it."""


@dataclass(frozen=True)
class PrunerFacts:
    """What a registration says: the `scope` of its own, and whether it looks at `images`."""

    scope: str
    images: bool = False


PRUNERS: Mapping[str, PrunerFacts] = {
    name: PrunerFacts(facts["scope"], facts.get("images", False))
    for name, facts in registered("qlib.prune.methods").items()
}
"""Name -> facts, in the order of `--help`."""


CHANNEL_PRUNERS: Mapping[str, bool] = {
    name: bool(facts["images"]) for name, facts in registered("qlib.prune.channels").items()
}
"""Name of a method that removes channels -> whether it looks at images."""


@dataclass(frozen=True)
class ChannelBudget:
    """What a model may cost after channels went: a share of its multiply-accumulates or parameters, or bytes of these.

    >>> ChannelBudget.of("macs=0.5").limit(1000), ChannelBudget.of("params=2MB").limit(1000)
    (500.0, 500000.0)
    """

    of_macs: bool
    amount: float
    bytes: bool

    @classmethod
    def of(cls, text: str) -> ChannelBudget:
        """The budget that a text spells. Raises ValueError for any other text."""
        found = re.fullmatch(r"(macs|params)=(\d*\.?\d+)(?:([kmg]?)b)?", text.lower())
        if found is None or (found[3] is not None and found[1] == "macs") or not 0 < float(found[2]) < 1e12:
            raise ValueError(text)
        if found[3] is None and float(found[2]) >= 1:
            raise ValueError(text)
        return cls(found[1] == "macs", float(found[2]) * _PREFIX[found[3] or ""], found[3] is not None)

    def limit(self, whole: int) -> float:
        """The most multiply-accumulates or parameters, of a model that has `whole`."""
        return self.amount / 4 if self.bytes else self.amount * whole

    def text(self, cost: int, whole: int) -> str:
        """A cost in the same unit."""
        name = "macs" if self.of_macs else "params"
        return f"{name}={4 * cost / 1e6:.4g}MB" if self.bytes else f"{name}={cost / whole:.4g}"


_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def budget() -> Kind:
    """A budget of channels, as text."""

    def read(text: str) -> str:
        ChannelBudget.of(text)
        return text.lower()

    return Kind(read, "macs=0.5 or params=0.5, a share above 0 and below 1, or params=2MB", "BUDGET")


def pattern() -> Kind:
    """N of each M, as text."""

    def read(text: str) -> str:
        found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError
        return text

    return Kind(read, "N:M, N of each M weights that are kept, such as 2:4 or 4:8", "N:M")
