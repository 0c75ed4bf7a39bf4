"""Post-training quantization settings: YAML, flags, and which layer gets what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from qlib.config.flags.groups import QuantArgs
from qlib.config.layers.read import load_ptq_config, ptq_config_from_flags
from qlib.config.layers.resolve import LayerInfo, resolve, wants_histograms
from qlib.config.layers.settings import LayerSettings, PtqConfig, Rule
from qlib.errors import ConfigError
from qlib.quant.clip_names import CLIP_NAMES, WEIGHT_CLIPS, ClipParameters
from qlib.yaml_tree import Node, load_yaml

SCHEDULES = Path(__file__).resolve().parents[2] / "schedules"


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


def problems(path: Path, text: str) -> list[str]:
    """The problems of a file, without its folder."""
    with pytest.raises(ConfigError) as caught:
        load_ptq_config(write(path, text))
    return [problem.replace(f"{path}/", "") for problem in caught.value.problems]


def plain(node: Node) -> object:
    if isinstance(node.value, Mapping):
        return {key: plain(value) for key, value in node.value.items()}
    return [plain(item) for item in node.value] if isinstance(node.value, tuple) else node.value


# ------------------------------------------------------------------------------------------------ yaml_source


def test_yaml_keeps_order_text_of_keys_and_lines(tmp_path: Path) -> None:
    node = load_yaml(write(tmp_path, "# top\nb:\n  0: [1, 2.5]\n  on: {x: null}\na: yes\n"))
    assert plain(node) == {"b": {"0": [1, 2.5], "on": {"x": None}}, "a": True}
    assert list(node.mapping or {}) == ["b", "a"]
    assert (node.where_key("b"), node.where_key("a")) == (f"{tmp_path}/a.yaml:2", f"{tmp_path}/a.yaml:5")


def test_yaml_anchors_and_merges(tmp_path: Path) -> None:
    text = "x: &x {bits: 4, mode: sym}\ny: {<<: *x, bits: 8}\nz: *x\n"
    assert plain(load_yaml(write(tmp_path, text))) == {
        "x": {"bits": 4, "mode": "sym"},
        "y": {"bits": 8, "mode": "sym"},
        "z": {"bits": 4, "mode": "sym"},
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", [":1: the file is empty"], id="empty"),
        pytest.param(b"# nothing\n", [":1: the file is empty"], id="only a comment"),
        pytest.param(
            b"a:\n\tb: 1\n  \tc: 2\n",
            [
                ":2: a tab in the indentation; YAML allows only spaces",
                ":3: a tab in the indentation; YAML allows only spaces",
            ],
            id="tabs",
        ),
        pytest.param(
            b"a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\n",
            [":3: duplicate key 'a', first on line 1; keep one", ":4: duplicate key 'd', first on line 4; keep one"],
            id="duplicate keys",
        ),
        pytest.param(
            b"a: !!python/object/apply:os.system [ls]\nb: !mine 3\n",
            [
                ":1: the tag !!python/object/apply:os.system is not allowed; write plain values",
                ":2: the tag !mine is not allowed; write plain values",
            ],
            id="tags that run code",
        ),
        pytest.param(b"a: &a [*a]\n", [":1: an anchor contains itself"], id="recursive anchor"),
        pytest.param(b"a: !!int many\n", [":1: 'many' is not a valid int"], id="not an int"),
        pytest.param(b"? [a, b]\n: 1\n", [":1: a key must be plain text, not a list or a mapping"], id="list as key"),
        pytest.param(b"a: 1\n<<: 3\n", [":2: '<<' can only merge a mapping, not 3"], id="merge of a number"),
        pytest.param(b"a: \xff\n", [": not a text file in UTF-8 (byte 3); save it as UTF-8"], id="not UTF-8"),
    ],
)
def test_broken_yaml(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert list(caught.value.problems) == [f"{path}{problem}" for problem in expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: 1\nb: [1, 2\n", r"a\.yaml:3: not valid YAML", id="open list"),
        pytest.param("a: 1\nb: \x01\n", r"a\.yaml:2: not valid YAML: ", id="control character"),
        pytest.param("a: 1\n---\nb: 2\n", r"a\.yaml:2: not valid YAML: but found another document", id="two documents"),
        pytest.param("a: *b\n", r"a\.yaml:1: not valid YAML: found undefined alias", id="undefined alias"),
        pytest.param(
            "[" * 100_000, r"a\.yaml:1: lists and mappings are nested more than 50 deep", id="nested without end"
        ),
    ],
)
def test_yaml_syntax(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path, text))


def test_yaml_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"b\.yaml: cannot be read: No such file or directory"):
        load_yaml(tmp_path / "b.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_yaml(tmp_path)


# ------------------------------------------------------------------------------------------------ load_ptq_config

FULL = """\
version: 1
quantizers:
  q:
    class: PostTrainLinearQuantizer
    bits_activations: 6
    bits_parameters: 4
    bits_accum: 24
    mode: {activations: ASYMMETRIC_UNSIGNED, weights: symmetric_restricted}
    clip_acts: n_std
    clip_n_stds: 3
    per_channel_wts: True
    model_activation_stats: stats.yaml
    save_fp_weights: true
    overrides:
      fc: {bits_activations: null, bits_weights: 0}
      module.conv1:
        mode: asym_s
        clip_acts: LAPLACE
        clip_half_range: true
        scale_approx_mult_bits: 12
        input_overrides: {0: {from_output: true}, 1: {bits_activations: 8, mode: SYM, clip_acts: NONE}}
      .*[.]gelu: {fp16: true}
      soft.*: {fpq_module: 64, fake: true, quantize_inputs: false}
policies: []
"""


def test_full_file(tmp_path: Path) -> None:
    (tmp_path / "stats.yaml").write_text("")
    config = load_ptq_config(write(tmp_path, FULL))
    origin = {
        "bits_activations": "a.yaml:5",
        "bits_weights": "a.yaml:6",
        "bits_accum": "a.yaml:7",
        "mode_activations": "a.yaml:8",
        "mode_weights": "a.yaml:8",
        "clip_acts": "a.yaml:9",
        "clip_n_stds": "a.yaml:10",
        "per_channel_wts": "a.yaml:11",
    }
    assert config.defaults == LayerSettings(
        bits_activations=6,
        bits_weights=4,
        bits_accum=24,
        mode_activations="asym_u",
        mode_weights="sym_restr",
        clip_acts="n_std",
        clip_parameters=ClipParameters({"clip_n_stds": 3.0}),
        per_channel_wts=True,
        origin=origin,
    )
    assert (config.stats_file, config.dynamic, config.save_fp_weights) == (tmp_path / "stats.yaml", False, True)
    assert [rule.pattern for rule in config.rules] == ["fc", "module.conv1", ".*[.]gelu", "soft.*"]
    assert [rule.settings for rule in config.rules] == [
        {"bits_activations": 0, "bits_weights": 0},
        {
            "mode_activations": "asym_s",
            "mode_weights": "asym_s",
            "clip_acts": "laplace",
            "clip_half_range": True,
            "scale_approx_mult_bits": 12,
            "input_overrides": {
                0: {"from_output": True},
                1: {"bits_activations": 8, "mode_activations": "sym", "clip_acts": "none"},
            },
        },
        {"fpq": 16},
        {"fpq": 64, "fake": True, "quantize_inputs": False},
    ]
    assert config.rules[1].lines["clip_acts"] == "a.yaml:18"
    assert config.notes == (f"{tmp_path}/a.yaml:24: section 'policies' has no effect on this quantization",)


def quantizer(*lines: str) -> str:
    """A file whose arguments stand on line 4 and after."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"quantizers:\n  q:\n    class: PostTrainLinearQuantizer\n{body}"


def test_bare_file_means_the_defaults_and_dynamic(tmp_path: Path) -> None:
    assert load_ptq_config(write(tmp_path, quantizer())) == PtqConfig(dynamic=True)


def test_bits_weights_beats_bits_parameters_in_either_order(tmp_path: Path) -> None:
    for lines in (["bits_parameters: 8", "bits_weights: 4"], ["bits_weights: 4", "bits_parameters: 8"]):
        assert load_ptq_config(write(tmp_path, quantizer(*lines))).defaults.bits_weights == 4


def test_first_quantizer_of_our_class_in_any_section(tmp_path: Path) -> None:
    config = load_ptq_config(
        write(
            tmp_path,
            "pruners:\n  p: {class: SplicingPruner}\n"
            "quantizers:\n  d: {class: DorefaQuantizer}\n"
            "  q: {class: PostTrainLinearQuantizer, bits_activations: 7, also_clip_weights: true}\n",
        )
    )
    assert config.defaults.bits_activations == 7
    assert [note.split("/")[-1] for note in config.notes] == [
        "a.yaml:1: section 'pruners' has no effect on this quantization",
        "a.yaml:4: quantizer 'd' has no effect on this quantization",
        "a.yaml:5: also_clip_weights acts only in a search for the best clipping",
    ]


def test_stats_file_beside_the_yaml_else_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/s.yaml").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, quantizer("model_activation_stats: s.yaml"))
    assert load_ptq_config(path).stats_file == Path("s.yaml")
    (tmp_path / "s.yaml").write_text("")
    assert load_ptq_config(path).stats_file == tmp_path / "s.yaml"


BITS = "a whole number from 2 to 16, or null or 0 for float"
CLIPS = ", ".join(CLIP_NAMES)
MODES = "sym, sym_restr, asym_s, asym_u, symmetric, symmetric_restricted, asymmetric_signed, asymmetric_unsigned"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["bits_activations: 1"], f"a.yaml:4: bits_activations is 1; allowed: {BITS}", id="bits 1"),
        pytest.param(["bits_weights: 33"], f"a.yaml:4: bits_weights is 33; allowed: {BITS}", id="bits 33"),
        pytest.param(["bits_weights: 8.0"], f"a.yaml:4: bits_weights is 8.0; allowed: {BITS}", id="bits 8.0"),
        pytest.param(["bits_weights: yes"], f"a.yaml:4: bits_weights is true; allowed: {BITS}", id="bits yes"),
        pytest.param(["bits_weights: None"], f"a.yaml:4: bits_weights is 'None'; allowed: {BITS}", id="bits None"),
        pytest.param(
            ["bits_accum: 0"],
            "a.yaml:4: bits_accum is 0; allowed: a whole number from 2 to 32, or null for 32",
            id="accumulator 0",
        ),
        pytest.param(
            ["mode: SYMETRIC"],
            f"a.yaml:4: mode is 'SYMETRIC'; allowed: {MODES}; "
            "did you mean symmetric or sym_restr or asymmetric_signed?",
            id="mode",
        ),
        pytest.param(
            ["mode: {weight: sym}"],
            "a.yaml:4: unknown key 'weight'; allowed: activations, weights; did you mean weights?",
            id="mode part",
        ),
        pytest.param(["clip_acts: [avg]"], f"a.yaml:4: clip_acts is a list; allowed: {CLIPS}", id="clip"),
        pytest.param(
            ["clip_n_stds: -2"], "a.yaml:4: clip_n_stds is -2; allowed: a number above 0, or null", id="n_stds"
        ),
        pytest.param(
            ["clip_percentile: 50"],
            "a.yaml:4: clip_percentile is 50; allowed: a number above 50 to 100, or null for 99.99",
            id="percentile",
        ),
        pytest.param(
            ["clip_p: 0"], "a.yaml:4: clip_p is 0; allowed: a number from 1 to 4, or null for 2", id="power of lp"
        ),
        pytest.param(
            ["clip_wts: kl"],
            f"a.yaml:4: clip_wts is 'kl'; allowed: {', '.join(WEIGHT_CLIPS)}",
            id="clip of weights",
        ),
        pytest.param(["scale: 2"], "a.yaml:4: scale is 2; allowed: float, pow2", id="scale"),
        pytest.param(
            ["clip_n_stds: .inf"], "a.yaml:4: clip_n_stds is inf; allowed: a number above 0, or null", id="inf"
        ),
        pytest.param(
            ["per_channel_wts: 1"], "a.yaml:4: per_channel_wts is 1; allowed: true or false", id="flag as number"
        ),
        pytest.param(["fpq_module: 8"], "a.yaml:4: fpq_module is 8; allowed: 16, 32, 64 or null", id="fpq"),
        pytest.param(
            ["fp16: true", "fpq_module: 32"],
            "a.yaml:5: fpq_module is 32 but fp16 is true; keep one of them",
            id="fp16 against fpq",
        ),
        pytest.param(
            ["model_activation_stats: {a: 1}"],
            "a.yaml:4: model_activation_stats is a mapping; allowed: the path of a statistics file, or null",
            id="stats inline",
        ),
        pytest.param(
            ["overrides: [fc]"],
            "a.yaml:4: overrides is a list; allowed: a mapping of layer names to settings",
            id="overrides a list",
        ),
        pytest.param(
            ["overrides:", "  fc: 8"],
            "a.yaml:5: settings must be a mapping of names to values, not 8",
            id="override a number",
        ),
        pytest.param(
            ["overrides:", "  fc:", "    acts: 8"],
            "a.yaml:6: the key 'acts' is no longer used; write 'bits_activations'",
            id="deprecated",
        ),
        pytest.param(
            ["overrides:", "  '*.conv1': {bits_weights: 4}"],
            "a.yaml:5: '*.conv1' is not a regular expression: nothing to repeat at position 0; write '.*' for any text",
            id="glob",
        ),
        pytest.param(
            ["overrides:", "  fc:", "    input_overrides: {first: {bits_activations: 8}}"],
            "a.yaml:6: input 'first' of input_overrides is not allowed; inputs count from 0",
            id="input by name",
        ),
        pytest.param(
            ["overrides:", "  fc:", "    input_overrides: {0: {from_output: true, mode: sym}}"],
            "a.yaml:6: from_output stands alone; remove it or the other settings of the input",
            id="from_output and more",
        ),
        pytest.param(
            ["overrides:", "  fc:", "    input_overrides: {0: {from_output: false}}"],
            "a.yaml:6: from_output is false; allowed: true",
            id="from_output false",
        ),
        pytest.param(
            ["overrides:", "  fc:", "    input_overrides: 8"],
            "a.yaml:6: input_overrides is 8; allowed: a mapping of input number to settings",
            id="input_overrides a number",
        ),
    ],
)
def test_one_mistake(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert problems(tmp_path, quantizer(*lines)) == [expected]


def test_a_clip_method_keeps_its_name() -> None:
    assert set(CLIP_NAMES) >= {*["none", "avg", "n_std", "gauss", "laplace", "percentile", "kl", "mse", "lp", "auto"]}
    assert set(WEIGHT_CLIPS) >= {"none", "percentile", "mse", "lp", "auto"}


def test_missing_stats_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml:4: model_activation_stats 's\.yaml' is no file, in '.*' or here"):
        load_ptq_config(write(tmp_path, quantizer("model_activation_stats: s.yaml")))


def test_unknown_keys_are_all_reported_with_what_is_allowed(tmp_path: Path) -> None:
    found = problems(tmp_path, quantizer("bits_activation: 8", "overides: {}", "overrides:", "  fc: {bits_weigths: 4}"))
    assert [(problem.split("; ")[0], problem.split("; ")[-1]) for problem in found] == [
        ("a.yaml:4: unknown key 'bits_activation'", "did you mean bits_activations?"),
        ("a.yaml:5: unknown key 'overides'", "did you mean overrides?"),
        ("a.yaml:7: unknown key 'bits_weigths'", "did you mean bits_weights or bits_bias?"),
    ]


def test_mistakes_of_all_sorts_are_reported_together(tmp_path: Path) -> None:
    text = "quantisers: {}\nquantizers:\n  q:\n    class: PostTrainLinearQuantiser\n    mode: 3\n    clip_acts: avgg\n"
    assert [problem.split(";")[0] for problem in problems(tmp_path, text)] == [
        "a.yaml:1: unknown section 'quantisers'",
        "a.yaml:4: unknown class 'PostTrainLinearQuantiser'",
        "a.yaml:5: mode is 3",
        "a.yaml:6: clip_acts is 'avgg'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "version: 1",
            "a.yaml:1: the file holds no quantizer; add one of class PostTrainLinearQuantizer under 'quantizers'",
            id="none",
        ),
        pytest.param(
            "quantizers: {d: {class: PACTQuantizer}}",
            "a.yaml:1: class 'PACTQuantizer' does not quantize after training; use PostTrainLinearQuantizer",
            id="another class",
        ),
        pytest.param(
            "- 1",
            "a.yaml:1: the file holds a list; allowed: a mapping of the sections version, pruners, regularizers, "
            "quantizers, lr_schedulers, extensions, policies, corrections",
            id="a list",
        ),
    ],
)
def test_no_quantizer(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


@pytest.mark.parametrize("path", sorted(SCHEDULES.glob("ptq_*.yaml")), ids=lambda path: path.stem)
def test_the_files_we_ship_load(path: Path) -> None:
    assert load_ptq_config(path).defaults.bits_weights in range(2, 17)


# ------------------------------------------------------------------------------------------------ flags


def test_flags() -> None:
    config = ptq_config_from_flags(
        QuantArgs(
            bits_acts=6,
            mode="asym_u",
            mode_wts="sym_restr",
            per_channel=True,
            no_clip_layers=("fc",),
            no_quant_layers=("conv1", "fc"),
        ),
        frozenset({"--qe-bits-acts", "--qe-mode-wts", "--qe-mode", "--qe-no-clip-layers", "--seed"}),
    )
    assert config.defaults == LayerSettings(
        bits_activations=6,
        mode_activations="asym_u",
        mode_weights="sym_restr",
        per_channel_wts=True,
        origin={
            "bits_activations": "--qe-bits-acts",
            "mode_activations": "--qe-mode",
            "mode_weights": "--qe-mode-wts",
        },
    )
    assert [(rule.pattern, rule.where) for rule in config.rules] == [
        ("conv1", "--qe-no-quant-layers"),
        ("fc", "--qe-no-quant-layers"),
        ("fc", "--qe-no-clip-layers"),
    ]


def test_a_flag_with_a_broken_pattern() -> None:
    with pytest.raises(ConfigError, match=r"--qe-no-clip-layers: 'fc\(' is not a regular expression"):
        ptq_config_from_flags(QuantArgs(no_clip_layers=("fc(",)))


# ------------------------------------------------------------------------------------------------ resolve

LAYERS = [
    LayerInfo("conv1", "conv", True),
    LayerInfo("layer1.0.conv1", "conv", True),
    LayerInfo("layer1.0.add", "add", False, 2),
    LayerInfo("avgpool", "avg_pool", False),
    LayerInfo("fc", "linear", True),
]
ABSORBED = {"bn1": "conv1", "relu": "conv1", "layer1.0.relu2": "layer1.0.add"}


def rule(pattern: str, line: int = 9, **settings: object) -> Rule:
    return Rule(pattern, settings, dict.fromkeys(settings, f"a.yaml:{line + 1}"), f"a.yaml:{line}")


def bits(config: PtqConfig) -> dict[str, int]:
    return {name: each.bits_activations for name, each in resolve(config, LAYERS, ABSORBED).items()}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        pytest.param([], [8, 8, 8, 8, 8], id="defaults"),
        pytest.param([rule("fc", bits_activations=4)], [8, 8, 8, 8, 4], id="one layer"),
        pytest.param([rule("conv1", bits_activations=4)], [4, 8, 8, 8, 8], id="the whole name, not its end"),
        pytest.param(
            [rule(".*conv1", bits_activations=4), rule(".*", bits_activations=5)],
            [4, 4, 5, 5, 5],
            id="first match wins",
        ),
        pytest.param(
            [rule(".*", bits_activations=4), rule("fc", bits_activations=5)], [4, 4, 4, 4, 5], id="exact name beats all"
        ),
        pytest.param(
            [rule("(conv1|(fc))", bits_activations=4), rule("(layer1).*", bits_activations=5)],
            [4, 5, 5, 8, 4],
            id="groups",
        ),
        pytest.param([rule("module.fc", bits_activations=4)], [8, 8, 8, 8, 4], id="module. tolerated"),
        pytest.param([rule("^module\\.layer1.*$", bits_activations=4)], [8, 4, 4, 8, 8], id="module. in an expression"),
        pytest.param([rule("fc", bits_weights=4)], [8, 8, 8, 8, 8], id="other settings stay"),
        pytest.param([rule("relu", bits_activations=4)], [4, 8, 8, 8, 8], id="a fused ReLU speaks for its layer"),
        pytest.param(
            [rule("relu", bits_activations=4), rule("conv1", clip_acts="avg")],
            [8, 8, 8, 8, 8],
            id="unless the layer has its own rule",
        ),
        pytest.param(
            [rule("relu", bits_activations=4), rule("bn1", bits_activations=5)],
            [4, 8, 8, 8, 8],
            id="the last fused module speaks",
        ),
        pytest.param([rule(".*relu.*", bits_activations=4)], [4, 8, 4, 8, 8], id="a pattern of fused modules"),
    ],
)
def test_which_rule_wins(rules: list[Rule], expected: list[int]) -> None:
    assert bits(PtqConfig(rules=tuple(rules))) == dict(zip([layer.name for layer in LAYERS], expected, strict=True))


BLOCK = ["conv1", "bn1", "relu", "conv2", "bn2", "relu_1", "conv3", "bn3", "add", "relu_2"]
TORCHVISION = ["relu", *(f"layer{stage}.0.{name}" for stage in (1, 2) for name in BLOCK)]
PREACT = ["relu1", "layer1.0.conv1", "layer1.0.bn2", "layer1.0.relu2", "layer1.0.bn3", "layer1.0.relu3", "layer1.1.bn2"]


@pytest.mark.parametrize(
    ("pattern", "names", "expected"),
    [
        pytest.param("layer1.0.relu1", TORCHVISION, ["layer1.0.relu"], id="first ReLU of a block"),
        pytest.param("layer2[.]0[.]relu2", TORCHVISION, ["layer2.0.relu_1"], id="second"),
        pytest.param("layer1.0.relu3", TORCHVISION, ["layer1.0.relu_2"], id="third"),
        pytest.param("module.layer1.0.relu3", TORCHVISION, ["layer1.0.relu_2"], id="of a parallel model"),
        pytest.param(".*relu3", TORCHVISION, ["layer1.0.relu_2", "layer2.0.relu_2"], id="a pattern"),
        pytest.param("layer1.*relu[12]", TORCHVISION, ["layer1.0.relu", "layer1.0.relu_1"], id="several"),
        pytest.param("layer1.0.relu", TORCHVISION, ["layer1.0.relu"], id="our name"),
        pytest.param("relu1", TORCHVISION, [], id="not the stem"),
        pytest.param(".*relu1", ["layer1.0.bn", "layer1.0.relu"], [], id="a ReLU that is not used again"),
        pytest.param(
            ".*relu1", ["layer1.0.relu1", "layer1.0.relu", "layer1.0.relu_1"], ["layer1.0.relu1"], id="own names first"
        ),
        pytest.param(".*bn1_2", PREACT, ["layer1.0.bn2", "layer1.1.bn2"], id="pre-activation"),
        pytest.param("layer1.0.relu2_3", PREACT, ["layer1.0.relu3"], id="pre-activation, ReLU"),
        pytest.param("layer1.0.relu2", PREACT, ["layer1.0.relu2"], id="pre-activation, our name"),
        pytest.param("features.3.residual_eltwiseadd", ["features.3.add"], ["features.3.add"], id="MobileNet-v2"),
    ],
)
def test_layers_may_be_named_as_they_are_elsewhere(pattern: str, names: list[str], expected: list[str]) -> None:
    layers = [LayerInfo(name, "relu", False) for name in names]
    for absorbed in ({}, dict.fromkeys(names, "conv1")):
        asked = rule(pattern, bits_activations=4)
        assert sorted(asked.matched(names)) == expected
        if not expected:
            with pytest.raises(ConfigError, match="matches no layer"):
                resolve(PtqConfig(rules=(asked,)), layers, absorbed)
            continue
        found = resolve(PtqConfig(rules=(rule(".*", bits_activations=8), asked)), layers, absorbed)
        is_name = set("*[").isdisjoint(pattern)  # which beats the rule before it
        assert [name for name, each in found.items() if each.bits_activations == 4] == (expected if is_name else [])


def test_origin_of_each_setting() -> None:
    config = PtqConfig(
        LayerSettings(bits_weights=4, origin={"bits_weights": "a.yaml:3"}), (rule("fc", clip_acts="avg"),)
    )
    fc = resolve(config, LAYERS)["fc"]
    assert [fc.origin_of(name) for name in ("clip_acts", "bits_weights", "mode_weights")] == [
        "a.yaml:10", "a.yaml:3", "default",
    ]  # fmt: skip


def test_a_fused_module_gives_nothing_but_output_settings() -> None:
    config = PtqConfig(rules=(rule("relu", bits_activations=4, bits_weights=2, fake=True, make_identity=True),))
    conv1 = resolve(config, LAYERS, ABSORBED)["conv1"]
    assert (conv1.bits_activations, conv1.bits_weights, conv1.fake, conv1.make_identity) == (4, 8, False, False)
    assert conv1.origin == {"bits_activations": "a.yaml:10"}


def test_no_quant_wins_over_no_clip_even_by_exact_name() -> None:
    names = {"no_quant_layers": ("layer1.*",), "no_clip_layers": ("layer1.0.add", "fc")}
    config = ptq_config_from_flags(QuantArgs(clip_acts="avg", **names))
    resolved = resolve(config, LAYERS)
    assert [resolved[name].bits_activations for name in ("layer1.0.conv1", "layer1.0.add", "fc")] == [0, 0, 8]
    assert [resolved[name].clip_acts for name in ("conv1", "fc")] == ["avg", "none"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            PtqConfig(rules=(rule("fcc", 3, clip_acts="avg"), rule("stage[0-9]", 5, clip_acts="avg"))),
            [
                "a.yaml:3: 'fcc' matches no layer; did you mean fc?",
                "a.yaml:5: 'stage[0-9]' matches no layer; --check lists the layers",
            ],
            id="no such layer",
        ),
        pytest.param(
            ptq_config_from_flags(QuantArgs(no_quant_layers=("avgpol",))),
            ["--qe-no-quant-layers: 'avgpol' matches no layer; did you mean avgpool?"],
            id="no such layer in a flag",
        ),
        pytest.param(
            PtqConfig(rules=(rule(".*(add|pool)", bits_weights=4, per_channel_wts=True),)),
            [
                "a.yaml:9: '.*(add|pool)' sets bits_weights, but add and avg_pool layers have none; remove it",
                "a.yaml:9: '.*(add|pool)' sets per_channel_wts, but add and avg_pool layers have none; remove it",
            ],
            id="weights where there are none",
        ),
        pytest.param(
            PtqConfig(rules=(rule("a(", clip_acts="avg"),)),
            ["a.yaml:9: 'a(' is not a regular expression: missing ), unterminated subpattern at position 1"],
            id="no expression",
        ),
        pytest.param(
            PtqConfig(LayerSettings(clip_acts="n_std", origin={"clip_acts": "a.yaml:4"})),
            ["a.yaml:4: clip_acts n_std needs clip_n_stds above 0 (--qe-clip-n-stds on the command line)"],
            id="n_std without a width, once",
        ),
        pytest.param(
            PtqConfig(rules=(rule("layer1.0.add", input_overrides={1: {"clip_acts": "n_std"}}),)),
            ["a.yaml:10: clip_acts n_std of input 1 needs clip_n_stds above 0"],
            id="n_std of an input",
        ),
        pytest.param(
            PtqConfig(rules=(rule("fc", input_overrides={99: {"bits_activations": 4}}),)),
            ["a.yaml:10: input_overrides names input 99, and fc has 1 input, from 0 on; remove it"],
            id="an input that is not there",
        ),
        pytest.param(
            PtqConfig(rules=(rule(".*", input_overrides={0: {}, 1: {}, 2: {}}),)),
            ["a.yaml:10: input_overrides names input 2, and layer1.0.add has 2 inputs, from 0 on; remove it"],
            id="an input that no layer has",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(config: PtqConfig, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config, LAYERS, ABSORBED)
    assert list(caught.value.problems) == expected


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param([rule(".*", bits_weights=4)], id="weights for some of the layers matched"),
        pytest.param([rule("avgpool", bits_weights=0, bits_activations=0)], id="no bits for no weights"),
        pytest.param([rule("fc", clip_acts="n_std", bits_activations=0)], id="n_std of a float layer"),
        pytest.param([rule("fc", clip_acts="n_std", clip_n_stds=2.0)], id="n_std with its width"),
        pytest.param([rule("bn1", bits_weights=4)], id="only a fused module"),
    ],
)
def test_settings_that_fit(rules: list[Rule]) -> None:
    assert list(resolve(PtqConfig(rules=tuple(rules)), LAYERS, ABSORBED)) == [layer.name for layer in LAYERS]


def test_a_fused_module_may_be_listed_as_a_layer() -> None:
    layers = [*LAYERS, LayerInfo("relu", "relu", False)]
    resolved = resolve(PtqConfig(rules=(rule("relu", bits_activations=4, bits_weights=4),)), layers, ABSORBED)
    assert [resolved[name].bits_activations for name in ("conv1", "relu", "fc")] == [4, 4, 8]
    assert resolved["conv1"].bits_weights == 8


def test_a_shadowed_rule_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve(PtqConfig(rules=(rule(".*", 3, clip_acts="avg"), rule("f.", 5, clip_acts="none"))), LAYERS)
    assert caplog.messages == ["a.yaml:5: 'f.' has no effect: '.*' (a.yaml:3) wins wherever it matches"]


def test_settings_of_ranges(tmp_path: Path) -> None:
    lines = ["clip_acts: lp", "clip_p: 3", "clip_percentile: null", "clip_wts: AUTO", "scale: pow2", "overrides:"]
    lines += ["  fc: {clip_acts: percentile, clip_percentile: 99, input_overrides: {0: {clip_acts: kl, clip_p: 2.5}}}"]
    config = load_ptq_config(write(tmp_path, quantizer(*lines)))
    parameters = ClipParameters({"clip_p": 3.0})
    want = LayerSettings(clip_acts="lp", clip_parameters=parameters, clip_wts="auto", scale="pow2")
    assert replace(config.defaults, origin={}) == want
    assert parameters["clip_percentile"] == 99.99
    assert config.rules[0].settings == {
        "clip_acts": "percentile",
        "clip_percentile": 99.0,
        "input_overrides": {0: {"clip_acts": "kl", "clip_p": 2.5}},
    }
    args = QuantArgs(clip_acts="lp", clip_parameters=parameters, clip_wts="auto", scale="pow2")
    assert ptq_config_from_flags(args).defaults == want


def test_dynamic_ranges_have_no_histograms() -> None:
    layers = [LayerInfo("conv1", "conv", True), LayerInfo("conv2", "conv", True), LayerInfo("fc", "linear", True)]
    rules = (Rule("fc", {"input_overrides": {0: {"clip_acts": "kl"}}, "clip_acts": "none"}, {}, "a.yaml:9"),)
    defaults = LayerSettings(clip_acts="mse", origin={"clip_acts": "--qe-clip-acts"})
    with pytest.raises(ConfigError) as caught:
        resolve(PtqConfig(defaults, rules, dynamic=True), layers)
    remedy = "use one of none, avg, n_std, gauss, laplace, or statistics from --qe-calibration or --qe-stats-file"
    assert list(caught.value.problems) == [
        f"--qe-clip-acts: clip_acts mse needs histograms, and dynamic quantization has none; {remedy}",
        f"a.yaml:9: clip_acts kl needs histograms, and dynamic quantization has none; {remedy}",
    ]
    assert wants_histograms(resolve(PtqConfig(defaults), layers))
    assert not wants_histograms(resolve(PtqConfig(LayerSettings(clip_wts="mse")), layers))
    assert not wants_histograms(resolve(PtqConfig(LayerSettings(clip_acts="kl", bits_activations=0)), layers))
