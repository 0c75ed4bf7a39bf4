"""A schedule of each pruner and regularizer as Distiller spells it, and of our own, for the model `digits_cnn`."""

from __future__ import annotations

CONVS = "[module.wide.conv.weight, module.pointwise.conv.weight]"
AGP = f"initial_sparsity: 0.1, final_sparsity: 0.6, weights: {CONVS}"

PRUNERS = {
    "MagnitudeParameterPruner": "thresholds: {module.fc.weight: 0.1, '*': 0.05}",
    "SensitivityPruner": "sensitivities: {module.fc.weight: 0.8, module.wide.conv.weight: 0.5}",
    "SparsityLevelParameterPruner": "levels: {module.fc.weight: 0.5, '*': 0.25}",
    "AutomatedGradualPruner": AGP,
    "BaiduRNNPruner": f"q: 0.05, ramp_epoch_offset: 1, ramp_slope_mult: 2, weights: {CONVS}",
    "SplicingPruner": (
        "low_thresh_mult: 0.9, hi_thresh_mult: 1.1, sensitivity_multiplier: 0.02,"
        " sensitivities: {module.wide.conv.weight: 0.5, fc.weight: 0.6}"
    ),
    "StructureParameterPruner": (
        "threshold_criteria: Mean_Abs,"
        " reg_regims: {module.wide.conv.weight: [0.08, 3D], module.pointwise.conv.weight: [0.1, 2D]}"
    ),
    "L1RankedStructureParameterPruner": (
        "desired_sparsity: 0.5, group_type: Rows, group_dependency: null, weights: module.fc.weight"
    ),
    "L1RankedStructureParameterPruner_AGP": f"{AGP}, group_type: Blocks, kwargs: {{block_shape: [1, 8, 1, 1]}}",
    "L2RankedStructureParameterPruner": f"desired_sparsity: 0.3, group_type: Channels, weights: {CONVS}",
    "L2RankedStructureParameterPruner_AGP": f"{AGP}, group_type: Channels, group_dependency: Leader",
    "RandomLevelStructureParameterPruner": f"sparsity_range: [0.2, 0.4], group_type: Filters, weights: {CONVS}",
    "ActivationAPoZRankedFilterPruner": "desired_sparsity: 0.3, group_type: 3D, weights: [module.wide.conv.weight]",
    "ActivationAPoZRankedFilterPruner_AGP": (
        "initial_sparsity: 0.05, final_sparsity: 0.5, group_type: Filters, weights: [wide.conv.weight]"
    ),
    "ActivationMeanRankedFilterPruner": "desired_sparsity: 0.3, group_type: 3D, weights: [module.wide.conv.weight]",
    "ActivationMeanRankedFilterPruner_AGP": (
        "initial_sparsity: 0.05, final_sparsity: 0.5, group_type: Filters, weights: [wide.conv.weight]"
    ),
    "GradientRankedFilterPruner": f"desired_sparsity: 0.5, group_type: Filters, weights: {CONVS}",
    "GradientRankedFilterPruner_AGP": f"{AGP}, group_type: Filters",
    "RandomRankedFilterPruner": f"desired_sparsity: 0.5, group_type: Filters, weights: {CONVS}",
    "RandomRankedFilterPruner_AGP": f"{AGP}, group_type: Filters",
    "BernoulliFilterPruner": f"desired_sparsity: 0.2, group_type: Filters, weights: {CONVS}",
    "RigLPruner": f"sparsity: 0.6, weights: {CONVS}",
    "MovementPruner": AGP,
    "BernoulliFilterPruner_AGP": f"{AGP}, group_type: Filters",
}
"""Class -> its arguments."""

ARGS = {
    "SplicingPruner": "mini_batch_pruning_frequency: 1, mask_on_forward_only: True, use_double_copies: True",
    "BernoulliFilterPruner": (
        "mini_batch_pruning_frequency: 1, discard_masks_at_minibatch_end: True, use_double_copies: True,"
        " mask_on_forward_only: True, mask_gradients: True"
    ),
    "RigLPruner": "mini_batch_pruning_frequency: 1",
    "MovementPruner": "use_double_copies: True",
    "L1RankedStructureParameterPruner": "fold_batchnorm: True, keep_mask: True",
}
"""Class -> the args of its policy, where it has some."""

REGULARIZERS = {
    "L1Regularizer": "reg_regims: {module.fc.weight: 0.01, wide.bn.weight: 0.01}, threshold_criteria: Max",
    "GroupLassoRegularizer": (
        "threshold_criteria: Mean_Abs, reg_regims: {module.wide.conv.weight: [0.01, Channels],"
        " module.pointwise.conv.weight: [0.02, 2D], module.narrow.conv.weight: [0.01, Filters],"
        " module.stem.conv.weight: [0.01, 4D], module.fc.weight: [0.01, Rows+Cols]}"
    ),
    "ChannelLassoRegularizer": "strength: 0.001, threshold: 0.2",
    "GroupVarianceRegularizer": "reg_regims: {module.wide.conv.weight: [0.001, Channels]}",
}
"""Class -> its arguments."""


def schedule(
    pruners: dict[str, str] | None = None, regularizers: dict[str, str] | None = None, when: str = "0 3 1"
) -> str:
    """A file with one component of each of the classes, `when` from, to, every."""
    start, end, frequency = when.split()
    epochs = f"starting_epoch: {start}, ending_epoch: {end}, frequency: {frequency}"
    sections, policies = [], []
    for section, kind, classes in (("pruners", "pruner", pruners), ("regularizers", "regularizer", regularizers)):
        if classes:
            components = (f"  a_{name}: {{class: {name}, {text}}}\n" for name, text in classes.items())
            sections.append(f"{section}:\n{''.join(components)}")
            keep = "keep_mask: True" if kind == "regularizer" else ""
            policies += [
                f"  - {{{kind}: {{instance_name: a_{name}, args: {{{ARGS.get(name, keep)}}}}}, {epochs}}}\n"
                for name in classes
            ]
    return f"version: 1\n{''.join(sections)}policies:\n{''.join(policies)}"
