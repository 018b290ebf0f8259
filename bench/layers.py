"""The real layers that are measured, by name, and the token counts."""

LAYERS = {  # N, K
    "llama2_7b.o_proj": (4096, 4096),
    "llama2_7b.gate_proj": (11008, 4096),
    "llama2_7b.down_proj": (4096, 11008),
    "falcon_7b.dense": (4544, 4544),
    "mistral_7b.k_proj": (1024, 4096),
    "smollm2_135m.o_proj": (576, 576),
}
TOKENS = (1, 8, 64, 512, 4096)
EXPERTS, RANK = 2, 8  # as published
