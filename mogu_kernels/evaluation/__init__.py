"""Measuring safety and usability of a model under a defence."""

from mogu_kernels.evaluation.defences import DEFENCES, load_system
from mogu_kernels.evaluation.measure import evaluate, gate_statistics
from mogu_kernels.evaluation.refusal import is_refusal, wilson_interval
from mogu_kernels.evaluation.report import dominance, draw_gates, figures, in_words, markdown
from mogu_kernels.evaluation.sets import refusal_prefixes, split
from mogu_kernels.evaluation.systems import RoutedSystem, System

__all__ = [
    "DEFENCES",
    "RoutedSystem",
    "System",
    "dominance",
    "draw_gates",
    "evaluate",
    "figures",
    "gate_statistics",
    "in_words",
    "is_refusal",
    "load_system",
    "markdown",
    "refusal_prefixes",
    "split",
    "wilson_interval",
]
