"""Real PEFT with two active adapters; hooks weigh the base and each adapter per token.

PEFT adds its adapters with fixed factors. A user who wants gates hooks the base layer and each
lora_B, which leaves PEFT's own forward in charge: one base GEMM, two adapters.
"""

import peft
import torch
from torch import nn


def build(problem, folded, blocks=None):
    """A PEFT model of one linear, its gates computed just before its forward."""
    p = problem.projection
    N, K = p.weight.shape
    rank = p.lora_A.shape[1]
    base = nn.Linear(K, N, bias=False, dtype=p.x.dtype)
    base.weight = nn.Parameter(p.weight)
    names = ["unwill", "glad"]
    model = nn.Sequential(base)
    for name, scaling in zip(names, p.scaling, strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"])
        if name == names[0]:
            model = peft.get_peft_model(model, config, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(names)
    model.eval()
    layer = model.base_model.model[0]
    gates = {}
    for e, name in enumerate(names):
        layer.lora_A[name].weight = nn.Parameter(p.lora_A[e])
        layer.lora_B[name].weight = nn.Parameter(p.lora_B[e])
        layer.lora_B[name].register_forward_hook(
            lambda module, inputs, output, e=e: output * gates["each"][:, e : e + 1]
        )
    layer.base_layer.register_forward_hook(lambda module, inputs, output: output * gates["total"])
    logits = problem.logits(folded)

    def forward(x):
        gates["each"] = torch.sigmoid(logits(x))
        gates["total"] = gates["each"].sum(1, keepdim=True)
        return layer(x)

    return forward
