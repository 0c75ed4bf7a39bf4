"""The flags of the searches: of LAPQ, of bits under a budget, of sensitivity; and what they need of the others."""

from __future__ import annotations

import dataclasses

from qlib.config.flags.groups import LapqArgs
from qlib.config.flags.run_config import RunConfig
from qlib.errors import UsageError

__all__ = ["check_searches", "search_warnings", "searches"]


def searches(config: RunConfig) -> list[str]:
    """The flags that ask for a search."""
    qe = config.qe
    asked = {"--sense": config.sense is not None, "--qe-budget": qe.budget is not None, "--qe-lapq": qe.lapq}
    return [flag for flag, wanted in asked.items() if wanted]


def check_searches(config: RunConfig) -> None:
    """Raises UsageError for a search that lacks what it searches on."""
    for flag in searches(config):
        if flag != "--sense" and not config.quantize_eval:
            raise UsageError(f"{flag} needs --quantize-eval, which quantizes the model and evaluates it")
        if config.qe.dynamic:
            raise UsageError(
                f"{flag} and --qe-dynamic cannot be combined: {flag} needs ranges that are the same for all images;"
                " drop one of them"
            )


def search_warnings(config: RunConfig) -> list[str]:
    """One sentence for each flag about a search that has no effect."""
    given, qe, lapq = config.given, config.qe, config.lapq
    found: list[str] = []
    if config.sense is not None:
        verbs = ("--quantize-eval", "--evaluate")
        found += [f"{flag} has no effect: --sense only analyses" for flag in verbs if flag in given]
    needed = {"--qe-bits-choices": qe.budget is not None, "--sense-bits": config.sense is not None}
    needed["--sense-images"] = config.sense is not None or qe.budget is not None
    needs = {"--qe-bits-choices": "--qe-budget", "--sense-bits": "--sense", "--sense-images": "--sense or --qe-budget"}
    needed |= {f"--lapq-{each.name.replace('_', '-')}": qe.lapq for each in dataclasses.fields(LapqArgs)}
    found += [
        f"{flag} has no effect without {needs.get(flag, '--qe-lapq')}"
        for flag, useful in needed.items()
        if flag in given and not useful
    ]
    replaced = {"--qe-bits-wts": qe.bits_wts, "--qe-bits-acts": qe.bits_acts}
    if qe.budget is not None and not qe.budget.endswith("BOPs"):
        replaced.pop("--qe-bits-acts")  # such a budget is one of weights: activations keep their bits
    chooser = "--sense-bits" if config.sense is not None else "--qe-budget" if qe.budget is not None else None
    if chooser and qe.config_file is None:
        ignored = [flag for flag, bits in replaced.items() if flag in given and bits]
        found += [f"{flag} is ignored: {chooser} tells which are tried" for flag in ignored]
    if qe.lapq and "--lapq-eval-memoize-dataloader" in given:
        found.append("--lapq-eval-memoize-dataloader is ignored: the images are always kept in memory")
    if qe.lapq and "--lapq-basinhopping-niter" in given and not lapq.basinhopping:
        found.append("--lapq-basinhopping-niter has no effect without --lapq-basinhopping")
    if qe.lapq and "--lapq-init-method" in given and lapq.init_mode not in (None, "l1", "l2", "l3"):
        found.append(f"--lapq-init-method has no effect with --lapq-init-mode {lapq.init_mode}")
    return found
