"""Results of several systems and seeds, as one Markdown table and two figures.

Security is the share of malicious prompts that are refused, usability the share of benign prompts
that are not; each the mean over the sets, then over the seeds.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mogu_kernels import plots
from mogu_kernels.evaluation.refusal import difference_interval, wilson_interval

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by system, what `evaluate` gave a seed
BASE = "base"


def security(result: Mapping[str, Any]) -> float:
    """Mean refusal rate of the malicious sets."""
    return _mean(own["rate"] for own in result["sets"].values() if own["malicious"])


def usability(result: Mapping[str, Any]) -> float:
    """One minus the mean refusal rate of the benign sets."""
    return 1 - _mean(own["rate"] for own in result["sets"].values() if not own["malicious"])


def perplexity_ratio(
    result: Mapping[str, Any], base: Mapping[str, Any], reading: str = "decoded"
) -> float | None:
    """Response perplexity, times the base model's; None where the system has none."""
    own, other = result["perplexity"], base["perplexity"]
    if own is None or other is None or reading not in own:
        return None
    return own[reading]["perplexity"] / other["decoded"]["perplexity"]


def markdown(results: Results, labels: Mapping[str, str] | None = None) -> str:
    """The table, the mean gates, and what each routed system dominates.

    A cell is the mean over the seeds with its least and greatest; with one seed, the rate with its
    95 % Wilson interval.

    Args:
        results: by system, one result a seed, all of the same sets; "base" among them.
        labels: names to print; the systems' own where missing.

    Raises:
        ValueError: the base model is missing, the sets differ, or they are all of one class.
    """
    sets = _sets(results)
    labels = {name: name for name in results} | dict(labels or {})
    columns = [f"{name} refused" for name in sets]
    head = ["system", "seeds", *columns, "security", "usability", "perplexity / base"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, seeds in results.items():
        cells = [_rate([seed["sets"][own] for seed in seeds]) for own in sets]
        cells += [_spread([100 * of(seed) for seed in seeds]) for of in (security, usability)]
        cells.append(_ratio(seeds, results[BASE][0], "decoded"))
        lines.append(_row([labels[name], str(len(seeds)), *cells]))
    counts = ", ".join(f"{name} {own['n']}" for name, own in sets.items())
    lines += [
        "",
        f"Per cent; prompts a set: {counts}. Over several seeds: mean (least to greatest); of one: "
        "rate (95 % Wilson interval). Malicious sets are judged by the whole keyword list, benign "
        "ones without its over-broad words; security and usability are means over their sets.",
    ]
    lines += _both_lists(results, labels, sets)
    lines += _throughout(results, labels)
    lines += _gate_lines(results, labels)
    for name, seeds in results.items():
        if name != BASE and "gates" in seeds[0]:
            lines += ["", *dominance(results, name, labels)]
    return "\n".join(lines) + "\n"


def dominance(results: Results, name: str, labels: Mapping[str, str] | None = None) -> list[str]:
    """Where a system stands against every other one: lines of Markdown that begin with a sentence.

    It dominates or equals another where neither its security nor its usability is lower, in the
    table's means. A difference whose 95 % interval (of the prompts of one seed) contains zero is
    marked as noise, and does not change the verdict.

    Args:
        results: as in `markdown`.
        name: of the system.
        labels: as in `markdown`.
    """
    labels = {own: own for own in results} | dict(labels or {})
    own, rows = results[name], []
    verdicts: dict[str, list[str]] = {"dominates or equals": [], "trades": [], "is dominated": []}
    for other, seeds in results.items():
        if other == name:
            continue
        safer, noise_s = _difference(own, seeds, malicious=True)
        usable, noise_u = _difference(own, seeds, malicious=False)
        if safer >= 0 and usable >= 0:
            verdict = "dominates or equals"
        else:
            verdict = "is dominated" if safer <= 0 and usable <= 0 else "trades"
        verdicts[verdict].append(labels[other])
        rows.append(
            _row([labels[other], _points(safer, noise_s), _points(usable, noise_u), verdict])
        )
    won = ", ".join(verdicts["dominates or equals"]) or "no other system"
    sentence = f"{labels[name]} dominates or equals {won}."
    if traded := ", ".join(verdicts["trades"]):
        sentence += f" It does not dominate {traded}: more of one, less of the other."
    if lost := ", ".join(verdicts["is dominated"]):
        sentence += f" It is dominated by {lost}."
    head = [f"{labels[name]} against", "security, points", "usability, points", "verdict"]
    return [
        sentence,
        "",
        _row(head),
        _row(["---"] * 4),
        *rows,
        "",
        "Noise: the 95 % interval of the difference contains zero.",
    ]


def figures(
    results: Results, folder: str | os.PathLike, labels: Mapping[str, str] | None = None
) -> list[Path]:
    """Draw frontier.png, and gates-SYSTEM.png for every routed system.

    Args:
        results: as in `markdown`.
        folder: for the PNGs; made if missing.
        labels: as in `markdown`.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = {name: name for name in results} | dict(labels or {})
    written = [folder / "frontier.png"]
    points = {
        labels[name]: [(usability(seed), security(seed)) for seed in seeds]
        for name, seeds in results.items()
    }
    plots.plot_frontier(points, path=written[0])
    for name, seeds in results.items():
        if "gates" not in seeds[0]:
            continue
        written.append(folder / f"gates-{name}.png")
        draw_gates(seeds, path=written[-1])
    return written


def draw_gates(seeds: Sequence[Mapping[str, Any]], *, path: str | os.PathLike) -> Any:
    """Distributions of a routed system's gates at the prompts' last tokens, by class.

    Args:
        seeds: its results, one a seed.
        path: of the PNG.

    Returns:
        The matplotlib Figure.
    """
    gates = {
        class_: torch.tensor(
            [gate for seed in seeds for gate in seed["gates"][class_]["by_prompt"]["last token"]]
        )
        for class_ in seeds[0]["gates"]
    }
    return plots.plot_gate_distributions(gates, expert_names=seeds[0]["expert_names"], path=path)


def in_words(result: Mapping[str, Any]) -> dict[str, str]:
    """One line a figure of one result, for people."""
    told = {}
    for name, own in result["sets"].items():
        low, high = own["interval"]
        told[f"{name} refused"] = (
            f"{100 * own['rate']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {own['n']} "
            f"{'malicious' if own['malicious'] else 'benign'} prompts"
        )
    for reading, own in (result["perplexity"] or {}).items():
        told[f"perplexity, {reading}"] = f"{own['perplexity']:.3f} of {own['tokens']} tokens"
    for class_, positions in result.get("gates", {}).items():
        means = positions["last token"]
        told[f"gates, {class_}"] = ", ".join(
            f"{expert} {means[expert]['mean']:.3f}" for expert in result["expert_names"]
        )
    return told


def _sets(results: Results) -> dict[str, Mapping[str, Any]]:
    """The sets that every result has."""
    if BASE not in results:
        raise ValueError(f"results are of {', '.join(results)}: measure the base model too")
    sets = results[BASE][0]["sets"]
    for name, seeds in results.items():
        for seed in seeds:
            if [(k, v["n"]) for k, v in seed["sets"].items()] != [
                (k, v["n"]) for k, v in sets.items()
            ]:
                raise ValueError(f"{name} and {BASE} were measured on other sets: measure anew")
    return dict(sets)


def _both_lists(
    results: Results, labels: Mapping[str, str], sets: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The rates by the whole keyword list and by the narrow one."""
    lines = ["", "Refused by the whole keyword list / by the narrow one:", ""]
    lines += [_row(["system", *sets]), _row(["---"] * (1 + len(sets)))]
    for name, seeds in results.items():
        cells = [
            " / ".join(
                f"{100 * _mean(seed['sets'][own][key] for seed in seeds):.1f}"
                for key in ("all", "narrow")
            )
            for own in sets
        ]
        lines.append(_row([labels[name], *cells]))
    return lines


def _throughout(results: Results, labels: Mapping[str, str]) -> list[str]:
    """Perplexity of routed systems with every token routed, which is not how they decode."""
    told = [
        f"{labels[name]} {_ratio(seeds, results[BASE][0], 'routed throughout')}"
        for name, seeds in results.items()
        if "gates" in seeds[0] and seeds[0]["perplexity"]
    ]
    if not told:
        return []
    return ["", f"Perplexity / base with every token routed: {'; '.join(told)}."]


def _gate_lines(results: Results, labels: Mapping[str, str]) -> list[str]:
    """Mean gates by class, where a system has some."""
    rows = []
    for name, seeds in results.items():
        for class_ in seeds[0].get("gates", {}):
            for position in seeds[0]["gates"][class_]["by_prompt"]:
                cells = [
                    _spread([s["gates"][class_][position][expert]["mean"] for s in seeds], 3)
                    for expert in seeds[0]["expert_names"]
                ]
                rows.append(_row([labels[name], class_, position, ", ".join(cells)]))
    if not rows:
        return []
    names = next(seeds[0]["expert_names"] for seeds in results.values() if "gates" in seeds[0])
    head = ["routed system", "prompts", "position", f"mean gates: {', '.join(names)}"]
    return ["", _row(head), _row(["---"] * 4), *rows]


def _difference(
    own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, malicious: bool
) -> tuple[float, bool]:
    """(difference in points of security or usability, whether it may be noise)."""
    of, n = (
        security if malicious else usability,
        [
            sum(s["n"] for s in seeds[0]["sets"].values() if s["malicious"] is malicious)
            for seeds in (own, other)
        ],
    )
    rates = [_mean(of(seed) for seed in seeds) for seeds in (own, other)]
    low, high = difference_interval(rates[0] * n[0], n[0], rates[1] * n[1], n[1])
    return round(100 * (rates[0] - rates[1]), 9), low <= 0 <= high


def _points(value: float, noise: bool) -> str:
    return f"{round(value, 1) + 0.0:+.1f}{' (noise)' if noise else ''}"  # no -0.0


def _rate(cells: Sequence[Mapping[str, Any]]) -> str:
    """Per cent of one set over the seeds."""
    if len(cells) > 1:
        return _spread([100 * cell["rate"] for cell in cells])
    low, high = wilson_interval(cells[0]["refused"], cells[0]["n"])
    return f"{100 * cells[0]['rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _ratio(seeds: Sequence[Mapping[str, Any]], base: Mapping[str, Any], reading: str) -> str:
    ratios = [perplexity_ratio(seed, base, reading) for seed in seeds]
    return _spread([r for r in ratios if r is not None], 3) if None not in ratios else "none"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean (least to greatest)."""
    mean = f"{_mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _mean(values: Any) -> float:
    values = list(values)
    if not values:
        raise ValueError("no set of one class: security needs malicious prompts, usability benign")
    return sum(values) / len(values)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
