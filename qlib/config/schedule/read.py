"""Training schedules: which component acts in which epochs, read from YAML as Distiller reads it, but strictly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlib.config.layers.keys import Settings, read_elsewhere, read_fields
from qlib.config.schedule.components import KIND_OF, Declared, read_components
from qlib.config.schedule.dialect import is_distillers
from qlib.config.schedule.keys import LR_POLICY_ARGS, POLICY_FIELDS, Classes
from qlib.config.schedule.pruning_keys import PRUNER_POLICY_ARGS, REGULARIZER_POLICY_ARGS
from qlib.config.schedule.types import Component, PolicySpec, Schedule
from qlib.errors import ConfigError, did_you_mean
from qlib.yaml_tree import MOST_SETTINGS, Node, load_yaml

__all__ = ["load_schedule"]

_SECTIONS = ("version", *KIND_OF, "policies")
_KINDS = tuple(KIND_OF.values())
_POLICY_KEYS = {**dict.fromkeys(_KINDS, read_elsewhere), **POLICY_FIELDS}
POLICY_ARGS = {
    "lr_scheduler": LR_POLICY_ARGS,
    "pruner": PRUNER_POLICY_ARGS,
    "regularizer": REGULARIZER_POLICY_ARGS,
}
"""Kind of component -> the `args` that its policies may have."""

_log = logging.getLogger(__name__)

_SPAN = ("starting_epoch", "ending_epoch", "frequency")


def load_schedule(path: str | Path, epochs: int, classes: Classes) -> Schedule:
    """The schedule in a file, for a run over ``range(start_epoch, epochs)``; `classes` may stand in it.

    A policy may end after the run does, as published schedules do, but it must begin before. That, a key that stands
    twice in a mapping and a component that no policy uses are mistakes in a file of ours, and warnings in one of
    Distiller's, which reads them: the last of two keys counts.

    Raises:
        ConfigError: every mistake in the file, each as `file:line: sentence`.
    """
    doubled: list[str] = []
    root = load_yaml(path, MOST_SETTINGS, doubled)
    distillers = is_distillers(root, tuple(KIND_OF))
    problems = [] if distillers else [f"{each}; keep one" for each in doubled]
    if problems and root.mapping is None:
        raise ConfigError(problems)
    if root.mapping is None:
        raise ConfigError(f"{root.where}: the file holds {root}; allowed: a mapping of {', '.join(_SECTIONS)}")
    for name in root.mapping:
        if name not in _SECTIONS:
            hint = did_you_mean(name, _SECTIONS)
            problems.append(f"{root.where_key(name)}: unknown section {name!r}; allowed: {', '.join(_SECTIONS)}{hint}")
    sections = [(name, node) for name, node in root.mapping.items() if name in KIND_OF]
    declared = [each for name, node in sections for each in read_components(name, node, classes, problems)]
    entries = _entries(root, problems)
    policies = [policy for entry in entries if (policy := _read_policy(entry, declared, problems))]
    idle = [*_late(entries, epochs), *_unused(declared, entries)]
    problems += [] if distillers else idle
    if problems:
        raise ConfigError(problems)
    for each in [*(f"{each}; the last one counts" for each in doubled), *idle]:
        _log.warning("Warning: %s", each)
    return Schedule(tuple(policies), distillers)


def _entries(root: Node, problems: list[str]) -> Sequence[Node]:
    """The nodes of the policies."""
    node = (root.mapping or {}).get("policies")
    if node is not None and isinstance(node.value, tuple) and node.value:
        return node.value
    if node is None or node.value in (None, ()):
        problems.append(f"{root.where}: the file has no policies, so that nothing in it acts; add a list 'policies'")
    else:
        problems.append(f"{node.where}: policies is {node}; allowed: a list")
    return ()


def _late(entries: Sequence[Node], epochs: int) -> Iterator[str]:
    """A sentence for each policy that begins when the run has ended."""
    for node in entries:
        when = read_fields(node, _POLICY_KEYS, [])[0] if node.mapping is not None else {}
        listed = when.get("epochs")
        start = listed[0] if isinstance(listed, tuple) else when.get("starting_epoch")
        if isinstance(start, int) and start >= epochs:
            run = f"the run ends after epoch {epochs - 1} (--epochs {epochs})"
            yield f"{node.where}: the policy begins in epoch {start}, but {run}; begin earlier or raise --epochs"


def _unused(declared: Sequence[Declared], entries: Sequence[Node]) -> Iterator[str]:
    """A sentence for each component that no policy names, unless there are no policies at all."""
    used = {(kind, _name_of(node)) for entry in entries for kind, node in (entry.mapping or {}).items()}
    for each in declared if entries else ():
        kind = KIND_OF[each.section]
        if (kind, each.name) not in used:
            yield f"{each.where}: no policy uses the {kind} {each.name!r}; add one under 'policies' or remove it"


def _name_of(node: Node) -> str | None:
    """The name in a policy's reference to a component; None if there is none."""
    name = (node.mapping or {}).get("instance_name")
    if name is None or name.value is None:
        return None
    return str(name) if isinstance(name.value, (tuple, dict)) else str(name.value)


def _read_policy(node: Node, declared: Sequence[Declared], problems: list[str]) -> PolicySpec | None:
    """One policy; None if it has a mistake, or its component has."""
    if node.mapping is None:
        problems.append(f"{node.where}: a policy is {node}; allowed: a mapping, as of quantizer and starting_epoch")
        return None
    found: list[str] = []
    when, _ = read_fields(node, _POLICY_KEYS, found)
    found += _epoch_problems(node, when)
    kinds = [kind for kind in _KINDS if kind in node.mapping]
    if len(kinds) != 1:
        has = " and ".join(kinds) or "none"
        found.append(f"{node.where}: a policy needs exactly one of {', '.join(_KINDS)}; this one has {has}")
    components = [_find(kind, node.mapping[kind], declared, found) for kind in kinds]
    args = [
        _read_args(kind, node.mapping[kind], component, found)
        for kind, component in zip(kinds, components, strict=True)
    ]
    problems += found
    component = components[0] if components else None
    if found or component is None:
        return None
    start, end, frequency, listed = _span(when)
    return PolicySpec(component, start, end, frequency, listed, args[0], node.where)


def _span(when: Settings) -> tuple[int, int, int, tuple[int, ...] | None]:
    """Start, exclusive end, frequency and listed epochs of a policy.

    >>> _span({"starting_epoch": 2, "ending_epoch": 9}), _span({"epochs": (3, 5)})
    ((2, 9, 1, None), (3, 6, 1, (3, 5)))
    """
    listed = when.get("epochs")
    if isinstance(listed, tuple):
        return listed[0], listed[-1] + 1, 1, listed
    start, end, frequency = (int(str(when.get(key, 1))) for key in _SPAN)
    return start, end, frequency, None


def _epoch_problems(node: Node, when: Settings) -> Iterator[str]:
    """A sentence for each mistake in a policy's epochs; `when` holds those keys of it that have a right value."""
    given = [key for key in POLICY_FIELDS if key in (node.mapping or {})]
    both = [key for key in _SPAN if key in given] if "epochs" in given else []
    missing = [key for key in _SPAN[:2] if key not in given] if "epochs" not in given else []
    if both:
        yield f"{node.where_key(both[0])}: epochs and {both[0]} exclude each other; keep the list or the span"
    if missing:
        need = "epochs, as in [0, 5], or starting_epoch, ending_epoch and frequency"
        yield f"{node.where}: a policy needs {need}; this one has no {' and no '.join(missing)}"
    if both or missing or len(when) < len(given):
        return
    start, end, frequency, _ = _span(when)
    if start >= end:
        yield f"{node.where_key('ending_epoch')}: ending_epoch is {end}; allowed: above starting_epoch, {start}"
    elif frequency > end - start:
        allowed = f"1 to {end - start}, the number of its epochs"
        yield f"{node.where_key('frequency')}: frequency is {frequency}; allowed: {allowed}"


def _find(kind: str, node: Node, declared: Sequence[Declared], problems: list[str]) -> Component | None:
    """The component that a policy names."""
    if node.mapping is not None:
        read_fields(node, {"instance_name": read_elsewhere, "args": read_elsewhere}, problems)
    name = _name_of(node)
    if name is None:
        example = node.value if isinstance(node.value, str) else "NAME"
        problems.append(f"{node.where}: {kind} names no component; write {kind}: {{instance_name: {example}}}")
        return None
    same = [each for each in declared if each.name == name]
    for each in same:
        if KIND_OF[each.section] == kind:
            return each.component
    where = (node.mapping or {})["instance_name"].where
    if same:
        other = f"it is a component of {same[0].section} ({Path(same[0].where).name})"
        problems.append(f"{where}: {name!r} is no {kind}: {other}; write {KIND_OF[same[0].section]}")
    else:
        known = [each.name for each in declared if KIND_OF[each.section] == kind]
        allowed = ", ".join(known) or "none is declared"
        problems.append(f"{where}: there is no {kind} {name!r}; allowed: {allowed}{did_you_mean(name, known)}")
    return None


def _read_args(kind: str, node: Node, component: Component | None, problems: list[str]) -> Settings:
    """The arguments of a policy; those of quantizers and extensions have none."""
    args = (node.mapping or {}).get("args")
    if args is None or args.value is None or component is None:
        return {}
    if kind not in POLICY_ARGS:
        if args.value != {}:
            problems.append(f"{args.where}: a policy of a {kind} takes no args; set them where it is declared")
        return {}
    settings, places = read_fields(args, POLICY_ARGS[kind], problems)
    if component.cls == "ReduceLROnPlateau" and settings.get("per") == "step":
        problems.append(
            f"{places['per']}: ReduceLROnPlateau acts on the results of an epoch; remove per or write epoch"
        )
    if settings.get("mask_gradients") and not settings.get("mask_on_forward_only"):
        problems.append(
            f"{places['mask_gradients']}: mask_gradients has no effect without mask_on_forward_only, as other masks"
            " mask gradients too; add that or remove it"
        )
    return settings
