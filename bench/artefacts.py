"""What the comparison needs trained, for each seed: `python -m bench.artefacts --seeds 0 1 2`.

`DIR/seed-S/` gets mogu and mogu_v2 (checkpoints), glad, unwill, sft, led (PEFT LoRA folders) and
dro (PEFT prompt tuning), all trained on the standard split; beside each lies in NAME.json what it
depends on. A baseline has about the processor time of MoGU in all its stages; it ends earlier if
its validation loss has not fallen for 60 steps. Every method keeps the state that was best on the
validation prompts of the classes that it is trained on; glad, unwill and led see malicious ones.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from demo.smollm2 import load_smollm2
from demo.train import RECIPE, train_on_split
from mogu_kernels import training
from mogu_kernels.evaluation import sets
from mogu_kernels.training import StageConfig, TrainingConfig, baselines, load_config
from mogu_kernels.training.items import Encoder, couples, pairs
from mogu_kernels.training.run import same_run

NAMES = ["mogu", "mogu_v2", "sft", "led", "dro"]
ATTACKS_ONLY = ("glad", "unwill", "led")  # are trained on malicious prompts
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
    if is_current(folder / name, depends_on(name)):
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


@functools.cache
def depends_on(name: str) -> dict[str, str]:
    """Hashes of all that an artefact depends on but its seed: recipe, examples, code."""
    split = sets.split()
    examples = [
        [example.instruction, example.response, example.malicious]
        for example in (*split.train, *split.validation)
        if example.malicious or name not in ATTACKS_ONLY
    ]
    return {
        "recipe": digest(RECIPE.parent, (RECIPE if name == "mogu_v2" else RECIPE_V1).name),
        "examples": hashlib.sha256(json.dumps(examples).encode()).hexdigest(),
        "code": digest(Path(training.__file__).parent, "*.py"),
        "baselines": digest(Path(__file__).parent, Path(__file__).name),
    }


def is_current(artefact: Path, now: Mapping[str, str]) -> bool:
    """Whether it is there.

    Raises:
        ValueError: it is, but what it depends on was not as it is `now`.
    """
    if not artefact.is_dir():
        return False
    note = artefact.with_suffix(".json")
    noted = json.loads(note.read_text()) if note.is_file() else {}
    if changed := [key for key in now if noted.get(key) != now[key]]:
        raise ValueError(f"{artefact} was trained with another {', '.join(changed)}: delete it")
    return True


def digest(folder: Path, pattern: str = "*", *, but: tuple[str, ...] = ()) -> str:
    """SHA-256 of a folder's files, names and bytes, but for some names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file() and p.name not in but):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write(path: Path, values: Any) -> None:
    """JSON, all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(json.dumps(values, indent=1) + "\n")
    half.replace(path)


def _keep(source: Path, target: Path) -> None:
    """Copy a finished folder, with what it depends on; it appears as a whole."""
    half = target.with_name(f".{target.name}")
    for old in (half, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, half)
    write(target.with_suffix(".json"), depends_on(target.name))
    half.rename(target)


if __name__ == "__main__":
    main()
