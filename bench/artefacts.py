"""What the comparison needs trained, for each seed: `python -m bench.artefacts --seeds 0 1 2`.

`DIR/seed-S/` gets mogu and mogu_v2 (checkpoints), glad, unwill, sft, led (PEFT LoRA folders) and
dro (PEFT prompt tuning), all trained on the standard split. A baseline may read as many tokens as
MoGU does in all its stages; it ends earlier if its validation loss has not fallen for 60 steps.
Every method keeps the state that was best on the same validation prompts.
"""

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from demo.smollm2 import load_smollm2
from demo.train import RECIPE, train_on_split
from mogu_kernels.evaluation import sets
from mogu_kernels.training import StageConfig, TrainingConfig, baselines, load_config
from mogu_kernels.training.items import Encoder, couples, pairs
from mogu_kernels.training.run import same_run

NAMES = ["mogu", "mogu_v2", "sft", "led", "dro"]
RECIPE_V1 = RECIPE.with_name("smollm2.yaml")


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artefacts", type=Path, default=Path("out/comparison"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    for seed in options.seeds:
        for name in options.names:
            produce(name, options.artefacts / f"seed-{seed}", seed)


def produce(name: str, folder: Path, seed: int) -> None:
    """One artefact, or with `mogu` three."""
    if (folder / name).is_dir():
        return
    run = folder / "runs" / name
    if name in ("mogu", "mogu_v2"):
        recipe = RECIPE_V1 if name == "mogu" else RECIPE
        train_on_split(dataclasses.replace(load_config(recipe), seed=seed), run)
        if name == "mogu":
            for responder in ("glad", "unwill"):
                _keep(run / responder / "adapter", folder / responder)
        _keep(run / "checkpoint", folder / name)
        return
    train_baseline(name, dataclasses.replace(load_config(RECIPE_V1), seed=seed), run)
    _keep(run / "adapter", folder / name)


def train_baseline(name: str, config: TrainingConfig, run: Path) -> None:
    """SFT, LED or DRO with the optimiser, the data and the compute of MoGU."""
    split = sets.split()
    model, tokenizer = load_smollm2()
    encoder = Encoder(
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        template=config.template,
    )
    # a step of a responder has half as many tokens as one of the routers
    responders = (config.glad.steps or 0) + (config.unwill.steps or 0)
    steps = (config.router.steps or 0) + responders // 2
    stage = StageConfig(
        learning_rate=config.router.learning_rate,
        steps=steps,
        batch=config.router.batch,
        save_steps=20,
        patience=3,
    )
    same_run(run, dataclasses.asdict(stage), [*split.train, *split.validation], model)
    both, watched = (couples(e, encoder, config.seed) for e in (split.train, split.validation))
    own, watched_own = (pairs(e, encoder, config.seed) for e in (split.train, split.validation))
    about = {"pad_token_id": encoder.pad_token_id, "seed": config.seed}
    trainers: dict[str, Callable[[], object]] = {
        "sft": lambda: baselines.train_sft(model, both, watched, stage, run, **about),
        "led": lambda: baselines.train_led(model, own, watched_own, stage, run, **about),
        "dro": lambda: baselines.train_dro(model, tokenizer, both, watched, stage, run, **about),
    }
    trainers[name]()


def _keep(source: Path, target: Path) -> None:
    """Copy a finished folder; it appears as a whole."""
    if target.is_dir():
        return
    half = target.with_name(f".{target.name}")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half)
    half.rename(target)


if __name__ == "__main__":
    main()
