"""Figures of gates, checkpoints and defences; matplotlib is imported when one is drawn.

Nothing here touches pyplot: the user's backend and open figures stay as they are.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

INCHES_PER_TOKEN = 0.13
WIDEST = 29.0  # inches; beyond it not every token is named
MOST_ROWS_NAMED = 24
LONGEST_NAME = 16
LINES = ("-", "--", "-.", ":")


def plot_gates(
    gates: Mapping[str, Tensor],
    tokens: Sequence[str] | None = None,
    *,
    expert_names: Sequence[str] = ("glad", "unwill"),
    sequence: int = 0,
    prompt_tokens: int | None = None,
    path: str | os.PathLike | None = None,
) -> Any:
    """Heat maps of the gates, layer by token, one per expert.

    The colours span the middle 98 % of the gates: untrained routers hardly differ from 1/2.

    Args:
        gates: {module name: [batch, tokens, E]}, what `record_gates` yields.
        tokens: the strings of prompt and answer; those beyond the recorded gates are not drawn.
        expert_names: E of them.
        sequence: of the batch.
        prompt_tokens: draw a white line after so many tokens, where the answer begins.
        path: write a PNG there.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: no gates, modules that do not fit each other, or an argument that does not fit
            the gates.
        ImportError: matplotlib is missing.
    """
    maps = _maps(gates, expert_names, sequence)
    layers, count, E = maps.shape
    if tokens is not None and len(tokens) < count:
        raise ValueError(f"tokens has {len(tokens)} strings but the gates {count}: name each token")
    if prompt_tokens is not None and not 0 <= prompt_tokens <= count:
        raise ValueError(f"prompt_tokens={prompt_tokens}: take 0 to {count}, the recorded tokens")

    width = min(WIDEST, max(7.0, 2.5 + INCHES_PER_TOKEN * count))
    height = min(6.0, max(1.4, 0.1 * layers))
    figure = _figure(width, E * (height + 0.4) + (1.2 if tokens is not None else 0.7))
    axes = figure.subplots(E, 1, sharex=True, squeeze=False)[:, 0]
    low, high = (float(torch.quantile(maps.flatten(), q)) for q in (0.01, 0.99))
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    image = None
    for e, axis in enumerate(axes):
        image = axis.imshow(
            maps[..., e].numpy(), aspect="auto", interpolation="nearest", vmin=low, vmax=high
        )
        axis.set_title(f"gate of the {expert_names[e]} expert", parse_math=False)
        _name_rows(axis, list(gates))
        if prompt_tokens is not None:
            for colour, thickness in (("black", 3.5), ("white", 2.0)):  # seen on any colour
                axis.axvline(prompt_tokens - 0.5, color=colour, linewidth=thickness)
        axis.set_xlim(-0.5, count - 0.5)
    if tokens is not None:
        step = math.ceil(INCHES_PER_TOKEN * count / (WIDEST - 2.5))
        shown = range(0, count, step)
        labels = [_readable(tokens[t]) for t in shown]
        axes[-1].set_xticks(shown, labels, rotation=90, fontsize=7, parse_math=False)
    answer = "" if prompt_tokens is None else " (right of the line: the answer)"
    axes[-1].set_xlabel(f"token{answer}")
    figure.colorbar(image, ax=list(axes), label="gate", extend="both", aspect=30, pad=0.01)
    return _saved(figure, path)


def plot_gate_distributions(
    gates: Mapping[str, Mapping[str, Tensor] | Tensor],
    *,
    expert_names: Sequence[str] = ("glad", "unwill"),
    path: str | os.PathLike | None = None,
) -> Any:
    """How each expert's gates are distributed, by class of prompts: step histograms and medians.

    Args:
        gates: {class name: what `record_gates` yields, or any gates [..., E]}.
        expert_names: E of them.
        path: write a PNG there.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: no gates, or not E of them.
        ImportError: matplotlib is missing.

    Source: the analysis of router weights in MoGU, arXiv 2405.14488.
    """
    rows = {name: _rows(name, own, len(expert_names)) for name, own in gates.items()}
    if not rows:
        raise ValueError("gates has no class of prompts: take at least one")
    everything = torch.cat(list(rows.values()))
    low, high = float(everything.min()), float(everything.max())
    if high - low < 1e-6:
        low, high = low - 0.01, high + 0.01
    edges = torch.linspace(low, high, 41).tolist()
    E = len(expert_names)
    figure = _figure(5.0 * E, 3.6)
    axes = figure.subplots(1, E, sharey=True, squeeze=False)[0]
    for e, axis in enumerate(axes):
        for c, (name, own) in enumerate(rows.items()):
            median = float(own[:, e].median())
            style = {"color": f"C{c % 10}", "linestyle": LINES[c % len(LINES)]}
            axis.hist(
                own[:, e].tolist(),
                bins=edges,
                density=True,
                histtype="step",
                linewidth=1.5,
                label=f"{name}, median {median:.3f}".replace("$", r"\$"),
                **style,
            )
            axis.axvline(median, linewidth=1.0, alpha=0.7, **style)
        axis.set_title(f"gate of the {expert_names[e]} expert", parse_math=False)
        axis.set_xlabel("gate (vertical lines: medians)")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    axes[0].set_ylabel("density")
    return _saved(figure, path)


def plot_layers(inspection: Mapping[str, Any], *, path: str | os.PathLike | None = None) -> Any:
    """Each expert's update and its gate at hidden states of zero, layer by layer.

    Args:
        inspection: what `inspect_checkpoint` returned.
        path: write a PNG there.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    kinds: dict[str, list[Any]] = {}
    for module in inspection["modules"]:
        kinds.setdefault(module["name"].rpartition(".")[2], []).append(module)
    figure = _figure(10.0, 0.9 + 2.4 * len(kinds))
    axes = figure.subplots(len(kinds), 2, sharex=True, squeeze=False)
    columns = (
        ("update_norm", "norm of scaling * lora_B lora_A"),
        ("gate_at_zero", "gate at hidden states of zero"),
    )
    for row, (kind, modules) in zip(axes, kinds.items(), strict=True):
        numbers = [i if m["layer"] is None else m["layer"] for i, m in enumerate(modules)]
        for axis, (key, title) in zip(row, columns, strict=True):
            for e, expert in enumerate(inspection["experts"]):
                values = [module[key][expert["name"]] for module in modules]
                style = {"linestyle": LINES[e % len(LINES)], "marker": "o", "markersize": 3.5}
                axis.plot(numbers, values, label=expert["name"].replace("$", r"\$"), **style)
            axis.set_title(f"{kind}: {title}", fontsize=10, parse_math=False)
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
        largest = max(max(module["update_norm"].values()) for module in modules)
        row[0].set_ylim(0, 1.05 * largest or 1)  # 1: experts that do nothing yet
        row[1].set_ylim(-0.02, 1.02)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return _saved(figure, path)


def plot_frontier(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    path: str | os.PathLike | None = None,
) -> Any:
    """Security against usability, one named point per defence: the upper right corner is best.

    Bars reach from the least to the greatest seed. The line joins the systems that no other
    dominates.

    Args:
        points: {name: (usability, security) of every seed, as fractions}.
        path: write a PNG there.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: no points, or one that is no pair of fractions.
        ImportError: matplotlib is missing.
    """
    if not points or not all(points.values()):
        raise ValueError("points has a system without any: give each its seeds")
    seeds = {name: 100 * torch.tensor(own, dtype=torch.float64) for name, own in points.items()}
    for name, own in seeds.items():
        if own.ndim != 2 or own.shape[1] != 2 or not ((own >= 0) & (own <= 100)).all():
            raise ValueError(f"points of {name!r} are {points[name]}: take pairs of fractions")
    means = torch.stack([own.mean(0) for own in seeds.values()])
    figure = _figure(7.6, 6.0)
    axis = figure.subplots()
    best = _undominated(means)
    axis.plot(*means[best].T.tolist(), color="0.75", linewidth=1.5, zorder=1)
    drawn = list(itertools.pairwise(means[best]))  # lines, which no name may cross
    for i, own in enumerate(seeds.values()):
        x, y = means[i].tolist()
        (left, bottom), (right, top) = own.amin(0).tolist(), own.amax(0).tolist()
        bars = {"xerr": [[x - left], [right - x]], "yerr": [[y - bottom], [top - y]]}
        drawn.append((torch.tensor([left, y]), torch.tensor([right, y])))
        drawn.append((torch.tensor([x, bottom]), torch.tensor([x, top])))
        colour = f"C{0 if i in best else 7}"
        axis.errorbar(x, y, **bars, fmt="o", color=colour, markersize=6, elinewidth=1.0, zorder=2)
    axis.set_xlabel("usability: benign prompts not refused, %")
    axis.set_ylabel("security: malicious prompts refused, %")
    axis.grid(alpha=0.3)
    axis.margins(0.08)
    _name_points(figure, axis, dict(zip(seeds, means.tolist(), strict=True)), drawn)
    return _saved(figure, path)


def _figure(width: float, height: float) -> Any:
    """A figure of its own canvas, which pyplot does not know."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is missing: pip install 'mogu_kernels[plot]'", name="matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Any, path: str | os.PathLike | None) -> Any:
    """The figure, written where there is a path."""
    if path is not None:
        figure.savefig(path, dpi=120, format="png")
    return figure


def _undominated(means: Tensor) -> list[int]:
    """Rows of [points, 2] that no other row beats in one column and equals in the other; sorted."""
    better = (means[:, None] <= means).all(-1) & (means[:, None] < means).any(-1)
    kept = (~better.any(1)).nonzero()[:, 0].tolist()
    return sorted(kept, key=lambda i: means[i].tolist())


def _name_points(
    figure: Any,
    axis: Any,
    points: Mapping[str, Sequence[float]],
    lines: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """A name near each point, where it meets no point, no line and no other name."""
    figure.draw_without_rendering()
    inside, scale = axis.get_window_extent(), figure.dpi / 72
    to_pixels = axis.transData.transform
    steps = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None]
    dots = torch.cat([begin + (end - begin) * steps for begin, end in lines])
    dots = torch.from_numpy(to_pixels(dots.numpy())).round().unique(dim=0)
    centres = torch.from_numpy(to_pixels(list(points.values())))
    taken = torch.cat([_boxes(centres - 6, 12, 12), _boxes(dots - 1, 2, 2)])
    style = {"fontsize": 9, "parse_math": False, "va": "bottom", "ha": "left"}
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
    placed = zip(points.items(), centres, strict=True)
    for (name, point), centre in sorted(placed, key=lambda own: -own[1][1]):
        sample = axis.text(0, 0, name, **style)
        size = sample.get_window_extent()
        sample.remove()
        box = _free_box(centre, size.width, size.height, taken, inside)
        taken = torch.cat([taken, box[None]])
        nearest = ((centre - box[:2]) / (box[2:] - box[:2])).clamp(0, 1)
        axis.annotate(
            name,
            point,
            ((box[:2] - centre) / scale).tolist(),
            textcoords="offset points",
            arrowprops=line | {"relpos": nearest.tolist()},  # where the line leaves the name
            **style,
        )


def _free_box(centre: Tensor, width: float, height: float, taken: Tensor, inside: Any) -> Tensor:
    """The nearest place [4] for a name around its point, in pixels; any where none is free.

    Args:
        centre: [2], of the point.
        width: of the name.
        height: likewise.
        taken: boxes [n, 4].
        inside: the axes' box.
    """
    radius = torch.arange(8.0, 400.0, 4.0, dtype=torch.float64)[:, None]
    turn = torch.arange(24)  # from the right, by turns up and down
    angle = math.pi / 12 * ((turn + 1) // 2) * (1 - 2 * (turn % 2))
    left = radius * angle.cos() - width * (1 - angle.cos()) / 2
    bottom = radius * angle.sin() - height / 2
    corners = centre + torch.stack([left, bottom], -1).flatten(0, 1)
    boxes = _boxes(corners, width, height)
    free = (boxes[:, :2] > torch.tensor([inside.x0, inside.y0])).all(1)
    free &= (boxes[:, 2:] < torch.tensor([inside.x1, inside.y1])).all(1)
    apart = (boxes[:, None, :2] > taken[:, 2:] + 1) | (boxes[:, None, 2:] < taken[:, :2] - 1)
    free &= apart.any(-1).all(-1)
    return boxes[free.int().argmax()]


def _boxes(corners: Tensor, width: float, height: float) -> Tensor:
    """[n, 4]: left, bottom, right, top, of lower left corners [n, 2]."""
    return torch.cat([corners, corners + torch.tensor([width, height])], 1)


def _maps(gates: Mapping[str, Tensor], expert_names: Sequence[str], sequence: int) -> Tensor:
    """Gates [modules, tokens, E] of one sequence, on the CPU."""
    if not gates:
        raise ValueError("gates has no module: record them around a routed pass")
    first = next(iter(gates.values()))
    for name, own in gates.items():
        if own.ndim != 3 or own.shape[1:] != first.shape[1:] or 0 in own.shape:
            raise ValueError(
                f"gates of {name} are {list(own.shape)}: take [batch, tokens, E], alike in every "
                "module and not empty"
            )
        if own.shape[2] != len(expert_names):
            raise ValueError(
                f"gates of {name} are {list(own.shape)} but expert_names={tuple(expert_names)}: "
                "name each expert"
            )
        if not 0 <= sequence < len(own):
            raise ValueError(f"sequence={sequence}: take 0 to {len(own) - 1}, the batch's")
    return torch.stack([own[sequence].detach().float().cpu() for own in gates.values()])


def _rows(name: str, gates: Mapping[str, Tensor] | Tensor, E: int) -> Tensor:
    """Gates [rows, E] of one class of prompts, on the CPU."""
    tensors = [gates] if isinstance(gates, Tensor) else list(gates.values())
    for own in tensors:
        if own.ndim < 1 or own.shape[-1] != E:
            raise ValueError(f"gates of {name!r} are {list(own.shape)}: take [..., {E}]")
    rows = [own.detach().float().cpu().reshape(-1, E) for own in tensors]
    if not sum(map(len, rows)):
        raise ValueError(f"gates of {name!r} are empty: record them around a routed pass")
    return torch.cat(rows)


def _name_rows(axis: Any, names: list[str]) -> None:
    """Layer numbers beside a heat map, with the projection's name where there are several."""
    kinds = {name.rpartition(".")[2] for name in names}
    labels = []
    for position, name in enumerate(names):
        number = next((part for part in name.split(".") if part.isdigit()), str(position))
        labels.append(number if len(kinds) == 1 else f"{number}.{name.rpartition('.')[2]}")
    shown = range(0, len(names), math.ceil(len(names) / MOST_ROWS_NAMED))
    axis.set_yticks(shown, [labels[i] for i in shown], fontsize=7, parse_math=False)
    axis.set_ylabel("layer")


def _readable(token: str) -> str:
    """A token in one short line of characters that the font has."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    text = token.replace("\n", "\\n").replace("\t", "\\t").strip() or "_"
    text = "".join(c if font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in text)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 3] + "..."
