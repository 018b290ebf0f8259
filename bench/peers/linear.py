"""The projection without any routing: the floor."""

from torch.nn import functional as F


def build(problem, folded, blocks=None):
    """`F.linear`, whatever the library behind it does."""
    weight = problem.projection.weight
    return lambda x: F.linear(x, weight)
