"""The pruning methods, as their files register them: names, what each needs. None is imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qlib.config.flags.kinds import Kind
from qlib.registry import registered

__all__ = ["PRUNERS", "REPAIRS", "SCOPES", "PrunerFacts", "pattern"]

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


def pattern() -> Kind:
    """N of each M, as text."""

    def read(text: str) -> str:
        found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError
        return text

    return Kind(read, "N:M, N of each M weights that are kept, such as 2:4 or 4:8", "N:M")
