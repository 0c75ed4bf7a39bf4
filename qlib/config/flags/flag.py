"""What a row of the flag table is: how it is spelt, what its value may be, and when it has no effect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlib.config.flags.groups import GROUPS
from qlib.config.flags.kinds import Kind
from qlib.config.flags.verb import Verb

__all__ = ["ANY", "Flag", "Ignored", "Need", "Use", "shared"]


@dataclass(frozen=True)
class Use:
    """The verbs that use a flag; beside one of the flags `also`, a verb with several reasons uses it too.

    `otherwise` is why others do not: what does not happen there.
    """

    verbs: tuple[Verb, ...]
    otherwise: str = ""
    also: tuple[str, ...] = ()


ANY = Use(tuple(Verb))


@dataclass(frozen=True)
class Need:
    """A flag has an effect only beside one of `flags`; one of `also` suffices too, but is no advice to give."""

    flags: tuple[str, ...]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ignored:
    """A flag is without effect beside one of `by`, or whatever stands beside it, except beside one of `unless`.

    `why` follows the flag's name in the sentence that says so. In it ``{by}`` is the flag that was found, and
    ``{qe.config_file}`` a setting. A flag with a value, such as ``--optimizer sgd``, is that value of its setting.
    """

    why: str
    by: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """One row of the table: the spellings (the canonical one first), what the value may be, the help.

    A flag that the verb has no `use` for has no effect, nor has one whose `needs` are not all met, or that is
    `ignored`: a run says so. Nothing is said of what the flag itself may not be combined with: that is an error.
    """

    spellings: str
    kind: Kind
    help: str | None
    field: str = ""
    use: Use = ANY
    needs: tuple[Need, ...] = ()
    ignored: tuple[Ignored, ...] = ()

    @property
    def names(self) -> list[str]:
        return self.spellings.split()

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def target(self) -> str:
        """The setting of `RunConfig` that this flag gives; `qe.mode` is the field `mode` of the group `qe`."""
        words = self.name.removeprefix("--").replace("-", "_")
        group, _, rest = words.partition("_")
        return self.field or (f"{group}.{rest}" if group in GROUPS else words)


def shared(
    flags: Iterable[Flag], use: Use = ANY, needs: tuple[Need, ...] = (), ignored: tuple[Ignored, ...] = ()
) -> tuple[Flag, ...]:
    """The flags with the use of all that say none, and with what all need and are ignored beside, before their own."""
    return tuple(
        replace(
            each,
            use=use if each.use is ANY else each.use,
            needs=(*needs, *each.needs),
            ignored=(*ignored, *each.ignored),
        )
        for each in flags
    )
