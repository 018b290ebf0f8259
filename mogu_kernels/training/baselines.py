"""Trained defences that MoGU is compared with, each as a PEFT folder beside the base model.

Supervised safety fine-tuning (SFT), a safety prompt tuned as continuous embeddings (DRO) and
layer-specific editing (LED). All step as a stage of MoGU does, on the same examples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mogu_kernels.training.batches import Item, Packer
from mogu_kernels.training.config import StageConfig
from mogu_kernels.training.losses import response_loss
from mogu_kernels.training.objectives import (
    Objective,
    ResponderObjective,
    ResponseObjective,
)
from mogu_kernels.training.responders import adapter
from mogu_kernels.training.templates import OPENERS, REFUSALS
from mogu_kernels.training.trainer import run_stage, save_adapter

# where DRO's prompt starts
SAFETY_PROMPT = (
    "You are a careful assistant. Think about whether a request could hurt someone. Refuse such a "
    "request politely, and help with every other one."
)
COMPONENTS = 4  # of the hidden states that DRO looks at
HARM, KEPT = 1e-2, 1e-3  # DRO's weights of the classes, and of what must not change

LED_EDITED, LED_TOXIC = 6, 4  # layers


def train_sft(
    model: Any,
    couples: Sequence[Sequence[Item]],
    validation: Sequence[Sequence[Item]],
    config: StageConfig,
    folder: Path,
    *,
    rank: int = 16,
    pad_token_id: int,
    seed: int = 0,
) -> dict[str, float]:
    """Fine-tune on refusals of malicious and answers to benign prompts.

    Args:
        model: the base; left as it was, here and below.
        couples: as `items.couples` makes them, for training.
        validation: likewise, for the early stop.
        config: of the stage.
        folder: `folder/adapter` is written.
        rank: of the adapter on o_proj; 16 has as many parameters as two responders.
        pad_token_id: of the tokenizer.
        seed: of everything random.
    """
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=["o_proj"]
    )

    def objective(adapted: Any) -> Objective:
        return ResponseObjective(adapted)

    collate = Packer(pad_token_id, model.dtype)
    return _train(model, lora, objective, couples, validation, collate, config, folder, seed)


def train_led(
    model: Any,
    pairs: Sequence[Sequence[Item]],
    validation: Sequence[Sequence[Item]],
    config: StageConfig,
    folder: Path,
    *,
    rank: int = 8,
    pad_token_id: int,
    seed: int = 0,
) -> dict[str, float]:
    """Edit the layers that refuse, so that the layers that comply decode to refusals.

    The edited layers are those, of the first two thirds, whose removal makes a refusal least
    likely; the toxic ones those whose hidden states, decoded, make the affirmative opener most
    likely. The edit of an MLP's down_proj is kept at a low rank. Source: LED, arXiv 2405.18166.

    Args:
        model: as in `train_sft`, as what is not named.
        pairs: as `items.pairs` makes them.
        validation: likewise.
        config: see `train_sft`.
        folder: see `train_sft`.
        rank: of the edit.
        pad_token_id: see `train_sft`.
        seed: see `train_sft`.
    """
    collate = Packer(pad_token_id, model.dtype)
    edited, toxic = _layers_of_led(model, collate(pairs[:16]))
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["down_proj"],
        layers_to_transform=edited,
    )

    def objective(adapted: Any) -> Objective:
        return _EditObjective(adapted, toxic)

    return _train(model, lora, objective, pairs, validation, collate, config, folder, seed)


def train_dro(
    model: Any,
    tokenizer: Any,
    couples: Sequence[Sequence[Item]],
    validation: Sequence[Sequence[Item]],
    config: StageConfig,
    folder: Path,
    *,
    pad_token_id: int,
    seed: int = 0,
) -> dict[str, float]:
    """Tune a safety prompt's embeddings so that malicious queries move towards refusal.

    In the few directions in which the last hidden states of the queries differ most, a linear map
    says how near the model is to refusing, and another how harmful the query is; the prompt is
    tuned to raise the first for malicious queries and to lower it for benign ones, and likewise
    the second, while the other directions stay. Source: DRO, arXiv 2401.18018. There the refusal
    map is fitted to answers sampled; a model that hardly ever refuses gives none, so here it is
    fitted to the log-odds of a refusal against an affirmative opener.
    """
    prompt = tokenizer(SAFETY_PROMPT, add_special_tokens=False)["input_ids"]
    tuning = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=len(prompt), token_dim=model.config.hidden_size
    )
    space = _Directions(model, tokenizer, prompt, [*couples, *validation], pad_token_id)

    def objective(adapted: Any) -> Objective:
        with torch.no_grad():
            words = model.get_input_embeddings()(torch.tensor(prompt, device=model.device))
            adapted.prompt_encoder["default"].embedding.weight.copy_(words)
        return _PromptObjective(adapted, space)

    def collate(items: Any) -> dict[str, Tensor]:
        return _queries(
            [(item.prompt, item.malicious) for couple in items for item in couple], pad_token_id
        )

    return _train(model, tuning, objective, couples, validation, collate, config, folder, seed)


def _train(model, config, objective, train, validation, collate, stage, folder, seed):
    """One stage with a PEFT adapter on `model`, saved to `folder/adapter`."""
    torch.manual_seed(seed)
    with adapter(model, config) as adapted:
        metrics = run_stage(
            objective(adapted),
            train,
            validation,
            collate,
            stage,
            folder / "steps",
            seed=seed,
            title=folder.name,
        )
        save_adapter(adapted, folder / "adapter")
    return metrics


class _EditObjective(Objective):
    """CE(rejection) as decoded from the toxic layers' hidden states, and from the last."""

    def __init__(self, model: Any, toxic: list[int]):
        super().__init__(model)
        self.toxic = toxic

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        out = _hidden_states(self.model, batch)
        base, losses = self.model.get_base_model(), []
        refused = slice(0, None, 2)  # (rejection, affirmation) of each pair
        for layer in self.toxic:
            hidden = out[1 + layer][:, batch["columns"]].flatten(0, 1)[batch["places"][refused]]
            # the last is normalised already
            hidden = hidden if layer == len(out) - 2 else base.model.norm(hidden)
            losses.append(response_loss(base.lm_head(hidden), batch["labels"][refused]).mean())
        return {"loss": torch.stack(losses).mean()}


def _hidden_states(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The embeddings and what every layer gives, of a batch that `Packer` made."""
    return model(
        **{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")},
        output_hidden_states=True,
        logits_to_keep=1,
        use_cache=False,
    ).hidden_states


@torch.no_grad()
def _layers_of_led(model: Any, batch: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """(edited, toxic): layer numbers; the last layer is always among the toxic ones."""
    objective = ResponderObjective(model, "rejection")
    layers, refusals = model.model.layers, []
    for number in tqdm(range(len(layers)), desc="layers", disable=None, leave=False):
        hook = layers[number].register_forward_hook(lambda _, inputs, __: inputs[0])
        try:
            refusals.append(float(objective(**batch)["wanted"]))
        finally:
            hook.remove()
    edited = torch.tensor(refusals[: len(layers) * 2 // 3]).topk(LED_EDITED).indices
    affirmed = slice(1, None, 2)
    first = batch["places"][affirmed, 0], batch["labels"][affirmed, :1]
    likely = []
    for hidden in _hidden_states(model, batch)[1:-1]:
        before = hidden[:, batch["columns"]].flatten(0, 1)[first[0]]
        logits = model.lm_head(model.model.norm(before))
        likely.append(float(logits.log_softmax(-1).gather(1, first[1]).mean()))
    toxic = torch.tensor(likely).topk(LED_TOXIC - 1).indices
    return sorted(edited.tolist()), [*sorted(toxic.tolist()), len(layers) - 1]


class _Directions:
    """Where the queries' last hidden states differ, and what refusal and harm look like there.

    Attributes:
        mean: [hidden].
        basis: [hidden, hidden], orthonormal columns, the first `COMPONENTS` differ most.
        refusal: [COMPONENTS], harm [COMPONENTS]: linear maps.
        start: {query: hidden state with the text prompt}.
    """

    @torch.no_grad()
    def __init__(self, model, tokenizer, prompt, couples, pad):
        every = {tuple(item.prompt): float(item.malicious) for couple in couples for item in couple}
        queries = list(every)
        harmful = torch.tensor(list(every.values()))
        with_prompt = _last_states(model, [[*prompt, *q] for q in queries], pad)
        without = _last_states(model, [list(q) for q in queries], pad)
        states = torch.cat([with_prompt, without])
        self.mean = states.mean(0)
        _, _, basis = torch.linalg.svd(states - self.mean, full_matrices=True)
        self.basis = basis.T.contiguous()
        near = (states - self.mean) @ self.basis[:, :COMPONENTS]
        odds = _refusal_odds(model, tokenizer, prompt, queries, pad)
        self.refusal = _fitted(near, odds)
        self.harm = _fitted(near, torch.cat([harmful, harmful]))
        self.start = dict(zip(queries, with_prompt, strict=True))


class _PromptObjective(Objective):
    """DRO's loss of a batch of queries."""

    def __init__(self, model: Any, space: _Directions):
        super().__init__(model)
        self.space = space

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        out = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
            logits_to_keep=1,
        )
        virtual = out.hidden_states[-1].shape[1] - batch["input_ids"].shape[1]
        rows = torch.arange(len(batch["last"]), device=batch["last"].device)
        states = out.hidden_states[-1][rows, virtual + batch["last"]].float()
        space = self.space
        queries = zip(batch["input_ids"].tolist(), batch["last"].tolist(), strict=True)
        start = torch.stack([space.start[tuple(ids[: 1 + last])] for ids, last in queries])
        moved = (states - start) @ space.basis
        near, rest = moved[:, :COMPONENTS], moved[:, COMPONENTS:]
        refusal, harm = (
            F.binary_cross_entropy_with_logits(near @ direction, batch["malicious"])
            for direction in (space.refusal, space.harm)
        )
        kept = rest.square().mean()
        loss = refusal + HARM * harm + KEPT * kept
        return {"loss": loss, "refusal": refusal, "harm": harm}


def _queries(items: list[tuple[list[int], bool]], pad: int) -> dict[str, Tensor]:
    """Prompts padded on the right, with the place of each one's last token."""
    width = max(len(ids) for ids, _ in items)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in items]),
        "attention_mask": torch.tensor(
            [[j < len(ids) for j in range(width)] for ids, _ in items]
        ).long(),
        "last": torch.tensor([len(ids) - 1 for ids, _ in items]),
        "malicious": torch.tensor([float(malicious) for _, malicious in items]),
    }


def _last_states(model: Any, prompts: list[list[int]], pad: int) -> Tensor:
    """The last layer's hidden state of each prompt's last token [prompts, hidden]."""
    states = []
    for begin in tqdm(range(0, len(prompts), 16), desc="queries", disable=None, leave=False):
        batch = _queries([(ids, False) for ids in prompts[begin : begin + 16]], pad)
        hidden = model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        states.append(hidden[torch.arange(len(hidden)), batch["last"]].float())
    return torch.cat(states)


def _refusal_odds(model, tokenizer, prompt, queries, pad) -> Tensor:
    """Log-odds of beginning a refusal against an opener, with and without the prompt."""
    refusals, openers = (
        sorted({tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in sentences})
        for sentences in (REFUSALS, OPENERS)
    )
    odds = []
    for before in (prompt, []):
        states = _last_states(model, [[*before, *q] for q in queries], pad)
        logits = model.lm_head(states.to(model.dtype)).float()
        odds.append(logits[:, refusals].logsumexp(1) - logits[:, openers].logsumexp(1))
    odds = torch.cat(odds)
    return (odds - odds.mean()) / odds.std()


def _fitted(x: Tensor, y: Tensor) -> Tensor:
    """Least squares of centred y on x, scaled so that the fit has a standard deviation of one."""
    weight = torch.linalg.lstsq(x, (y - y.mean())[:, None]).solution[:, 0]
    return weight / (x @ weight).std()
