"""The architectures, one row each: which projections may be routed, and what may be fused.

A target is the end of a module's name ("o_proj", "self_attn.o_proj") or, with a star, a pattern for
the whole name ("model.layers.*.mixer.out_proj"). Models that are not in the table take any target.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        projections: last name components of the projections that may be routed.
        shared_inputs: projections of one parent that read the same hidden states.
        gated_mlp: the class whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)).
        plain_linears: subclasses of `nn.Linear` that compute what it computes, in other words.
    """

    projections: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    gated_mlp: str | None = None
    plain_linears: tuple[str, ...] = ()


def _like_llama(mlp: str) -> Architecture:
    """Separate q, k, v and a gated MLP."""
    shared = (ATTENTION[:3], GATED_MLP[:2])
    return Architecture(ATTENTION + GATED_MLP, shared_inputs=shared, gated_mlp=mlp)


ARCHITECTURES = {
    "LlamaForCausalLM": _like_llama("LlamaMLP"),  # Llama 2 and 3, Vicuna, SmolLM2
    "MistralForCausalLM": _like_llama("MistralMLP"),  # Dolphin
    "Qwen2ForCausalLM": _like_llama("Qwen2MLP"),
    "Qwen3ForCausalLM": _like_llama("Qwen3MLP"),
    "GemmaForCausalLM": _like_llama("GemmaMLP"),
    "Gemma2ForCausalLM": _like_llama("Gemma2MLP"),
    "Gemma3ForCausalLM": _like_llama("Gemma3MLP"),
    "Olmo2ForCausalLM": _like_llama("Olmo2MLP"),
    "Phi3ForCausalLM": Architecture(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    # remote code; its NormHead changes its own weight and is no target
    "BaichuanForCausalLM": Architecture(
        ("W_pack", "o_proj", *GATED_MLP), shared_inputs=(GATED_MLP[:2],), gated_mlp="MLP"
    ),
    "FalconForCausalLM": Architecture(
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        plain_linears=("FalconLinear",),
    ),
}


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether the module `name` is one of the targets."""
    return any(
        fnmatch.fnmatchcase(name, target)
        if "*" in target
        else name == target or name.endswith("." + target)
        for target in targets
    )
