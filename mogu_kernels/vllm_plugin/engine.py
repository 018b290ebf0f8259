"""The engine's config made ready for routing, in the process that creates it."""

import functools
import os
import tempfile
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from mogu_kernels.checkpoint import MoGUCheckpoint
from mogu_kernels.hf import checkpoint_folder, fitting_linears
from mogu_kernels.vllm_plugin.settings import KEY, METRICS, Settings

PACKAGE = "mogu_kernels.vllm_plugin"
_folders: list[tempfile.TemporaryDirectory] = []  # of metrics, removed when the server ends


def register() -> None:
    """Have `configure` called wherever an engine's config is created: server, `LLM`, benchmarks."""
    original = EngineArgs.create_engine_config
    if getattr(original, "is_mogu", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if Settings.of(self) is not None:
            # the newer runner tells no plugin about places in the batch
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        config = original(self, *args, **kwargs)
        configure(config)
        return config

    create_engine_config.is_mogu = True
    EngineArgs.create_engine_config = create_engine_config


def configure(config: Any) -> None:
    """Set scheduler and batch follower of a `VllmConfig` that names a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged or does not fit the model, or the engine is asked for
            something that cannot be routed.
    """
    settings = Settings.of(config)
    if settings is None:
        return
    settings = Settings(str(checkpoint_folder(settings.checkpoint)), settings.locked)
    _check_engine(config)
    check_model(config.model_config.hf_config, settings.load())
    _folders.append(tempfile.TemporaryDirectory(prefix="mogu-metrics-"))
    os.environ[METRICS] = _folders[-1].name
    config.additional_config = {**config.additional_config, KEY: settings.to_dict()}
    model, scheduler = config.model_config, config.scheduler_config
    follower = "LockedRoutedBatch" if settings.locked else "RoutedBatch"
    model.logits_processors = [*(model.logits_processors or []), f"{PACKAGE}.batch:{follower}"]
    kind = "RoutedAsyncScheduler" if scheduler.async_scheduling else "RoutedScheduler"
    scheduler.scheduler_cls = f"{PACKAGE}.scheduler.{kind}"
    compilation = config.compilation_config
    if compilation.splitting_ops:  # pieces between which Python runs, as at attention
        compilation.splitting_ops = [*compilation.splitting_ops, "vllm::mogu_spread"]


def check_model(hf_config: Any, checkpoint: MoGUCheckpoint) -> None:
    """Whether the checkpoint fits: the same check as `attach`, on a model without weights.

    Raises:
        ValueError: see `fitting_linears`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    fitting_linears(model, checkpoint)


def _check_engine(config: Any) -> None:
    """Refuse what would route wrongly, or has never been tried."""
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "KV transfer": config.kv_transfer_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "micro-batches": parallel.use_ubatching,
        "another scheduler": config.scheduler_config.scheduler_cls is not None,
        "the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        "a pooling model": config.model_config.runner_type == "pooling",
    }
    if found := [name for name, is_asked in refused.items() if is_asked]:
        raise ValueError(f"MoGU does not work with {', '.join(found)}: leave it out")
