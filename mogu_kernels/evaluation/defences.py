"""Every system that is compared, by name: a base model, an artefact of training, a defence."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mogu_kernels.checkpoint import CONFIG_FILE, load_checkpoint
from mogu_kernels.evaluation import judges, pairs, prompts
from mogu_kernels.evaluation.prompts import Prompt
from mogu_kernels.evaluation.systems import RoutedSystem, System
from mogu_kernels.hf import attach

DECODE_TIME: dict[str, Callable[[Any, Any], System]] = {
    "self_reminder": functools.partial(System, prompt=prompts.self_reminder),
    "in_context": functools.partial(System, prompt=prompts.in_context_defence),
    "retokenization": functools.partial(System, prompt=prompts.Retokenization()),
    "input_detection": functools.partial(judges.JudgedSystem, question=judges.input_detection),
    "self_examination": functools.partial(judges.JudgedSystem, question=judges.self_examination),
    "rose": pairs.ROSESystem,
}
PROMPTS: dict[str, Prompt] = {"chat": prompts.chat, "llama2": prompts.llama2}
SAFE_DECODING = "safe_decoding"  # which needs an expert: a PEFT folder
DEFENCES = (*DECODE_TIME, SAFE_DECODING)


def load_system(
    model: Any,
    tokenizer: Any,
    checkpoint: str | os.PathLike | None = None,
    defence: str | None = None,
    template: str | None = None,
) -> System:
    """Put a model under a defence, for good: give each system a model of its own.

    Args:
        model: the base, a Hugging Face causal language model.
        tokenizer: its own.
        checkpoint: a MoGU checkpoint's folder, or a PEFT folder: LoRA, or prompt tuning (DRO). For
            "safe_decoding", the expert's LoRA.
        defence: one of `DEFENCES`; those but "safe_decoding" are put on the base model.
        template: "chat" (the tokenizer's) or "llama2" (of the published Llama-2 files, no
            defences); None takes the one that the checkpoint was trained with, else "chat".

    Raises:
        ValueError: an unknown defence or template, one that does not go with the checkpoint, a
            folder that is neither kind, or a PEFT kind that is not evaluated.
        ImportError: a PEFT folder without peft.
    """
    if defence is not None and defence not in DEFENCES:
        raise ValueError(f"defence={defence!r}: take one of {', '.join(DEFENCES)}")
    if template not in (None, *PROMPTS):
        raise ValueError(f"template={template!r}: take one of {', '.join(PROMPTS)}")
    if defence is not None and template not in (None, "chat"):
        raise ValueError(f"{defence} is written for the chat template: leave {template} out")
    if defence in DECODE_TIME:
        if checkpoint is not None:
            raise ValueError(f"{defence} is for the base model: leave {checkpoint} out")
        return DECODE_TIME[defence](model, tokenizer)
    if defence == SAFE_DECODING:
        if checkpoint is None or not _is_peft(checkpoint):
            raise ValueError(f"{defence} takes an expert in safety: give its PEFT LoRA folder")
        return _safe_decoding(model, tokenizer, checkpoint)
    if checkpoint is None:
        return System(model, tokenizer, PROMPTS[template or "chat"])
    if (Path(checkpoint) / CONFIG_FILE).is_file():
        loaded = load_checkpoint(checkpoint)
        attach(model, loaded)
        trained = loaded.config.provenance.get("config", {})
        prompt = PROMPTS[template or trained.get("template", "chat")]
        names = loaded.config.expert_names
        return RoutedSystem(model, tokenizer, prompt, expert_names=names)
    if not _is_peft(checkpoint):
        raise ValueError(
            f"{checkpoint} has neither {CONFIG_FILE} nor adapter_config.json: take a folder that "
            "save_checkpoint or PEFT wrote"
        )
    return _adapted(model, tokenizer, checkpoint, PROMPTS[template or "chat"])


def _is_peft(folder: str | os.PathLike) -> bool:
    return (Path(folder) / "adapter_config.json").is_file()


def _safe_decoding(model: Any, tokenizer: Any, folder: str | os.PathLike) -> System:
    """The expert as routed rows beside the base model's."""
    from mogu_kernels import convert

    architecture = model.config.architectures[0]
    expert = convert.from_peft({"expert": folder}, architecture=architecture)
    attach(model, pairs.saturated(expert))
    return pairs.SafeDecodingSystem(model, tokenizer)


def _adapted(model: Any, tokenizer: Any, folder: str | os.PathLike, prompt: Prompt) -> System:
    """A model with a PEFT adapter."""
    try:
        from peft import PeftModel, PeftType
    except ImportError as error:
        raise ImportError(
            "peft is missing: pip install 'mogu_kernels[train]'", name="peft"
        ) from error

    adapted: Any = PeftModel.from_pretrained(model, folder).eval()
    config = adapted.active_peft_config
    if not config.is_prompt_learning:
        # peft's wrapper would hide that the model can leave out the prompt's logits
        return System(adapted.get_base_model(), tokenizer, prompt)
    if config.peft_type != PeftType.PROMPT_TUNING or prompt is not prompts.chat:
        raise ValueError(
            f"{folder} is {config.peft_type.value}: of PEFT's prompt learning only PROMPT_TUNING "
            "is evaluated, in the chat template"
        )
    vectors = adapted.get_prompt_embedding_to_save(adapted.active_adapter).to(model.dtype)
    soft = prompts.SoftPrompt(model.get_input_embeddings(), vectors.to(model.device))
    model.set_input_embeddings(soft)
    return System(model, tokenizer, soft.prompt)
