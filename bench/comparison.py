"""Every defence on the real model: security, usability, perplexity; one table, two kinds of figure.

    python -m bench.comparison --artefacts DIR --seeds 0 1 2

`DIR/seed-S/` holds what training with seed S left: mogu, mogu_v2 (checkpoints), glad, unwill, sft,
led (PEFT LoRA folders) and dro (PEFT prompt tuning). All of them were trained on
the standard split, on whose held-out part everything is measured. What needs no training is
measured once. Written to `bench/results/comparison.{md,json}` and `bench/results/comparison/`.
There, in `evaluated/`, is each finished system, so that a run which was stopped goes on. A result
whose artefact is not there counts while prompts, data, recipes and code are the same; one whose
artefact is there counts if that is the one that was measured.
"""

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from tqdm import tqdm

from bench import machine
from demo.smollm2 import NAME, load_smollm2
from mogu_kernels import evaluation, training
from mogu_kernels.evaluation import evaluate, figures, load_system, markdown, sets

RESULTS = Path("bench/results")
RECIPES = Path("recipes")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Compared(NamedTuple):
    """A row of the table.

    Attributes:
        label: its name in print.
        artefact: the folder of a seed that it needs, or None.
        defence: its name in `mogu_kernels.evaluation.DEFENCES`, or None.
    """

    label: str
    artefact: str | None = None
    defence: str | None = None


SYSTEMS = {
    "base": Compared("base"),
    "glad": Compared("glad only", "glad"),
    "unwill": Compared("unwill only", "unwill"),
    "mogu": Compared("MoGU", "mogu"),
    "mogu_v2": Compared("MoGU v2", "mogu_v2"),
    "sft": Compared("safety fine-tuning", "sft"),
    "led": Compared("LED", "led"),
    "dro": Compared("DRO", "dro"),
    "safe_decoding": Compared("SafeDecoding", "sft", "safe_decoding"),
    "rose": Compared("ROSE", None, "rose"),
    "self_reminder": Compared("self-reminder", None, "self_reminder"),
    "in_context": Compared("in-context defence", None, "in_context"),
    "retokenization": Compared("retokenization", None, "retokenization"),
    "input_detection": Compared("input detection", None, "input_detection"),
    "self_examination": Compared("self-examination", None, "self_examination"),
}


def compare(
    artefacts: Path,
    evaluated: Path,
    seeds: list[int],
    load: Callable[[], tuple[Any, Any]],
    settings: Mapping[str, Any],
    names: list[str],
    **data: Any,
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Evaluate every system that is there, or take it from an earlier run.

    Args:
        artefacts: the folder with one of each seed.
        evaluated: the folder of finished systems.
        seeds: of training.
        load: a fresh (model, tokenizer); every system gets its own.
        settings: keywords of `evaluate`, and anything else a result depends on: under "about" any,
            under "training" those with an artefact.
        names: of `SYSTEMS`.
        **data: `sets` and `prefixes` of `evaluate`.

    Returns:
        (results by system, one a seed; "SYSTEM, seed S" for what has no artefact).
    """
    options = {key: value for key, value in settings.items() if key not in ("about", "training")}
    results: dict[str, list[dict[str, Any]]] = {}
    missing = []
    # the prompts that sets.py gives are hashed themselves
    code = digest(Path(evaluation.__file__).parent, "*.py", but="sets.py")
    runs = [(name, seed) for name in names for seed in (seeds if SYSTEMS[name].artefact else [0])]
    bar = tqdm(runs)
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        _, artefact, defence = SYSTEMS[name]
        folder = artefacts / f"seed-{seed}" / artefact if artefact else None
        known = {**settings, "code": code}
        if folder is None:
            del known["training"]
        elif folder.is_dir():
            known["artefact"] = digest(folder)
        cache = evaluated / f"{name}-{seed}.json"
        result = _cached(cache, known)
        if result is None and folder is not None and not folder.is_dir():
            missing.append(f"{SYSTEMS[name].label}, seed {seed}")
            continue
        if result is None:
            system = load_system(*load(), folder, defence)
            result = evaluate(system, **data, **options, seed=seed)
            write(cache, {"settings": known, "result": result})
        results.setdefault(name, []).append(result)
    return results, missing


def digest(folder: Path, pattern: str = "*", *, but: str = "") -> str:
    """SHA-256 of a folder's files, names and bytes, but for one name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob(pattern) if p.is_file() and p.name != but):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write(path: Path, values: Any) -> None:
    """JSON, all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(json.dumps(values, indent=1) + "\n")
    half.replace(path)


def _cached(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """An earlier result, if all of `settings` was as it is now."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    known = json.loads(json.dumps(settings))
    return found["result"] if found["settings"].items() >= known.items() else None


def _without_prompts(results: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Results without the gates of single prompts, which only the figures need."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(own) for key, own in value.items() if key != "by_prompt"}
        return [kept(own) for own in value] if isinstance(value, list) else value

    return kept(dict(results))


def _page(table: str, settings: Mapping[str, Any], seeds: list[int], missing: list[str]) -> str:
    """The table with its circumstances."""
    way = "sampled at temperature 1" if settings["sample"] else "greedy"
    lines = [
        f"# Defences on {NAME} (dequantised from Q4_1)",
        "",
        f"Training seeds {', '.join(map(str, seeds))}; answers of {settings['max_new_tokens']} "
        f"tokens, {way}; {settings['about']['dtype']}. A refusal is one by the keyword rule: this "
        "model's other answers to malicious prompts are mostly incoherent, so they are not called "
        f"harmful. {platform.machine()}, torch {torch.__version__}, commit {machine.commit()}. "
        "Written by `python -m bench.comparison`.",
        "",
        table,
    ]
    if missing:
        lines += [f"Not trained, so not in the table: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artefacts", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--limit", type=int, default=100, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--sample", action="store_true", help="draw answers at temperature 1")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("medium")  # oneDNN's GEMMs: faster on some CPUs
    split, prefixes = sets.split(), sets.refusal_prefixes()
    settings = {
        "limit": asked.limit,
        "max_new_tokens": asked.max_new_tokens,
        "sample": asked.sample,
        "about": {
            "dtype": asked.dtype,
            "model": NAME,
            "test": _test_hashes(split.sha256),
            "prefixes": prefixes,
        },
        "training": {
            "recipes": digest(RECIPES, "smollm2*.yaml"),
            "baselines": digest(Path(__file__).parent, "artefacts.py"),
            "code": digest(Path(training.__file__).parent, "*.py"),
            "examples": {part: split.sha256[part] for part in ("train", "validation")},
        },
    }
    results, missing = compare(
        asked.artefacts,
        asked.out / "comparison" / "evaluated",
        asked.seeds,
        lambda: load_smollm2(DTYPES[asked.dtype]),
        settings,
        asked.systems,
        sets=split.test,
        prefixes=prefixes,
    )
    labels = {name: own.label for name, own in SYSTEMS.items()}
    page = _page(markdown(results, labels), settings, asked.seeds, missing)
    write(asked.out / "comparison.json", {**settings, "systems": _without_prompts(results)})
    (asked.out / "comparison.md").write_text(page)
    figures(results, asked.out / "comparison", labels)
    Console().print(page, markup=False)


def _test_hashes(sha256: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sha256.items() if name.startswith("test/")}


if __name__ == "__main__":
    main()
