"""Which verbs use the flags of several parts."""

from __future__ import annotations

from qlib.config.flags.flag import Use
from qlib.config.flags.verb import Verb

__all__ = ["ALL_BUT_SUMMARY", "EVALUATES", "HANDS_OVER", "READS", "TESTS", "TRAINS"]

_EVALUATING = (Verb.QUANTIZE, Verb.EVALUATE, Verb.TRAIN, Verb.NOTHING)

ALL_BUT_SUMMARY = Use(tuple(verb for verb in Verb if verb not in (Verb.COMPARE, Verb.SUMMARY)))
EVALUATES = Use(_EVALUATING, "nothing is evaluated")
HANDS_OVER = Use((*_EVALUATING, Verb.EXPORT))
READS = Use((*_EVALUATING, Verb.SENSE, Verb.SENSE_PRUNING, Verb.CALIBRATE, Verb.HISTOGRAMS), "no images are read")
TESTS = Use((*_EVALUATING, Verb.SENSE_PRUNING), "nothing is evaluated")
TRAINS = Use((Verb.TRAIN,), "nothing is trained")
