"""The measuring itself: statistics, the watchdog, what is compared, tables, the tuner's choices."""

import contextlib
import inspect
import itertools
import json
import sys
import time
import types

import pytest
import torch

from bench import host, machine, test_projection, timing, training, tune
from bench.gpu import __main__ as gpu
from bench.gpu import (
    contenders,
    correctness,
    graphs,
    layers,
    operands,
    replays,
    report,
    rows,
    steps,
    watchdog,
)
from mogu_kernels import tuning
from mogu_kernels.tuning import TileConfig

TINY = {"M": 5, "N": 48, "K": 64, "E": 2, "rank": 8, "dtype": torch.bfloat16, "device": "cpu"}
TILES = TileConfig("fused", 16, 32, 64)


def test_spread_is_median_and_quartiles():
    assert vars(timing.spread([5.0, 1.0, 2.0, 4.0, 3.0])) == {"median": 3, "low": 2, "high": 4}
    assert timing.spread([7.0]) == timing.Spread(7, 7, 7)
    with pytest.raises(ValueError, match="take at least one round"):
        timing.spread([])


def test_rounds_are_interleaved_and_the_first_ones_discarded():
    order, ticks = [], itertools.count()

    def watched(name):
        return lambda: order.append(name) or next(ticks)

    samples = timing.interleaved({"a": watched("a"), "b": watched("b")}, rounds=2, discarded=1)
    assert "".join(order) == "ababab"
    assert samples == {"a": [2, 4], "b": [3, 5]}


def test_ratios_are_taken_within_a_round():
    base, ours = [1.0, 10.0, 2.0], [2.0, 15.0, 4.0]  # the machine was slow in round two
    assert timing.ratio(ours, base) == 2


def test_a_sample_is_the_mean_of_its_calls():
    clock = iter([10.0, 16.0])
    calls = []
    assert timing.sampler(lambda: calls.append(0), 3, lambda: next(clock))() == 2
    assert len(calls) == 3


def test_a_machine_is_described_without_a_gpu():
    found = machine.describe()
    assert {"cpu", "cores", "python", "torch", "triton", "commit"} <= found.keys()
    assert all(found.values())
    assert machine.version("no-such-package") == "not installed"
    assert machine.output(["no-such-program"]) == ""
    assert machine.slug("NVIDIA H100 80GB (HBM3)") == "NVIDIA_H100_80GB_HBM3"


@pytest.mark.parametrize("command", [gpu, tune])
def test_without_a_gpu_one_line_says_so(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert command.main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert "needs a CUDA or ROCm GPU, and this machine has none" in printed[0]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("print('fine')", "ok"),
        ("print('fine'); raise SystemExit(1)", "failed"),
        ("print('fine', flush=True); import time; time.sleep(60)", "hung"),
    ],
)
def test_the_watchdog_returns_whatever_the_process_does(script, status, tmp_path):
    found = watchdog.run([sys.executable, "-c", script], 1.0, tmp_path / "log")
    assert (found.status, found.said) == (status, "fine")
    assert found.seconds < 5


def test_what_a_hung_process_started_is_killed_with_it(tmp_path):
    grandchild = (
        f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'on')!r}).touch()"
    )
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert watchdog.run([sys.executable, "-c", script], 1.0, tmp_path / "log").status == "hung"
    time.sleep(2)
    assert not (tmp_path / "on").exists()


def outcomes(monkeypatch, statuses):
    """Steps end as told; returns what each was told about the one-launch form."""
    told = {}

    def run(command, limit, log, environment):
        name, result = command[-2:]
        told[name] = environment[steps.ONE_LAUNCH]
        status = statuses.get(name, "ok")
        if status != "hung":
            with open(result, "w") as file:
                json.dump({"of": name}, file)
        return watchdog.Outcome(status, 1.0, "last words")

    monkeypatch.setattr(watchdog, "run", run)
    return told


def test_a_step_that_hangs_or_fails_stops_no_other(monkeypatch):
    told = outcomes(monkeypatch, {"ceilings": "failed", "replays": "hung"})
    found = gpu.run_all(list(steps.LIMITS))
    assert list(found) == list(steps.LIMITS)
    assert found["ceilings"] == {
        "status": "failed", "seconds": 1.0, "said": "last words", "result": {"of": "ceilings"},
    }  # fmt: skip
    assert "result" not in found["replays"]
    assert found["rows"] == {"status": "ok", "seconds": 1.0, "result": {"of": "rows"}}
    assert set(told.values()) == {"0"}


def test_the_flag_form_is_timed_only_after_it_replayed_well(monkeypatch):
    told = outcomes(monkeypatch, {})
    gpu.run_all(list(steps.LIMITS))
    timed = [name for name in steps.LIMITS if name.startswith(steps.TIMING)]
    assert timed
    assert all(told[name] == "1" for name in timed)
    assert told["replays"] == "0"


def test_steps_that_do_not_fit_the_time_are_not_run(monkeypatch):
    told = outcomes(monkeypatch, {})
    found = gpu.run_all(["ceilings", "rows"], deadline=0)
    assert not told
    assert {row["status"] for row in found.values()} == {"not run"}


def test_every_step_has_a_function():
    assert all(callable(steps.step(name)) for name in steps.LIMITS)


@pytest.mark.parametrize("name", ["a[m1-f16]", "a[bf16]", "a[f32]", "a_plain_test", "a[f32-bf16]"])
def test_the_parts_of_the_suite_overlap_nowhere_and_leave_nothing_out(name):
    words = {word: word in name for word in ("f32", "bf16", "f16")}
    assert [eval(part, words) for part in correctness.PARTS].count(True) == 1


def test_counts_of_the_parts_are_added_up(tmp_path):
    good, bad = tmp_path / "good.xml", tmp_path / "bad.xml"
    good.write_text(
        '<testsuites><testsuite tests="3" failures="0" errors="0" skipped="0">'
        '<testcase name="a"/></testsuite></testsuites>'
    )
    bad.write_text(
        '<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">'
        '<testcase name="b"><failure/></testcase><testcase name="c"/></testsuite></testsuites>'
    )
    assert correctness.summary([good])["ok"]
    found = correctness.summary([good, bad, tmp_path / "killed.xml"])
    assert (found["passed"], found["failures"], found["errors"], found["ok"]) == (3, 1, 1, False)
    assert found["failed"] == ["b", "part killed ended without a report"]


def test_a_suite_that_ran_nothing_is_not_ok(tmp_path):
    path = tmp_path / "0.xml"
    path.write_text('<testsuites><testsuite tests="2" skipped="2"/></testsuites>')
    assert not correctness.summary([path])["ok"]


def test_copies_outgrow_the_cache():
    p = operands.make(**TINY)
    copies = operands.rotated(p, cache_bytes=operands.bytes_of(p) * 2)
    assert len(copies) == 6
    assert operands.copies_needed(10**9, 10**6) == 2
    for name in operands.TENSORS:
        tensors = [getattr(copy, name) for copy in copies]
        assert len({tensor.data_ptr() for tensor in tensors}) == 6
        assert len({tensor.stride() for tensor in tensors}) == 1
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def test_bare_work_is_what_the_design_counts():
    moved, multiplied = operands.bare_work(1, 4096, 4096, itemsize=2)
    assert round(moved / 1e6, 2) == 33.57
    assert multiplied == 2 * 4096**2


def test_judges_take_right_results_and_no_others():
    p = operands.make(**TINY)
    y, base = contenders.routed(p, TILES), contenders.bare(p)
    operands.judge(p, y)
    operands.judge(p, base, routed=False)
    for wrong, routed in ((base, True), (y, False), (y[:, :-1], True)):
        with pytest.raises(AssertionError):
            operands.judge(p, wrong, routed)
    pair = [p, operands.make(**TINY, seed=1)]
    product = tune.mlp(pair, TileConfig("two_launch", 16, 32, 64))
    operands.judge_mlp(pair, product)
    with pytest.raises(AssertionError):
        operands.judge_mlp(pair[::-1], product)


@pytest.mark.parametrize("target", ["ampere", "hopper"])
@pytest.mark.parametrize("M", [1, 130])
def test_all_contenders_are_right(M, target, monkeypatch):
    monkeypatch.setattr(contenders.launch, "target", lambda device: target)
    p = operands.make(**TINY | {"M": M})
    found = contenders.contenders(p, one_launch=True)
    assert (contenders.PDL in found) == (target == "hopper")
    assert contenders.ONE_LAUNCH not in contenders.contenders(p, one_launch=False)
    for name, contender in found.items():
        if name != contenders.PDL:  # it launches as no interpreter can
            operands.judge(p, contender.call(p), contender.routed)


@pytest.fixture
def host_clock(monkeypatch):
    """Calls are timed directly: there are no streams, events and graphs here."""

    def captured(call, copies, stream):
        assert len(copies) > 1
        return timing.sampler(lambda: call(copies[0]), calls=1)

    card = types.SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(graphs, "on_stream", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    for module in (layers, tune):
        monkeypatch.setitem(module.LAYERS, "tiny.gate_proj", (48, 64))
        monkeypatch.setattr(module, "ROUNDS", 2)


def test_a_layer_is_timed_and_a_broken_contender_reported(host_clock, monkeypatch):
    def broken(p, tiles):
        return contenders.bare(p)

    monkeypatch.setattr(contenders, "plain", broken)
    monkeypatch.setattr(contenders, "routed", broken)
    found = layers.measure("tiny.gate_proj", True, tokens=(1,), device="cpu")
    assert found["1"][contenders.CUBLAS]["over_cublas"] == 1
    assert found["1"][contenders.PLAIN]["seconds"]["median"] > 0
    for name in (contenders.OURS, contenders.ONE_LAUNCH):
        assert found["1"][name]["error"].startswith("AssertionError: ")
    fake = {"steps": {"timing tiny.gate_proj": {"status": "ok", "result": found}}}
    assert not report.good(fake)


def test_rows_keep_their_bits_here():
    p = operands.make(**TINY | {"M": 16})
    found = dict(rows.comparisons(p, 1, lambda p: contenders.routed(p, TILES)))
    assert len(found) == 8
    assert all(found.values())


def test_a_row_that_depends_on_its_batch_is_found():
    p = operands.make(**TINY | {"M": 16})
    found = rows.comparisons(p, 1, lambda p: contenders.bare(p) * (1 + len(p.x)))
    assert [what for what, same in found if not same] == [
        "the first 1 rows", "the last 1 rows", "the first 8 rows", "the last 8 rows",
    ]  # fmt: skip


def test_buckets_are_tried_from_end_to_end():
    assert [(rows.least(b), rows.most(b)) for b in tuning.M_BUCKETS] == [
        (1, 16), (17, 64), (65, 128), (129, 512), (513, rows.OPEN_END),
    ]  # fmt: skip
    for b in tuning.M_BUCKETS:
        assert tuning.bucket(rows.least(b)) == tuning.bucket(rows.most(b)) == b


def test_replays_are_judged_by_bits_flags_and_the_truth():
    p = operands.make(**TINY)
    y = contenders.routed(p, TILES)
    assert replays.verdict(p, y, y, 0, 0)["ok"]
    assert not replays.verdict(p, y, y, 1, 0)["ok"]
    assert not replays.verdict(p, y, y, 0, 1)["ok"]
    with pytest.raises(AssertionError):
        replays.verdict(p, torch.full_like(y, float("nan")), y, 0, 0)
    tiles = contenders.as_one_launch(TileConfig("two_launch", 128, 256, 64, descriptors=True))
    assert str(replays.two_launches(tiles)) == str(tiles).removesuffix(":one_launch")


def test_replays_run_in_chunks_from_a_poisoned_output(monkeypatch):
    replayed = []

    def single(call, operand, stream):
        y = call(operand)

        def replay():
            replayed.append(bool(y.isnan().all()))
            y.copy_(call(operand))

        return types.SimpleNamespace(replay=replay), y

    make = operands.make
    monkeypatch.setattr(operands, "make", lambda **sizes: make(**sizes | {"device": "cpu"}))
    monkeypatch.setattr(graphs, "single", single)
    monkeypatch.setattr(graphs, "on_stream", contextlib.nullcontext)
    monkeypatch.setattr(replays, "CHUNK", 2)
    monkeypatch.setitem(replays.LAYERS, replays.LAYER, (48, 64))
    found = replays.measure(replays=5, tokens=(1, 130))
    assert found["ok"]
    assert [row["replays"] for row in found["tokens"].values()] == [5, 5]
    assert all("one_launch" in row["config"] for row in found["tokens"].values())
    assert replayed == [False, True, False, True, False, True] * 2


@pytest.fixture
def no_cuda(monkeypatch):
    """Streams, events and graphs that do nothing; a graph is captured by running it."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        synchronize = record

        def elapsed_time(self, end):
            return 80.0  # ms

    class Stream:
        def wait_stream(self, other):
            pass

    graph = types.SimpleNamespace(replay=lambda: None)
    for name, stand_in in {
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "synchronize": lambda: None,
        "CUDAGraph": lambda: graph,
        "graph": lambda graph, stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


def test_a_graph_walks_all_copies_again_and_again(no_cuda):
    called = []
    with graphs.on_stream() as stream:
        replay = graphs.captured(called.append, range(30), stream)
        assert called == [0, 1, *range(30), *range(30)]  # two to warm up, then at least 40
        assert replay() == pytest.approx(0.08 / 60)
        _, output = graphs.single(lambda x: x + 1, 6, stream)
    assert output == 7


def test_graphs_are_captured_on_the_stream_that_warmed_up():
    assert "stream" in inspect.signature(torch.cuda.graph).parameters


def spread(us):
    return {"median": us * 1e-6, "low": us * 0.9e-6, "high": us * 1.1e-6}


def found_on_a_gpu():
    """What a run could have written; the numbers are made up."""
    cell = {
        contenders.CUBLAS: {"config": "", "seconds": spread(20), "over_cublas": 1.0},
        contenders.OURS: {"config": "fused:16", "seconds": spread(25), "over_cublas": 1.25},
    }
    us = {"ops.mogu_linear": {"median": 31.0, "low": 30.0, "high": 32.0}}
    counts = {"passed": 9, "failures": 0, "errors": 0, "skipped": 0, "failed": [], "ok": True}
    rate = {"copy_bytes_per_second": 3.2e12, "bf16_flops_per_second": 8e14}
    row = {"replays": 100, "chunks_with_other_bits": 0, "flags_left_up": 0, "ok": True}
    results = {
        "correctness": counts,
        "ceilings": rate,
        "replays": {"tokens": {"512": row}, "ok": True},
        "timing llama2_7b.o_proj": {"1": cell},
        "rows": {"compared": 8, "different": [], "ok": True},
        "host": {"whole, inference_mode": us},
    }
    ended = {"status": "ok", "seconds": 3.0}
    return {
        "machine": {"gpu": "Some GPU", "driver": "1.2", "commit": "abc"},
        "steps": {name: ended | {"result": result} for name, result in results.items()},
    }


def test_a_report_has_steps_ratios_and_shares():
    found = found_on_a_gpu()
    assert report.good(found)
    text = report.markdown(found)
    for line in (
        "# Measured on Some GPU",
        "- driver: 1.2",
        "| correctness | ok | 3 | 9 passed, 0 failures, 0 errors, 0 skipped |",
        "| ceilings | ok | 3 | 3.20 TB/s copied, 800 TFLOP/s in bf16 |",
        "| llama2_7b.o_proj | 1 | 20.0 | - | 1.250 | - | - |",
        # 33.57 MB in 25 us of 3.2 TB/s
        "| llama2_7b.o_proj | 1 | ours | fused:16 | 25.0 | 22.5 to 27.5 | 1.250 | 42% | 0% |",
        "### whole, inference_mode",
    ):
        assert line in text.splitlines(), text


def test_a_report_tells_what_hung_and_what_was_not_run(capsys):
    found = found_on_a_gpu()
    found["steps"]["replays"] = {"status": "hung", "seconds": 90.0, "said": "M = 1: 5000 replays"}
    found["steps"]["host"] = {"status": "not run", "seconds": 0.0, "said": "no time was left"}
    del found["steps"]["ceilings"]["result"]
    assert not report.good(found)
    text = report.markdown(found)
    assert "| replays | hung | 90 |  |" in text
    assert "M = 1: 5000 replays" in text
    report.show(found)
    assert "hung" in capsys.readouterr().out


@pytest.mark.parametrize("op", tune.OPS)
@pytest.mark.parametrize("target", tuning.TARGETS)
@pytest.mark.parametrize("rows", tuning.M_BUCKETS)
def test_the_heuristic_is_tried_first_and_budgets_are_kept(op, target, rows):
    tried = tune.candidates(op, rows, 16, "bf16", target)
    assert tried[0] == tuning.tile_config(op, rows, 4096, 4096, 16, "bf16", target)
    assert len(set(tried)) == len(tried) > 3
    assert not any(tiles.one_launch for tiles in tried)
    if op == "mogu_linear" and rows <= 128:
        assert {tiles.kernel for tiles in tried} == {"fused"}
    if target in ("ampere", "cdna"):
        assert not any(tiles.pdl or tiles.descriptors for tiles in tried)


def test_a_config_replaces_the_heuristic_only_for_a_clear_gain():
    heuristic, other = tune.candidates("mogu_linear", 16, 16, "bf16", "hopper")[:2]
    assert tune.pick(heuristic, {heuristic: [1.0], other: [0.99]}) == heuristic
    assert tune.pick(heuristic, {heuristic: [1.0], other: [0.9]}) == other
    assert tune.pick(heuristic, {other: [3.0]}) == other  # the heuristic's did not compile
    assert tune.pick(heuristic, {}) == heuristic


def test_a_tuned_table_is_what_the_package_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    tuning._table.cache_clear()
    path = tuning.table_path("Some GPU", "bf16")
    tune.merge(path, tune.key("mogu_linear", 4096, 4096, 16), {"16": str(TILES)})
    tune.merge(path, tune.key("gated_mlp", 4096, 4096, 16), {"16": "two_launch:16x32x64:g8:w4:s3"})
    rest = (8, 4096, 4096, 16, "bf16", "hopper", "Some GPU")
    try:
        assert tuning.tile_config("mogu_linear", *rest) == TILES
        assert tuning.tile_config("gated_mlp", *rest).kernel == "two_launch"
    finally:
        tuning._table.cache_clear()
    assert [file.name for file in path.parent.iterdir()] == ["bf16.json"]


def test_wrong_and_impossible_tiles_are_left_out_of_the_search(host_clock, monkeypatch, capsys):
    make = operands.make
    monkeypatch.setattr(operands, "make", lambda **sizes: make(**sizes | {"device": "cpu"}))
    right, wrong, impossible = (
        TILES,
        TileConfig("fused", 16, 16, 64),
        TileConfig("fused", 32, 16, 16),
    )

    def linear(operand, tiles):
        if tiles == impossible:
            raise RuntimeError("out of resource")
        return contenders.routed(operand[0], tiles) + (tiles == wrong)

    monkeypatch.setattr(tune, "candidates", lambda *_: [impossible, wrong, right])
    monkeypatch.setitem(tune.CALLS, "mogu_linear", linear)
    assert tune.fastest("mogu_linear", "tiny.gate_proj", 5, "bf16") == right
    assert tune.works("mogu_linear", tune.functools.partial(linear, tiles=right), [make(**TINY)])


def test_host_costs_are_measured_layer_by_layer():
    tables = host.measure(rounds=1)
    assert "ops.mogu_linear" in tables["whole, no_grad"]
    assert "launch.mogu_linear, tiles given" in tables["nothing computed, inference_mode"]
    assert all(us["median"] > 0 for rows in tables.values() for us in rows.values())
    assert "| checks.check_router | " in host.markdown(tables)


@pytest.mark.parametrize("name", test_projection.IMPLEMENTATIONS)
def test_a_benchmark_refuses_swapped_experts_and_another_weight(name):
    case = test_projection.problem.make(M=5, N=24, K=32, rank=4, dtype=torch.float32, hidden=16)
    build, folded, kind = test_projection.IMPLEMENTATIONS[name]
    with torch.no_grad():
        y = build(case, folded)(case.projection.x)
    assert test_projection.judge(kind, case.projection, y) <= test_projection.LIMIT
    swap = {"weight": -case.projection.weight}
    if kind != "base":
        swap = {"lora_B": case.projection.lora_B.flip(0)}
    with pytest.raises(AssertionError):
        test_projection.judge(kind, operands.changed(case.projection, **swap), y)


@pytest.mark.parametrize("width", [64, 576])
def test_training_saves_little_beside_the_input(width):
    """The published block keeps what is as wide as the projection; ours ranks and gates."""
    assert training.saved_bytes("ours", width) == 72  # 2 x 8 ranks and 2 gates in fp32
    assert training.saved_bytes("official", width) > 10 * width
