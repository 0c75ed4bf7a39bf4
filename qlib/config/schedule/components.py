"""Reads the components of a training schedule; the policies that use them are read in `qlib.config.schedule.read`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlib.config.layers.keys import Field, Settings, read_elsewhere, read_fields
from qlib.config.layers.patterns import pattern_problem
from qlib.config.layers.settings import Rule
from qlib.config.schedule.keys import (
    ABSENT_EXTENSIONS,
    BITS,
    LR_REFUSED,
    ONLY_WITH,
    Classes,
    ClassFields,
    override_keys,
)
from qlib.config.schedule.types import Component
from qlib.errors import did_you_mean
from qlib.yaml_tree import Node

__all__ = ["Declared", "KIND_OF", "read_components"]

KIND_OF = {
    "quantizers": "quantizer",
    "lr_schedulers": "lr_scheduler",
    "extensions": "extension",
    "pruners": "pruner",
    "regularizers": "regularizer",
}
"""Section -> what one of its components is called, which is also the key by which a policy names it."""


@dataclass(frozen=True)
class Declared:
    """A name that the file declares; `component` is None if it has a mistake, which has then been reported."""

    section: str
    name: str
    where: str
    component: Component | None


def read_components(section: str, node: Node, classes: Classes, problems: list[str]) -> Iterator[Declared]:
    """The components of one section; mistakes go to `problems`."""
    if node.mapping is None and node.value is not None:
        problems.append(f"{node.where}: {section} is {node}; allowed: a mapping of names to components")
    for name, entry in (node.mapping or {}).items():
        where = node.where_key(name)
        yield Declared(section, name, where, _read_component(section, name, entry, where, classes, problems))


def _read_component(
    section: str, name: str, node: Node, where: str, classes: Classes, problems: list[str]
) -> Component | None:
    cls = (node.mapping or {}).get("class")
    if cls is None:
        allowed = ", ".join(classes[section])
        problems.append(f"{where}: the {KIND_OF[section]} {name!r} has no class; allowed: {allowed}")
        return None
    if not isinstance(cls.value, str):
        problems.append(f"{cls.where}: class is {cls}; allowed: {', '.join(classes[section])}")
        return None
    if problem := _class_problem(section, cls.value, classes):
        problems.append(f"{cls.where}: {problem}")
        return None
    read = _read_quantizer if section == "quantizers" else _read_other
    found: list[str] = []
    settings, rules = read(cls.value, classes[section][cls.value], node, where, found)
    problems += found
    return None if found else Component(section, name, cls.value, settings, rules, where)


def _class_problem(section: str, cls: str, classes: Classes) -> str:
    """Why a class cannot stand in a section; empty if it can."""
    ours = classes[section]
    home = next((other for other, theirs in classes.items() if cls in theirs), section)
    if cls == "PostTrainLinearQuantizer":
        return f"{cls} quantizes without training; use --quantize-eval --qe-config-file with this file"
    if cls in ABSENT_EXTENSIONS:
        return f"{cls} is not available in this version yet; remove it and its policies"
    if cls in LR_REFUSED:
        return f"{cls} {LR_REFUSED[cls]}"
    if home != section:
        return f"class {cls!r} stands in section {section}; move it to {home}"
    if cls not in ours:
        return f"unknown class {cls!r} in section {section}; allowed: {', '.join(ours)}{did_you_mean(cls, ours)}"
    return ""


def _read_quantizer(
    cls: str, arguments: ClassFields, node: Node, where: str, problems: list[str]
) -> tuple[Settings, tuple[Rule, ...]]:
    older = {key: arguments.fields[name] for key, name in BITS.items()}
    tables = {"overrides": override_keys(arguments.fields), "bits_overrides": older}
    keys = {**arguments.fields, **dict.fromkeys((*tables, "class"), read_elsewhere)}
    settings, _ = read_fields(node, keys, problems)
    given = {key: each for key, each in (node.mapping or {}).items() if key in tables}
    if len(given) == len(tables):
        problems.append(f"{node.where_key('bits_overrides')}: overrides and bits_overrides mean the same; keep one")
    rules = [rule for key, each in given.items() for rule in _read_rules(key, each, tables[key], problems)]
    return settings, tuple(rules)


def _read_rules(key: str, node: Node, fields: Mapping[str, Field], problems: list[str]) -> Iterator[Rule]:
    if node.mapping is None and node.value is not None:
        problems.append(f"{node.where}: {key} is {node}; allowed: a mapping of layer names to settings")
    for pattern, entry in (node.mapping or {}).items():
        where = node.where_key(pattern)
        if problem := pattern_problem(pattern):
            problems.append(f"{where}: {problem}")
        settings, places = read_fields(entry, fields, problems)
        yield Rule(pattern, settings, {name: Path(place).name for name, place in places.items()}, where)


def _read_other(
    cls: str, arguments: ClassFields, node: Node, where: str, problems: list[str]
) -> tuple[Settings, tuple[Rule, ...]]:
    """A component that is no quantizer."""
    settings, places = read_fields(node, {**arguments.fields, "class": read_elsewhere}, problems)
    problems += _combination_problems(cls, arguments, node, where)
    milestones, gammas = settings.get("milestones"), settings.get("gammas")
    if isinstance(milestones, tuple) and isinstance(gammas, tuple) and len(milestones) != len(gammas):
        problems.append(f"{places['gammas']}: {len(milestones)} milestones need as many gammas, not {len(gammas)}")
    return settings, ()


def _combination_problems(cls: str, arguments: ClassFields, node: Node, where: str) -> Iterator[str]:
    """What is missing, what excludes each other, and what has no effect without another key."""
    keys = [key for key in node.mapping or {} if key in arguments.fields]
    for choices in arguments.needs:
        given = [key for key in keys if key in choices]
        if not given:
            yield f"{where}: {cls} needs {' or '.join(choices)}; add it"
        elif len(given) > 1:
            yield f"{node.where_key(given[1])}: {given[1]} and {given[0]} exclude each other; keep one"
    for key in keys:
        if key in ONLY_WITH and ONLY_WITH[key] not in keys:
            yield f"{node.where_key(key)}: {key} has no effect without {ONLY_WITH[key]}; add that or remove it"
