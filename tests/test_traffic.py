import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import counting, report
from bench.peers import PEERS, problem
from bench.trace import AccessError, Launch, Trace
from bench.traffic import Traffic
from mogu_kernels import launch, ops
from mogu_kernels.tuning import TileConfig
from tests import cases, oracle, red_zones

ONE_LAUNCH = TileConfig("two_launch", 16, 64, 32, GROUP_M=2, one_launch=True)
DESCRIPTORS = TileConfig("two_launch", 16, 64, 32, GROUP_M=2, descriptors=True)
CONFIGS = {**cases.KERNELS, "descriptors": DESCRIPTORS, "one_launch": ONE_LAUNCH}


@triton.jit
def copy_kernel(source, y_ptr, M, N, HOST: tl.constexpr, BLOCK: tl.constexpr):
    """Rows in blocks, through a descriptor made by the host or here."""
    desc = source if HOST else tl.make_tensor_descriptor(source, [M, N], [N, 1], [BLOCK, BLOCK])
    rows, columns = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    block = desc.load([rows, columns])
    rows += tl.arange(0, BLOCK)
    columns += tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], block, mask=mask)


@triton.jit
def tuple_kernel(sources, y_ptr):
    tl.store(y_ptr, tl.load(sources[0]) + tl.load(sources[1]))


@triton.jit
def relay_kernel(
    x_ptr, y_ptr, flag_ptr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr, ATOMIC: tl.constexpr
):
    """Program 0 stores x; every other one waits for the flag and adds one to what it finds."""
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(x_ptr, 1.0)
        tl.atomic_add(flag_ptr, 1, sem=RELEASE)
    else:
        if ATOMIC:
            while tl.atomic_add(flag_ptr, 0, sem=ACQUIRE) == 0:
                pass
        tl.store(y_ptr + pid, tl.load(x_ptr) + 1)


def relay(release="release", acquire="acquire", atomic=True, trace=None):
    x, y, flag = torch.zeros(1), torch.zeros(4), torch.zeros(1, dtype=torch.int32)
    with trace or Trace() as trace:
        relay_kernel[(4,)](x, y, flag, RELEASE=release, ACQUIRE=acquire, ATOMIC=atomic)
    assert y.tolist() == [0, 2, 2, 2]
    return trace


def refused(match):
    """The interpreter wraps what a kernel raises."""
    return pytest.raises((AccessError, InterpreterError), match=match)


@pytest.mark.parametrize("host", [True, False])
def test_descriptor_loads_are_counted_and_stop_at_the_edges(host):
    x, y = torch.randn(19, 24), red_zones.poisoned((19, 24), torch.float32)
    source = TensorDescriptor.from_tensor(x, [16, 16]) if host else x
    with Trace(order=1) as trace:
        copy_kernel[2, 2](source, y, 19, 24, HOST=host, BLOCK=16)
    assert torch.equal(x, y)
    assert (trace.bytes_loaded, trace.bytes_stored) == (x.nbytes, x.nbytes)
    trace.assert_stored_once(y)


def test_a_descriptor_beyond_its_tensor_is_refused():
    whole = torch.randn(19, 32)
    part = whole[:, :24]
    desc = TensorDescriptor(whole, [19, 32], [32, 1], [16, 16])
    desc.base = part
    with Trace(), refused("between the elements"):
        copy_kernel[2, 2](desc, torch.empty(19, 32), 19, 32, HOST=True, BLOCK=16)


def test_tensors_in_a_tuple_are_counted():
    y = torch.empty(1)
    with Trace() as trace:
        tuple_kernel[(1,)]((torch.ones(3)[1:], torch.ones(1)), y)
    assert y == 2
    assert trace.bytes_loaded == 8


def test_a_store_is_read_after_release_and_acquire():
    trace = relay()
    assert trace.bytes_loaded == 4 + 4  # x and the flag
    assert trace.bytes_stored == 4 + 4 + 12


@pytest.mark.parametrize(
    "fault", [{"release": "relaxed"}, {"acquire": "relaxed"}, {"atomic": False}], ids=str
)
def test_a_store_is_not_read_without(fault):
    with refused("loads what another one stores"):
        relay(**fault)


def test_producers_stay_in_front_in_every_order():
    for seed in range(5):
        relay(trace=Trace(order=seed, producers=1))


@triton.jit
def wait_kernel(flag_ptr):
    while tl.atomic_add(flag_ptr, 0) == 0:
        pass


def test_a_program_that_waits_for_ever_is_stopped():
    with Trace(), refused("waits for a flag"):
        wait_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def careless_kernel(flag_ptr):
    if tl.program_id(0) == 0:
        tl.atomic_add(flag_ptr, 1)
    else:
        tl.store(flag_ptr, 0)


def test_plain_access_to_a_flag_is_refused():
    with Trace(), refused("stores what another one does atomics on"):
        careless_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_what_was_not_stored_is_told():
    y, z = torch.zeros(4), torch.zeros(2)
    with Trace() as trace:
        tuple_kernel[(1,)]((torch.ones(1), torch.ones(1)), y)
        tuple_kernel[(1,)]((torch.ones(1), torch.ones(1)), z)
        tuple_kernel[(1,)]((torch.ones(1), torch.ones(1)), z)
    trace.assert_stored_once(y[:1])
    with pytest.raises(AccessError, match="12 were never stored and 0 more than once"):
        trace.assert_stored_once(y)
    with pytest.raises(AccessError, match="4 were never stored and 4 more than once"):
        trace.assert_stored_once(z)


@pytest.mark.parametrize("seed", range(3))
def test_the_one_launch_kernel_keeps_the_flag_protocol(seed):
    p = cases.projection("m37-n72-k48-e1-r1-routed", "f32")
    with Trace(order=seed, producers=3) as trace:
        y = ops.mogu_linear(**p.operands(), backend="triton", config=ONE_LAUNCH)
    assert trace.launches == 1
    trace.assert_stored_once(y)
    oracle.assert_matches(actual=y, projection=p)


def test_the_one_launch_kernel_does_wait(monkeypatch):
    monkeypatch.setattr(launch, "_FLAGS", {})  # what is left raised ends here
    p = cases.projection("m37-n72-k48-e1-r1-routed", "f32")
    with Trace(order=0), refused("waits for a flag"):
        ops.mogu_linear(**p.operands(), backend="triton", config=ONE_LAUNCH)


def counted(config, skip) -> list[Launch]:
    case = problem.make(M=37, N=88, K=72, rank=5, dtype=torch.float16, hidden=16)
    call = PEERS["ours"].build(case, True, config=config)
    with Traffic(skip=skip) as traffic:
        call(case.projection.x)
    return traffic.log


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_counting_only_equals_the_full_count_of_ours(config):
    counted(config, skip=False)  # whoever needs flags has them now
    full = counted(config, skip=False)
    assert counted(config, skip=True) == full
    assert sum(launch.flops for launch in full) > sum(launch.useful_flops for launch in full) > 0


def test_counting_only_tells_neighbours_in_memory_apart():
    memory = np.zeros(48, np.uint8)
    narrow = torch.from_numpy(memory[:32].view(np.float16))
    wide = torch.from_numpy(memory[32:].view(np.float32))
    with Trace(count_only=True) as trace:
        tuple_kernel[(1,)]((narrow, narrow), wide)
    assert (trace.bytes_loaded, trace.bytes_stored) == (2, 4)


@pytest.mark.parametrize("name", PEERS)
def test_counting_only_equals_the_full_count_of_a_peer(name):
    logs = []
    for skip in (False, True):
        case = problem.make(M=37, N=88, K=72, rank=5, dtype=torch.float16, hidden=16)
        call = PEERS[name].build(case, PEERS[name].folded)
        with Traffic(skip=skip) as traffic:
            call(case.projection.x)
        logs.append(traffic.log)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("shape", [(19, 580, 520), (272, 580, 520)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["official", "vLLM-style", "LoRAFusion-style + fold", "ours, one launch (opt-in)", "ours"],
)
def test_the_corners_give_the_count_of_the_real_size(name, shape):
    direct = counting.count_at(name, *shape, 8)
    without_useful = [dataclasses.replace(launch, useful_flops=0) for launch in direct]
    assert counting.extrapolate(name, *shape, 8) == without_useful


def test_unique_bytes_and_useful_flops_are_the_formula():
    M, N, K, E, r = 64, 1024, 576, 2, 8
    cost = counting.count("ours", M, N, K, r)
    adapters = E * r * (K + N) + 2 * E * K
    assert cost.bytes == 2 * (M * K + N * K + M * N + adapters) + 4 * E
    assert cost.useful_flops == 2 * M * (N * K + adapters)
    M = 600
    cost = counting.count("ours", M, N, K, r)
    between = M * (2 * E * r + 4)  # what the first launch leaves to the second
    assert cost.bytes == 2 * (2 * M * K + N * K + M * N + adapters) + 4 * E + 2 * between
    assert cost.useful_flops == 2 * M * (N * K + adapters)


def test_a_pytorch_call_reads_distinct_elements_and_views_are_free():
    x, row = torch.randn(6, 10), torch.randn(1, 10)
    with Traffic() as traffic:
        x.t()[::2].reshape(30)  # a copy: one launch
        x + row.expand(6, 10)
        x.mul_(row)
        x @ x.t()
        torch.empty(3).zero_()
    assert traffic.log == [
        Launch(name="clone", bytes_loaded=120, bytes_stored=120),
        Launch(name="add", bytes_loaded=280, bytes_stored=240),
        Launch(name="mul_", bytes_loaded=280, bytes_stored=240),
        Launch(name="mm", bytes_loaded=240, bytes_stored=144, flops=720, useful_flops=720),
        Launch(name="zero_", bytes_stored=12),
    ]
    assert traffic.launches == 5


def test_every_peer_is_the_routed_projection():
    counting.check_peers()


def test_a_wrong_peer_is_not_counted(monkeypatch):
    monkeypatch.setitem(counting.PEERS, "wrong", PEERS["bare linear"]._replace(folded=True))
    with pytest.raises(AssertionError, match="wrong is off by"):
        counting.check_peers()


@pytest.mark.parametrize(("M", "rank"), [(1, 8), (64, 8), (512, 8), (64, 64)])
def test_budgets_hold_on_a_7b_layer(M, rank):
    ours, bare = (counting.count(name, M, 4096, 4096, rank) for name in ("ours", "bare linear"))
    assert ours.useful_flops <= (1.01 if rank == 8 else 1.07) * bare.useful_flops
    if rank == 8:
        assert ours.launches == (1 if M <= 128 else 2)
        assert ours.bytes <= (1.02 if M <= 128 else 1.35) * bare.bytes
        assert M < 512 or ours.flops <= 1.02 * bare.flops


def test_an_exceeded_budget_says_so():
    assert str(report.Verdict("bytes", 1.5, 1.25)) == "FAILS: bytes: 1.5 of 1.25"
    assert str(report.Verdict("bytes", 1.0, 1.25)) == "holds: bytes: 1 of 1.25"
