"""All that a command line can say, as one frozen value that is saved with the run and repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from qlib.config.flags.corrections import CORRECTION_FLAGS, Switches
from qlib.config.flags.groups import (
    BITS_CHOICES,
    GROUPS,
    AutoArgs,
    KdArgs,
    LapqArgs,
    PruneArgs,
    PtqArgs,
    QuantArgs,
    TrainArgs,
)
from qlib.errors import ConfigError, did_you_mean
from qlib.quant.clip_names import CLIP_PARAMETERS, ClipParameters
from qlib.yaml_tree import MOST_SETTINGS, Node, load_yaml

__all__ = ["RunConfig", "config_from_names", "read_run_config", "settings_by_name"]

_MAPPINGS: Mapping[str, tuple[Mapping[str, object], type]] = {
    "clip_parameters": ({key: each.default for key, each in CLIP_PARAMETERS.items()}, ClipParameters),
    "switches": ({name: each.default for name, each in CORRECTION_FLAGS.items() if not each.choice}, Switches),
}
"""Fields of groups that are mappings -> their keys with the defaults, and the type: each key is a setting."""


@dataclass(frozen=True)
class RunConfig:
    """What one run does. A field is named as its flag; `given` holds the flags that the user wrote.

    `repeated` are those of which only the last value counts, `repeats` is the file of `--run-config`: no settings.

    Law: the file that `to_yaml` makes, passed as `--run-config`, gives an equal `RunConfig`.
    """

    data: Path | None = None
    arch: str = "resnet18"
    pretrained: bool = False
    resume_from: Path | None = None
    exp_load_weights_from: Path | None = None
    thinnify: bool = False
    dataset: str | None = None
    workers: int = 4
    batch_size: int = 256
    validation_split: float = 0.1
    effective_train_size: float = 1.0
    effective_valid_size: float = 1.0
    effective_test_size: float = 1.0
    skip_corrupt: bool = False
    evaluate: bool = False
    confusion: bool = False
    activation_stats: tuple[str, ...] = ()
    activation_histograms: float | None = None
    param_hist: bool = False
    masks_sparsity: bool = False
    save_untrained_model: bool = False
    compare_to: Path | None = None
    compare: tuple[Path, ...] = ()
    engine: str = "torch"
    summary: tuple[str, ...] = ()
    check: bool = False
    print_freq: int = 10
    verbose: bool = False
    name: str | None = None
    out_dir: Path = Path("logs")
    no_report: bool = False
    gpus: tuple[int, ...] | None = None
    cpu: bool = False
    load_serialized: bool = False
    seed: int = 0
    deterministic: bool = False
    prune: PruneArgs = field(default_factory=PruneArgs)
    quantize_eval: bool = False
    seeds: int = 1
    automatic: bool = False
    auto: AutoArgs = field(default_factory=AutoArgs)
    qe: QuantArgs = field(default_factory=QuantArgs)
    ptq: PtqArgs = field(default_factory=PtqArgs)
    lapq: LapqArgs = field(default_factory=LapqArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    kd: KdArgs = field(default_factory=KdArgs)
    sense: str | None = None
    sense_range: tuple[float, ...] = (0.0, 0.95, 0.05)
    sense_bits: tuple[int, ...] = BITS_CHOICES
    sense_images: int = 256
    export_onnx: Path | None = None
    export_opset: int | None = None
    export_encodings: tuple[str, ...] = ()
    verify: int | None = None
    given: frozenset[str] = frozenset()
    repeated: frozenset[str] = field(default=frozenset(), compare=False)
    repeats: Path | None = field(default=None, compare=False)

    @property
    def trains(self) -> bool:
        """Whether the flags ask for training: by a schedule, by how long it shall go on, or by a learning rate."""
        return self.train.compress is not None or not self.given.isdisjoint(("--epochs", "--lr"))

    @property
    def wants_onnx(self) -> bool:
        """Whether the run makes an ONNX file."""
        return self.export_onnx is not None or self.verify is not None or self.engine == "onnxruntime"

    @property
    def exports(self) -> bool:
        """Whether the run has something to export or verify: a quantized checkpoint need not be evaluated as well."""
        return self.export_onnx is not None or self.verify is not None or bool(self.export_encodings)

    @property
    def arch_given(self) -> bool:
        """Whether the user named the model; else a checkpoint may know it."""
        return "--arch" in self.given

    def given_of(self, group: str) -> tuple[str, ...]:
        """The fields of a group of flags with a prefix that the user gave.

        >>> RunConfig(given=frozenset({"--kd-teacher", "--kd-start-epoch", "--lr"})).given_of("kd")
        ('start_epoch', 'teacher')
        """
        start = f"--{group}-"
        found = (flag.removeprefix(start) for flag in self.given if flag.startswith(start))
        return tuple(sorted(name.replace("-", "_") for name in found))

    def to_yaml(self) -> str:
        """The config as YAML text, in the order of the fields.

        >>> RunConfig(arch="vgg11").to_yaml().splitlines()[1:3]
        ['data: null', 'arch: vgg11']
        """
        tree: dict[str, Any] = {}
        for name, value in settings_by_name(self).items():
            group, _, key = name.rpartition(".")
            (tree.setdefault(group, {}) if group else tree)[key] = _plain(value)
        body = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True)
        return f"# repeat this run: compress.py --run-config THIS_FILE\n{body}"


def settings_by_name(config: RunConfig) -> dict[str, object]:
    """All settings by name, in the order of the fields: `arch`, `qe.mode`, and `qe.clip_p` for a clip parameter.

    >>> settings = settings_by_name(RunConfig())
    >>> settings["qe.clip_percentile"], settings["qe.clip_n_stds"], config_from_names(settings) == RunConfig()
    (99.99, None, True)
    """
    found: dict[str, object] = {}
    for each in (each for each in fields(config) if each.compare):
        value = getattr(config, each.name)
        found |= _of_group(each.name, value) if each.name in GROUPS else {each.name: value}
    return found


def _of_group(group: str, args: Any) -> Mapping[str, object]:
    found: dict[str, object] = {}
    for each in fields(args):
        value = getattr(args, each.name)
        keys, _ = _MAPPINGS.get(each.name, ({}, None))
        own = {key: value.get(key, default) for key, default in keys.items()} or {each.name: value}
        found |= {f"{group}.{key}": item for key, item in own.items()}
    return found


def config_from_names(settings: Mapping[str, Any]) -> RunConfig:
    """The config of some settings by name; the others have their defaults."""
    top = {name: value for name, value in settings.items() if "." not in name}
    for group, kind in GROUPS.items():
        start = f"{group}."
        own = {name.removeprefix(start): value for name, value in settings.items() if name.startswith(start)}
        for field_name, (keys, mapping) in _MAPPINGS.items():
            if items := {key: own.pop(key) for key in keys if key in own}:
                own[field_name] = mapping(items)
        top[group] = kind(**own)
    return RunConfig(**top)


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has."""
    if isinstance(value, (tuple, frozenset)):
        return sorted(value) if isinstance(value, frozenset) else [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def read_run_config(path: Path) -> dict[str, Any]:
    """The settings in a `run_config.yaml`, by field (`arch`, `qe.mode`), as YAML gave them; `given` among them.

    The command line checks the values, with the same rules as those of its flags.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key that is no setting or a value that is neither a
            scalar nor a list of them (all of them are named).
    """
    top = _entries(load_yaml(path, MOST_SETTINGS))
    settings = {key: node for key, node in top.items() if key not in GROUPS}
    for group in GROUPS:
        settings |= {f"{group}.{key}": node for key, node in (_entries(top[group]) if group in top else {}).items()}
    allowed = settings_by_name(RunConfig())
    unknown = {key: node for key, node in settings.items() if key not in allowed}
    if unknown:
        raise ConfigError(
            [f"{node.where}: there is no setting {key!r}{did_you_mean(key, allowed)}" for key, node in unknown.items()]
        )
    if problems := [problem for key, node in settings.items() if (problem := _problem(key, node))]:
        raise ConfigError(problems)
    return {key: [each.value for each in node.value] if isinstance(node.value, tuple) else node.value
            for key, node in settings.items()}  # fmt: skip


def _problem(key: str, node: Node) -> str:
    """Why no flag can have such a value, or the empty text."""
    is_list = isinstance(node.value, tuple)
    if key == "given" and not is_list:
        return f"{node.where}: given is {node}; allowed: a list of flags"
    if key == "data" and is_list:
        return f"{node.where}: data is a list; allowed: the path of a folder"
    for item in node.value if isinstance(node.value, tuple) else (node,):
        if isinstance(item.value, (tuple, dict)):
            return f"{item.where}: {key} is {item}; allowed: a value, or a list of values"
    return ""


def _entries(node: Node) -> Mapping[str, Node]:
    if node.mapping is None:
        raise ConfigError(f"{node.where}: 'setting: value' lines are expected here, as in configs/run_config.yaml")
    return node.mapping
