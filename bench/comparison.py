"""Every defence on the real model: security, usability, perplexity; one table, two kinds of figure.

    python -m bench.comparison --artefacts DIR --seeds 0 1 2

`DIR/seed-S/` holds what training with seed S left: mogu, mogu_v2 (checkpoints), glad, unwill, sft,
led (PEFT LoRA folders) and dro (PEFT prompt tuning). All of them were trained on
the standard split, on whose held-out part everything is measured. What needs no training is
measured once. Written to `bench/results/comparison.{md,json}` and `bench/results/comparison/`.
There, in `evaluated/`, is each finished system, so that a run which was stopped goes on. A result
counts while prompts and code are the same, and the artefact has the bytes that were measured; where
that is not there, what it was made of must be the same (`bench.artefacts`). A row without any such
result shows those of an earlier training, marked.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from tqdm import tqdm

from bench import machine
from bench.artefacts import depends_on, digest, is_current, write
from demo.smollm2 import NAME, load_smollm2
from mogu_kernels import evaluation
from mogu_kernels.evaluation import evaluate, figures, load_system, markdown, sets

RESULTS = Path("bench/results")
SHOWN = 100  # prompts of each set
EARLIER = "\N{DAGGER}"  # marks results of an earlier training
ABOUT = """\
How the rows came about: trained baselines step 440 times, as many tokens as MoGU in all its
stages; v2 steps 660 times by the same count, in eight layers only, which takes about as long.
v2's refusal bias was chosen on prompts of StrongREJECT and of the edgy set that are not in the
table (`bench/results/refusal-bias.md`); MoGU's is 0, as published. LED is shown malicious prompts
alone and keeps what is best on such, so nothing keeps it from refusing all. DRO's soft prompt
stands before the chat template, its authors' within it as the system message. SafeDecoding's
expert is the row "unwill only": like its authors', it has seen refusals only. The jailbreaks are
long, the benign prompts short: refusing the style alone would do well here. What v2 does with
harmless role-plays is in `bench/results/refusal-bias.md`.
"""
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
    "safe_decoding": Compared("SafeDecoding", "unwill", "safe_decoding"),
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
    trained: Callable[[str], Any] = depends_on,
    **data: Any,
) -> tuple[dict[str, list[dict[str, Any]]], list[str], set[str]]:
    """Evaluate every system that is there, or take it from an earlier run.

    Args:
        artefacts: the folder with one of each seed.
        evaluated: the folder of finished systems.
        seeds: of training.
        load: a fresh (model, tokenizer); every system gets its own.
        settings: keywords of `evaluate`, and under "about" anything else a result depends on.
        names: of `SYSTEMS`.
        trained: what an artefact depends on, by its name.
        **data: `sets` and `prefixes` of `evaluate`.

    Returns:
        (results by system, one a seed; "SYSTEM, seed S" for what has no artefact; the systems
        whose results are of an earlier training, as there are none of today's).

    Raises:
        ValueError: what an artefact depends on has changed since.
    """
    options = {key: value for key, value in settings.items() if key != "about"}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    earlier: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    missing = []
    # the prompts that sets.py gives are hashed themselves; report.py comes after the measurement
    code = digest(Path(evaluation.__file__).parent, "*.py", but=("sets.py", "report.py"))
    runs = [(name, seed) for name in names for seed in (seeds if SYSTEMS[name].artefact else [0])]
    bar = tqdm(runs)
    for name, seed in bar:
        bar.set_description(f"{name}, seed {seed}")
        _, artefact, defence = SYSTEMS[name]
        folder = artefacts / f"seed-{seed}" / artefact if artefact else None
        training = {"training": trained(artefact)} if artefact else {}
        there = folder is not None and is_current(folder, training["training"])
        measured = {"artefact": digest(folder)} if folder and there else training
        known = {**settings, "code": code, **measured}
        cache = evaluated / f"{name}-{seed}.json"
        result = kept = _cached(cache, known)
        if kept is None and folder is not None and not there:
            missing.append(f"{SYSTEMS[name].label}, seed {seed}")
            if old := _cached(cache, {**settings, "code": code}):
                earlier[name].append(old)
            continue
        if kept is None:
            system = load_system(*load(), folder, defence)
            result = evaluate(system, **data, **options, seed=seed)
        if kept is None or there:  # the same bytes may have been made of something else
            write(cache, {"settings": known | training, "result": result})
        results[name].append(result)
    marked = {name for name in names if earlier[name] and not results[name]}
    rows = {name: earlier[name] if name in marked else results[name] for name in names}
    return {name: own for name, own in rows.items() if own}, missing, marked


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


def _page(
    table: str,
    settings: Mapping[str, Any],
    seeds: list[int],
    missing: list[str],
    earlier: set[str],
) -> str:
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
        ABOUT,
    ]
    if earlier:
        lines += [f"{EARLIER} Trained before the recipe or the code of training changed.", ""]
    if missing:
        lines += [f"Not measured with today's training: {'; '.join(missing)}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--artefacts", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--limit", type=int, default=SHOWN, help="prompts of each set")
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
    }
    results, missing, earlier = compare(
        asked.artefacts,
        asked.out / "comparison" / "evaluated",
        asked.seeds,
        lambda: load_smollm2(DTYPES[asked.dtype]),
        settings,
        asked.systems,
        sets=split.test,
        prefixes=prefixes,
    )
    labels = {name: own.label + EARLIER * (name in earlier) for name, own in SYSTEMS.items()}
    page = _page(markdown(results, labels), settings, asked.seeds, missing, earlier)
    training = {own.artefact: depends_on(own.artefact) for own in SYSTEMS.values() if own.artefact}
    write(
        asked.out / "comparison.json",
        {
            **settings,
            "training": training,
            "earlier": sorted(earlier),
            "systems": _without_prompts(results),
        },
    )
    (asked.out / "comparison.md").write_text(page)
    figures(results, asked.out / "comparison", labels)
    Console().print(page, markup=False)


def _test_hashes(sha256: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sha256.items() if name.startswith("test/")}


if __name__ == "__main__":
    main()
