"""The `mogu` command: answers, checkpoints, and what this machine does with them.

Exit codes: 0 good, 1 a mistake that one line on stderr names, 2 wrong usage. Progress bars are on
stderr, and only on a terminal; with `--json` stdout is one JSON document.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import mogu_kernels as mk
from mogu_kernels import doctor, inspection, plots
from mogu_kernels.hf import load_pretrained
from mogu_kernels.packages import PackageError, sha256_of
from mogu_kernels.router import split_gate_weight

try:
    import typer
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"mogu: {error.name} is missing: pip install 'mogu_kernels[cli]'")

ROOT = Path(__file__).parent.parent
EXTRAS = {"transformers": "hf", "peft": "train", "accelerate": "train", "yaml": "train"}
COLD_BYTES = 160e6  # of weights in one timed pass, more than a last cache holds
BENCH_RANK, BENCH_EXPERTS = 8, 2

app = typer.Typer(
    help="MoGU safety routing: attach a checkpoint, look into it, convert it, time it.",
    epilog='Example: mogu generate model-dir checkpoint-dir "Why is the sky blue?"',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
convert_app = typer.Typer(
    help="Convert PEFT folders and the published files, or back.",
    no_args_is_help=True,
)
app.add_typer(
    convert_app,
    name="convert",
    epilog="Example: mogu convert peft --glad g --unwill u --architecture LlamaForCausalLM out",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Checkpoint = Annotated[Path, typer.Argument(help="A folder that save_checkpoint wrote.")]
Out = Annotated[Path, typer.Argument(help="The folder to write.")]
Glad = Annotated[Path, typer.Option(help="PEFT folder of the glad (usable) responder.")]
Unwill = Annotated[Path, typer.Option(help="PEFT folder of the unwilling (safe) responder.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake is one line on stderr and exit code 1.

    Args:
        arguments: the command line without the program's name; `sys.argv`'s if None.

    Raises:
        SystemExit: always, with the exit code.
    """
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="mogu")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        sys.exit(f"mogu: {error.name} is missing: pip install 'mogu_kernels[{extra}]'")
    except (ValueError, TypeError, OSError, ImportError, PackageError) as error:
        sys.exit(f"mogu: {' '.join(str(error).split())}")


@app.command(epilog="Example: mogu demo")
def demo() -> None:
    """Answer three prompts on a real model: base, published, ours."""
    if not (ROOT / "demo" / "smollm2.py").is_file():
        raise ValueError(
            "the demo is in the repository's demo/ folder, which is not installed: clone the "
            "repository and run `make demo` there"
        )
    done = subprocess.run([sys.executable, "-m", "demo"], cwd=ROOT, check=False)
    raise typer.Exit(done.returncode)


@app.command(epilog='Example: mogu generate model-dir checkpoint-dir "Why is the sky blue?"')
def generate(
    model: Annotated[str, typer.Argument(help="A Hugging Face model: a folder or a hub id.")],
    checkpoint: Checkpoint,
    prompts: Annotated[list[str], typer.Argument(help="One or more.")],
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 128,
    routed_tokens: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Answer tokens to route; the checkpoint's by default."),
    ] = None,
    handoff: Annotated[
        Literal["shadow", "replay", "keep"] | None,
        typer.Option(help="How the base model takes over; mogu_kernels.generate's by default."),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens, not greedily.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draws; needs --sample.")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="If the tokenizer has one.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Answer prompts with a model and a checkpoint attached to it."""
    if seed is not None and not sample:
        raise ValueError(f"seed={seed}, but greedy decoding draws nothing: add --sample")
    loaded = mk.load_checkpoint(checkpoint)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "routed_tokens": _routed_tokens(routed_tokens, loaded.config.routed_tokens),
        "do_sample": sample,
    }
    if handoff is not None:
        options["handoff"] = handoff
    with tqdm(total=1 + len(prompts), desc="loading", disable=None, leave=False) as bar:
        language_model, tokenizer = load_pretrained(model)
        mk.attach(language_model, loaded)
        bar.update()
        bar.set_description("answering")
        if seed is not None:
            torch.manual_seed(seed)
        answers = []
        for prompt in prompts:
            ids = _encode(tokenizer, prompt, chat_template).to(language_model.device)
            record = mk.record_gates(language_model) if as_json else contextlib.nullcontext({})
            with record as gates:
                tokens = mk.generate(language_model, ids, **options)[0, ids.shape[1] :]
            names = loaded.config.expert_names
            answers.append(
                {
                    "prompt": prompt,
                    "answer": tokenizer.decode(tokens, skip_special_tokens=True),
                    "tokens": len(tokens),
                    "gates": _mean_gates(gates, names, ids.shape[1], options["routed_tokens"]),
                }
            )
            bar.update()
    if as_json:
        _print_json(answers)
        return
    for answer in answers:
        if len(answers) > 1:
            typer.echo(f"> {answer['prompt']}")
        typer.echo(answer["answer"])


@app.command("eval", epilog="Example: mogu eval model-dir checkpoint-dir --limit 50")
def measure(
    model: Annotated[str, typer.Argument(help="A Hugging Face model: a folder or a hub id.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A MoGU checkpoint, or a PEFT folder; the base if none.")
    ] = None,
    defence: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="self_reminder, in_context, retokenization, input_detection, self_examination, "
            "rose; safe_decoding with a PEFT folder.",
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="harmbench, strongreject, jailbreaks, alpaca, edgy; repeatable; all if none.",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Examples of your own, as for training, instead of these sets; repeatable."
        ),
    ] = None,
    template: Annotated[
        Literal["chat", "llama2"] | None,
        typer.Option(help="Of the prompts; that of the checkpoint's training, else chat."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each set, at most.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 32,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens, not greedily.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draws; needs --sample.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write eval.json, and gates.png if there are any, here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure refusal by prompt set, response perplexity and gates.

    The sets are public ones, read out of their packages and never stored with the results. What is
    chosen by a measurement, such as a recipe's refusal_bias, is better chosen on --data.
    """
    from mogu_kernels import evaluation, training

    if seed is not None and not sample:
        raise ValueError(f"seed={seed}, but greedy decoding draws nothing: add --sample")
    if defence not in (None, *evaluation.DEFENCES):
        raise ValueError(f"defence={defence!r}: take one of {', '.join(evaluation.DEFENCES)}")
    if checkpoint is not None and not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder: take a MoGU checkpoint or a PEFT folder")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    prompts: dict[str, Any] = {}
    for path in data or ():
        for example in training.read_examples(path):
            name = f"{path.stem}, {'malicious' if example.malicious else 'benign'}"
            prompts.setdefault(name, []).append(example)
    if sets or not data:
        test = evaluation.split().test
        if unknown := set(sets or ()) - set(test):
            names = ", ".join(test)
            raise ValueError(f"no set is named {sorted(unknown)[0]!r}: take any of {names}")
        prompts |= {name: test[name] for name in sets or test}
    system = evaluation.load_system(*load_pretrained(model), checkpoint, defence, template)
    settings = {
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "sample": sample,
        "seed": seed or 0,
    }
    found = evaluation.evaluate(system, prompts, prefixes=evaluation.refusal_prefixes(), **settings)
    found["measured"] = settings | {
        "model": model,
        "checkpoint": checkpoint and str(checkpoint),
        "defence": defence,
        "template": template,
    }
    if out is not None:
        (out / "eval.json").write_text(json.dumps(found, indent=2) + "\n")
        if "gates" in found:
            evaluation.draw_gates([found], path=out / "gates.png")
    if as_json:
        _print_json(found)
    else:
        typer.echo(doctor.aligned(evaluation.in_words(found)))


@app.command(epilog="Example: mogu train mogu.yaml out --model model-dir --data train.jsonl")
def train(
    recipe: Annotated[Path, typer.Argument(help="A .yaml or .json file of settings.")],
    out: Annotated[Path, typer.Argument(help="The folder of the run; a stopped one goes on.")],
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face model: a folder or a hub id; the recipe's.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Examples: .json, .jsonl, .csv or .parquet; repeatable; the recipe's."),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="Likewise; each stage keeps its best state on it; the recipe's."),
    ] = None,
) -> None:
    """Train a MoGU of a model: two responders, then the routers."""
    from mogu_kernels import training

    config = training.load_config(recipe)
    name = model or config.model
    files = {"data": data or config.data, "validation": validation or config.validation}
    if not name:
        raise ValueError(f"{recipe} names no model: add one, or say --model")
    if not files["data"]:
        raise ValueError(f"{recipe} names no data: add files, or say --data")
    examples = {
        kind: [example for path in paths for example in training.read_examples(path)]
        for kind, paths in files.items()
    }
    config = dataclasses.replace(
        config,
        model=Path(name).name if Path(name).is_dir() else name,
        **{kind: tuple(map(str, paths)) for kind, paths in files.items()},
    )
    hashes = {str(p): sha256_of(Path(p)) for paths in files.values() for p in paths}
    checkpoint = training.train(
        config,
        *load_pretrained(name),
        examples["data"],
        out,
        validation=examples["validation"],
        provenance={"data_sha256": hashes},
    )
    typer.echo(f"{out / 'checkpoint'}: {len(checkpoint.modules)} projections")
    for stage, metrics in checkpoint.config.provenance["metrics"].items():
        typer.echo(f"  {stage}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))


@app.command(epilog="Example: mogu inspect checkpoint-dir --plot layers.png")
def inspect(
    checkpoint: Checkpoint,
    plot: Annotated[
        Path | None, typer.Option(help="Draw updates and gates by layer into this PNG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a checkpoint holds, and how exact its folds are."""

    def bar(modules: list[str]) -> "tqdm[str]":
        return tqdm(modules, desc="modules", disable=None, leave=False)

    found = inspection.inspect_checkpoint(checkpoint, each=bar)
    if plot is not None:
        plots.plot_layers(found, path=plot)
    if as_json:
        _print_json(found)
    else:
        typer.echo(doctor.aligned(inspection.in_words(found)))


@convert_app.command(
    "peft",
    epilog="Example: mogu convert peft --glad g --unwill u --architecture LlamaForCausalLM out",
)
def convert_peft(
    out: Out,
    glad: Glad,
    unwill: Unwill,
    architecture: Annotated[str, typer.Option(help="Of the base, such as LlamaForCausalLM.")],
) -> None:
    """Make a checkpoint of two PEFT LoRA folders."""
    from mogu_kernels import convert

    experts = {"glad": glad, "unwill": unwill}
    _convert(lambda: convert.from_peft(experts, architecture=architecture), out)


@convert_app.command(
    "official", epilog="Example: mogu convert official --unwill u --glad g --router r.pth out"
)
def convert_official(
    out: Out,
    unwill: Unwill,
    glad: Glad,
    router: Annotated[Path, typer.Option(help="The published router's .pth file.")],
    architecture: Annotated[
        str | None, typer.Option(help="Of the base; Llama or Falcon by the router's names.")
    ] = None,
) -> None:
    """Make a checkpoint of the published files."""
    from mogu_kernels import convert

    _convert(lambda: convert.from_official(unwill, glad, router, architecture=architecture), out)


@convert_app.command("export", epilog="Example: mogu convert export checkpoint-dir out")
def convert_export(checkpoint: Checkpoint, out: Out) -> None:
    """Write a checkpoint's experts as PEFT LoRA folders."""
    from mogu_kernels import convert

    with tqdm(total=2, desc="reading", disable=None, leave=False) as bar:
        loaded = mk.load_checkpoint(checkpoint)
        bar.update()
        bar.set_description("writing")
        folders = convert.to_peft(loaded, out)
        bar.update()
    for expert, folder in folders.items():
        typer.echo(f"{expert}: {folder}")


@app.command("doctor", epilog="Example: mogu doctor --json")
def diagnose(as_json: Json = False) -> None:
    """Tell what this machine will use, and why."""
    findings = doctor.diagnose()
    if as_json:
        _print_json(findings)
    else:
        typer.echo(doctor.aligned(findings))


@app.command(epilog="Example: mogu bench --quick")
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="The smallest size only.")] = False,
    as_json: Json = False,
) -> None:
    """Time one routed decode step beside F.linear, on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes, rounds = ((576,), 7) if quick else ((576, 2048, 4096), 15)
    rows = []
    for size in tqdm(sizes, desc="sizes", disable=None, leave=False):
        low, ratio, high = statistics.quantiles(
            _ratios(size, rounds, device, dtype), n=4, method="inclusive"
        )
        rows.append({"size": size, "ratio": ratio, "low": low, "high": high})
    about = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "experts": BENCH_EXPERTS,
        "rank": BENCH_RANK,
        "rounds": rounds,
    }
    if as_json:
        _print_json({"machine": doctor.diagnose(), **about, "sizes": rows})
        return
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    typer.echo("One token through a routed projection, times F.linear; cold weights.")
    typer.echo(f"Medians and quartiles of interleaved rounds, on this machine only: {told}.")
    ratios = (f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in rows)
    names = (f"{r['size']} x {r['size']}" for r in rows)
    typer.echo(doctor.aligned(dict(zip(names, ratios, strict=True))))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _routed_tokens(option: str | None, own: int | None) -> int | None:
    """What `generate` takes, of the option's text and the checkpoint's own number."""
    if option is None:
        return own
    if option == "all":
        return None
    if not option.isdecimal():
        raise typer.BadParameter(f"{option!r}: take a number or all", param_hint="--routed-tokens")
    return int(option)


def _encode(tokenizer: Any, prompt: str, chat_template: bool) -> Tensor:
    """Token ids [1, tokens], as a chat turn where that is wanted and known."""
    if chat_template and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if not encoded["input_ids"].numel():
        raise ValueError(f"the prompt {prompt!r} has no tokens: write one")
    return encoded["input_ids"]


def _mean_gates(
    gates: dict[str, Tensor], names: tuple[str, ...], prompt: int, routed: int | None
) -> dict[str, float]:
    """Mean gate by expert over modules and the positions that gave the routed answer tokens."""
    last = None if routed is None else prompt - 1 + routed
    own = [gate[0, prompt - 1 : last].float() for gate in gates.values()]
    if not own:
        return {}
    return dict(zip(names, torch.cat(own).mean(0).tolist(), strict=True))


def _convert(read: Callable[[], mk.MoGUCheckpoint], out: Path) -> None:
    """Save what `read` returns, and say so."""
    with tqdm(total=2, desc="reading", disable=None, leave=False) as bar:
        checkpoint = read()
        bar.update()
        bar.set_description("writing")
        mk.save_checkpoint(checkpoint, out)
        bar.update()
    config = checkpoint.config
    typer.echo(
        f"{out}: {len(checkpoint.modules)} projections ({', '.join(config.target_modules)}), "
        f"experts {', '.join(config.expert_names)}, router {config.router}"
    )


@torch.no_grad()
def _ratios(size: int, rounds: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Time of one routed token over that of `F.linear`, one ratio a round, after a warm-up."""
    E, rank = BENCH_EXPERTS, BENCH_RANK
    layers = []
    for _ in range(max(2, int(COLD_BYTES / (size * size * dtype.itemsize)) + 1)):
        weight, lora_A, lora_B = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((size, size), (E, rank, size), (size, E, rank))
        )
        gate_weight, gate_bias = torch.randn(E, size, device=device), torch.zeros(E, device=device)
        if device.type == "cuda":
            gate_weight = split_gate_weight(gate_weight, dtype)
        # MoGULinear keeps lora_B with the outputs first in memory
        layers.append((weight, None, lora_A, lora_B.transpose(0, 1), gate_weight, gate_bias))
    x = torch.randn(1, size, device=device, dtype=dtype)

    def seconds(step: Callable[..., Any]) -> float:
        start = time.perf_counter()
        for layer in layers:
            step(*layer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ratios = []
    for turn in range(1 + rounds):
        linear = seconds(lambda weight, *_: F.linear(x, weight))
        routed = seconds(lambda *layer: mk.ops.mogu_linear(x, *layer, scaling=2.0))
        if turn:
            ratios.append(routed / linear)
    return ratios


if __name__ == "__main__":
    main()
