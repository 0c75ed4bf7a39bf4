"""Which schedules are Distiller's, whose published files have what a file of ours must not."""

from __future__ import annotations

from qlib.yaml_tree import Node

__all__ = ["is_distillers"]

_DISTILLERS = """
    DorefaQuantizer PACTQuantizer WRPNQuantizer QuantAwareTrainRangeLinearQuantizer NCFQuantAwareTrainQuantizer
    PostTrainLinearQuantizer
    LambdaLR StepLR MultiStepLR ExponentialLR CosineAnnealingLR CosineAnnealingWarmRestarts ReduceLROnPlateau CyclicLR
    OneCycleLR PolynomialLR MultiStepMultiGammaLR
    MagnitudeParameterPruner SensitivityPruner SparsityLevelParameterPruner AutomatedGradualPruner BaiduRNNPruner
    SplicingPruner StructureParameterPruner L1RankedStructureParameterPruner L2RankedStructureParameterPruner
    RandomLevelStructureParameterPruner ActivationAPoZRankedFilterPruner ActivationMeanRankedFilterPruner
    GradientRankedFilterPruner RandomRankedFilterPruner BernoulliFilterPruner FMReconstructionChannelPruner
    L1RankedStructureParameterPruner_AGP L2RankedStructureParameterPruner_AGP ActivationAPoZRankedFilterPruner_AGP
    ActivationMeanRankedFilterPruner_AGP GradientRankedFilterPruner_AGP RandomRankedFilterPruner_AGP
    BernoulliFilterPruner_AGP
    L1Regularizer GroupLassoRegularizer GroupVarianceRegularizer
    FilterRemover ChannelRemover StructureRemover FreezeTraining
"""
"""The classes that Distiller's schedules may name: its own, and torch's schedulers of its time."""


def is_distillers(root: Node, sections: tuple[str, ...]) -> bool:
    """Whether a schedule is one that Distiller could read: it has components, and each is of a class of Distiller's.

    >>> from qlib.yaml_tree import parse_yaml
    >>> is_distillers(parse_yaml("quantizers: {q: {class: PACTQuantizer}}", "a.yaml"), ("quantizers",))
    True
    >>> is_distillers(parse_yaml("quantizers: {q: {class: LSQQuantizer}}", "a.yaml"), ("quantizers",))
    False
    """
    known = _DISTILLERS.split()
    nodes = [node for section, node in (root.mapping or {}).items() if section in sections]
    components = [each for node in nodes for each in (node.mapping or {}).values()]
    classes = [(each.mapping or {}).get("class") for each in components]
    return bool(classes) and all(each is not None and each.value in known for each in classes)
