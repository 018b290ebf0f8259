"""Figures: the right gates in the right place, any size, and pyplot left alone."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

import mogu_kernels as mk
from mogu_kernels import inspection, plots
from tests import tiny


def some_gates(layers, tokens, E=2, batch=1):
    generator = torch.Generator().manual_seed(0)
    return {
        f"model.layers.{layer}.self_attn.o_proj": torch.rand(batch, tokens, E, generator=generator)
        for layer in range(layers)
    }


def maps(figure):
    """The heat maps as arrays, top to bottom."""
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


def labels(axis):
    return [label.get_text() for label in axis.get_xticklabels()]


def test_every_gate_is_where_its_layer_and_token_are():
    gates = some_gates(3, 5, batch=2)
    figure = mk.plot_gates(gates, list("abcde"), sequence=1, prompt_tokens=3)
    for e, drawn in enumerate(maps(figure)):
        expected = torch.stack([own[1, :, e] for own in gates.values()])
        np.testing.assert_array_equal(drawn, expected.numpy())
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "gate of the glad expert",
        "gate of the unwill expert",
    ]
    assert labels(figure.axes[1]) == list("abcde")
    lines = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert lines == [2.5, 2.5]  # black below white
    assert len(figure.axes) == 3  # one colour bar


@pytest.mark.parametrize(
    ("layers", "tokens", "E"), [(1, 1, 1), (1, 200, 2), (80, 1, 2), (80, 200, 3), (2, 500, 2)]
)
@pytest.mark.filterwarnings("error")
def test_any_size_is_drawn(tmp_path, layers, tokens, E):
    figure = plots.plot_gates(
        some_gates(layers, tokens, E),
        [f"token{t}" for t in range(tokens)],
        expert_names=[f"expert{e}" for e in range(E)],
        prompt_tokens=tokens // 2,
        path=tmp_path / "gates.png",
    )
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    width, height = figure.get_size_inches()
    assert width <= plots.WIDEST
    assert height <= 25
    assert len(figure.axes[0].get_yticks()) <= plots.MOST_ROWS_NAMED
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[E - 1].get_xticklabels()]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))


def test_strange_tokens_are_drawn_in_one_short_line(tmp_path):
    strange = ["a\nb", "  ", "$x_1", "$\\frac$", "\N{CJK UNIFIED IDEOGRAPH-6F22}", "x" * 99]
    figure = plots.plot_gates(some_gates(2, 6), strange, path=tmp_path / "gates.png")
    shown = labels(figure.axes[1])
    assert shown[:5] == ["a\\nb", "_", "$x_1", "$\\frac$", "\N{WHITE SQUARE}"]
    assert len(shown[5]) == plots.LONGEST_NAME


def test_tokens_beyond_the_routed_ones_are_not_drawn():
    assert labels(plots.plot_gates(some_gates(2, 3), list("abcdef")).axes[1]) == list("abc")


def test_recorded_gates_of_a_model_are_drawn():
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model, ("o_proj", "up_proj")))
    ids = tiny.prompt(9)
    with mk.record_gates(model) as gates:
        out = mk.generate(model, ids, max_new_tokens=6, do_sample=False)
    figure = mk.plot_gates(gates, [str(int(t)) for t in out[0]], prompt_tokens=9)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(rows) == ["0.o_proj", "0.up_proj", "1.o_proj", "1.up_proj"]


def test_equal_gates_are_drawn_too(tmp_path):
    gates = {"model.layers.0.o_proj": torch.full((1, 4, 2), 0.5)}
    plots.plot_gates(gates, path=tmp_path / "gates.png")
    plots.plot_gate_distributions({"all": gates}, path=tmp_path / "distributions.png")
    assert (tmp_path / "distributions.png").is_file()


@pytest.mark.parametrize(
    ("gates", "options", "message"),
    [
        ({}, {}, "gates has no module"),
        ({"a": torch.rand(3, 2)}, {}, r"gates of a are \[3, 2\]"),
        ({"a": torch.rand(1, 0, 2)}, {}, "not empty"),
        (some_gates(1, 3, E=3), {}, "name each expert"),
        ({"a": torch.rand(1, 3, 2), "b": torch.rand(1, 4, 2)}, {}, "alike in every module"),
        (some_gates(1, 3), {"tokens": ["a"]}, "tokens has 1 strings but the gates 3"),
        (some_gates(1, 3), {"sequence": 1}, "sequence=1: take 0 to 0"),
        (some_gates(1, 3), {"prompt_tokens": 4}, "prompt_tokens=4: take 0 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(gates, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_gates(gates, **options)


def test_distributions_have_a_step_and_a_median_per_class(tmp_path):
    gates = {"benign": some_gates(2, 50), "malicious": torch.rand(7, 2).square()}
    figure = plots.plot_gate_distributions(gates, path=tmp_path / "distributions.png")
    for e, axis in enumerate(figure.axes):
        benign = torch.cat([own[0, :, e] for own in gates["benign"].values()])
        medians = [float(benign.median()), float(gates["malicious"][:, e].median())]
        assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(medians)
        named = [text.get_text() for text in axis.get_legend().get_texts()]
        assert named == [
            f"benign, median {medians[0]:.3f}",
            f"malicious, median {medians[1]:.3f}",
        ]
        assert len(axis.patches) == 2


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({}, "no class of prompts"),
        ({"benign": {}}, "'benign' are empty"),
        ({"benign": torch.rand(3, 5)}, r"'benign' are \[3, 5\]: take \[..., 2\]"),
    ],
)
def test_distributions_that_do_not_fit_are_refused(gates, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_gate_distributions(gates)


SOME_DEFENCES = {
    "base": [(1.0, 0.05)],
    "glad only": [(1.0, 0.03), (0.99, 0.02)],
    "unwill only": [(0.05, 1.0), (0.1, 0.98)],
    "fine-tuning": [(0.8, 0.9), (0.7, 0.92)],
    "MoGU": [(0.96, 0.95), (0.97, 0.93)],
    "MoGU v2": [(0.97, 0.94), (0.96, 0.92)],
} | {f"defence ${i}_x": [(0.95 + i / 200, 0.02 + i / 300)] for i in range(8)}


def test_a_frontier_has_a_point_a_name_and_bars_per_defence(tmp_path):
    figure = plots.plot_frontier(SOME_DEFENCES, path=tmp_path / "frontier.png")
    (axis,) = figure.axes
    means = {
        name: tuple(100 * sum(own[d] for own in seeds) / len(seeds) for d in (0, 1))
        for name, seeds in SOME_DEFENCES.items()
    }
    assert {text.get_text() for text in axis.texts} == set(SOME_DEFENCES)
    for text in axis.texts:
        assert text.xy == pytest.approx(means[text.get_text()])
    line = axis.lines[0]
    best = [
        means[name]
        for name in means
        if not any(
            other != means[name] and other[0] >= means[name][0] and other[1] >= means[name][1]
            for other in means.values()
        )
    ]
    drawn = list(zip(*line.get_data(), strict=True))
    assert drawn == [pytest.approx(point) for point in sorted(best)]
    bars = axis.containers[list(SOME_DEFENCES).index("unwill only")].lines[2]
    assert bars[0].get_segments()[0][:, 0].tolist() == pytest.approx([5.0, 10.0])
    assert bars[1].get_segments()[0][:, 1].tolist() == pytest.approx([98.0, 100.0])


def test_no_name_of_a_frontier_meets_another_or_leaves_the_axes():
    for points in (SOME_DEFENCES, {f"system {i}": [(0.5, 0.5)] for i in range(20)}):
        figure = plots.plot_frontier(points)
        figure.draw_without_rendering()
        (axis,) = figure.axes
        boxes = [super(type(text), text).get_window_extent() for text in axis.texts]
        assert all(not a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        frame = axis.get_window_extent()
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({}, "without any"),
        ({"base": []}, "without any"),
        ({"base": [(95.0, 5.0)]}, "take pairs of fractions"),
        ({"base": [(0.1, 0.2, 0.3)]}, "take pairs of fractions"),
    ],
)
def test_a_frontier_of_no_fractions_is_refused(points, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_frontier(points)


def test_layers_of_a_checkpoint(tmp_path):
    model = tiny.llama(num_hidden_layers=3)
    found = inspection.inspect_checkpoint(tiny.checkpoint(model, ("o_proj", "up_proj")))
    figure = plots.plot_layers(found, path=tmp_path / "layers.png")
    o_proj = [m for m in found["modules"] if m["name"].endswith("o_proj")]
    axes = [axis for axis in figure.axes if axis.get_title().startswith("o_proj: ")]
    for axis, key in zip(axes, ("update_norm", "gate_at_zero"), strict=True):
        for line, expert in zip(axis.lines, ("glad", "unwill"), strict=True):
            assert list(line.get_xdata()) == [0, 1, 2]
            assert list(line.get_ydata()) == [m[key][expert] for m in o_proj]
    assert len(figure.axes) == 4


def test_silent_experts_are_drawn_as_nothing(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    found = inspection.inspect_checkpoint(tiny.checkpoint(model, strength=0.0))
    figure = plots.plot_layers(found, path=tmp_path / "layers.png")
    assert figure.axes[0].get_ylim() == (0, 1)


def test_pyplot_and_the_backend_are_left_alone():
    program = """
import sys
import torch
import mogu_kernels as mk
assert "matplotlib" not in sys.modules
mk.plot_gates({"a": torch.rand(1, 3, 2)}, path="/dev/null")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
