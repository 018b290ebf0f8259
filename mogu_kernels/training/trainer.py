"""Hugging Face's trainer, told to show more, to resume after any kill, and to stop early."""

import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.utils import SAFE_WEIGHTS_NAME

from mogu_kernels.training.config import StageConfig
from mogu_kernels.training.objectives import Objective

STATE_FILE = "trainer_state.json"  # the last file that the trainer writes into a checkpoint


def run_stage(
    objective: Objective,
    train: Sequence[Any],
    validation: Sequence[Any],
    collate: Callable[[Any], dict[str, Tensor]],
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    title: str,
) -> dict[str, float]:
    """Train to the end or to the early stop, from the last whole checkpoint in `folder`.

    Args:
        objective: what is stepped; its best state on the validation set is loaded at the end.
        train: items for `collate`.
        validation: likewise; empty for none, and then nothing stops early.
        collate: items to a batch.
        config: of the stage.
        folder: of the trainer's own checkpoints, every `config.save_steps` steps.
        seed: of the order of the items and of dropout.
        title: of the progress bar.

    Returns:
        The last logged metrics.
    """
    watching = bool(validation)
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        max_steps=-1 if config.steps is None else config.steps,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if watching else "no",
        eval_steps=config.save_steps if watching else None,
        load_best_model_at_end=watching,  # keeps that checkpoint from being deleted
        metric_for_best_model="loss" if watching else None,
        greater_is_better=False if watching else None,
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=watching,
        report_to=[],
        disable_tqdm=True,  # our bar takes its place
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs: one process each, by accelerate
    callbacks: list[TrainerCallback] = [_Bar(title)]
    if watching and config.patience:
        callbacks.append(EarlyStoppingCallback(config.patience))
    trainer = _Trainer(
        model=objective,
        args=arguments,
        train_dataset=train,  # pyright: ignore[reportArgumentType]  # a list serves
        eval_dataset=validation if watching else None,  # pyright: ignore[reportArgumentType]
        data_collator=collate,  # pyright: ignore[reportArgumentType]
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    with on_main_process() as here:
        if here:
            _settle(folder)
    resumed = last_checkpoint(folder)
    if resumed is None or not _is_over(resumed):
        saving = recomputed(objective.model) if config.gradient_checkpointing else nullcontext()
        with saving:
            trainer.train(resume_from_checkpoint=resumed)
        resumed = last_checkpoint(folder)
    state = TrainerState.load_from_json(f"{resumed}/{STATE_FILE}")
    best = folder / Path(state.best_model_checkpoint or str(resumed)).name  # it may have moved
    objective.load_state_dict(load_file(f"{best}/{SAFE_WEIGHTS_NAME}"))
    hidden = ("step", "epoch", "grad_norm", "learning_rate")
    metrics = {k: v for k, v in _last(state, "loss").items() if k not in hidden}
    return metrics | ({} if state.best_metric is None else {"validation": state.best_metric})


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT folder as a whole or not at all; one that is there is replaced."""
    with on_main_process() as here:
        if here:
            folder.parent.mkdir(parents=True, exist_ok=True)
            work = folder.with_name(f".{folder.name}")
            shutil.rmtree(work, ignore_errors=True)
            model.save_pretrained(work)
            (work / "README.md").unlink(missing_ok=True)  # a model card without content
            shutil.rmtree(folder, ignore_errors=True)
            work.rename(folder)


@contextlib.contextmanager
def recomputed(model: torch.nn.Module) -> Iterator[None]:
    """Each layer of `model` keeps its input alone, and the backward pass computes the rest again.

    The switch of transformers is for layers in training mode, and routers are trained without
    dropout: in evaluation mode.
    """
    before = {layer: vars(layer).get("forward") for layer in layers_to_recompute(model)}
    for layer in before:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in before.items():
            del layer.forward
            if own is not None:  # a hook of accelerate's, say
                layer.forward = own


def layers_to_recompute(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that `gradient_checkpointing` is about.

    Raises:
        ValueError: the model has none.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing=True: {type(model).__name__} has no layers that transformers "
            "can recompute: take False"
        )
    return layers


@contextlib.contextmanager
def on_main_process() -> Iterator[bool]:
    """True in the one process that writes; all go on once it has."""
    state = PartialState()
    yield state.is_main_process
    state.wait_for_everyone()


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; newer ones, which a kill left unfinished, are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            json.loads((path / STATE_FILE).read_text())
        except (OSError, ValueError):
            shutil.rmtree(path)
        else:
            return str(path)
    return None


def _settle(folder: Path) -> None:
    """Let the newest whole checkpoint find the best one, wherever the run was moved to."""
    newest = last_checkpoint(folder)
    if newest is None:
        return
    state = TrainerState.load_from_json(f"{newest}/{STATE_FILE}")
    if state.best_model_checkpoint is not None:
        best = str(folder / Path(state.best_model_checkpoint).name)
        if best != state.best_model_checkpoint:
            state.best_model_checkpoint = best
            half = Path(newest, f".{STATE_FILE}")
            state.save_to_json(str(half))
            half.replace(Path(newest, STATE_FILE))


def _is_over(checkpoint: str) -> bool:
    """Whether a stage had come to its end when `checkpoint` was written; the trainer goes on."""
    state = TrainerState.load_from_json(f"{checkpoint}/{STATE_FILE}")
    callbacks: Any = state.stateful_callbacks
    control = callbacks["TrainerControl"]
    return state.global_step >= state.max_steps or control["args"]["should_training_stop"]


def _last(state: TrainerState, name: str) -> dict[str, float]:
    """The last logged line that has `name` in it."""
    return next((line for line in reversed(state.log_history) if name in line), {})


class _Trainer(Trainer):
    """The loss is the objective's; its other scalars, of the last batch, are logged beside it."""

    scalars: dict[str, float]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.scalars = {name: float(value.detach()) for name, value in outputs.items()}
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return model(**self._prepare_inputs(inputs))["loss"], None, None

    def log(self, logs, start_time=None):
        own = {} if "eval_loss" in logs else {k: v for k, v in self.scalars.items() if k != "loss"}
        super().log(logs | own, start_time)


class _Bar(TrainerCallback):
    """One bar a stage, with the last loss and the objective's other scalars behind it.

    Without a terminal it is one line at every checkpoint.
    """

    def __init__(self, title: str):
        self.title, self.shown = title, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.title,
            unit="step",
            disable=None if state.is_world_process_zero else True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        hidden = ("grad_norm", "learning_rate", "epoch")
        self.shown |= {
            name: f"{value:.3f}"
            for name, value in (logs or {}).items()
            if isinstance(value, float) and name not in hidden and "_per_second" not in name
        }
        self.bar.set_postfix(self.shown)

    def on_save(self, args, state, control, **kwargs):
        if self.bar.disable and state.is_world_process_zero:
            shown = ", ".join(f"{name} {value}" for name, value in self.shown.items())
            line = f"{self.title}: step {state.global_step} of {state.max_steps}, {shown}\n"
            sys.stderr.write(line)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
