"""MoGU on a vLLM server: `vllm serve MODEL --additional-config '{"mogu": "CHECKPOINT"}'`.

vLLM calls `register` in every process it starts (entry point `vllm.general_plugins`). A model
without a checkpoint in its additional config is served as if this package were not there.

    settings.py   what the operator and a request may say
    engine.py     the engine's config made ready; does the checkpoint fit the model?
    layers.py     vLLM's parallel linears with the routed projections around them
    batch.py      which tokens of a pass are routed
    scheduler.py  the hand-over from the routed pass to the base's
    metrics.py    what happened, for Prometheus
"""


def register() -> None:
    """Tell vLLM of the routed layers and of the checkpoint in its config. May be called again."""
    from mogu_kernels.vllm_plugin import engine, layers

    layers.register()
    engine.register()
