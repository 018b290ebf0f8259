"""MoGU as published, literally: slow, readable, fp64-capable; the truth everything is held against.

Sources: arXiv 2405.14488 (NeurIPS 2024) and the layout of the authors' released files.
"""

from reference.decoding import mogu_generate
from reference.losses import glad_loss, response_loss, router_loss, unwill_loss
from reference.model import LoRA, RoutedProjection, Router, route

__all__ = [
    "LoRA",
    "RoutedProjection",
    "Router",
    "glad_loss",
    "mogu_generate",
    "response_loss",
    "route",
    "router_loss",
    "unwill_loss",
]
