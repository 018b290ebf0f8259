"""Two ranks of a gloo group give what one process gives: logits, gates and tokens."""

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mogu_kernels as mk
from mogu_kernels import ops
from mogu_kernels.modules import MoGUGatedMLP
from mogu_kernels.parallel import (
    ParallelLinear,
    RoutedColwise,
    RoutedRowwise,
    attach_parallel,
    gate_sums,
    shrink_sums,
)
from tests import tiny
from tests.parallel_ranks import Ranks

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}
O_PROJ = ("o_proj",)
ROWWISE = ("o_proj", "down_proj")
COLUMNS = 64 + 2 * 8 + 2  # N + E * r + E


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


def biased_llama(dtype=torch.float32) -> nn.Module:
    """The tiny Llama with a bias in every projection."""
    model = tiny.llama(dtype, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def attached(dtype=torch.float32, targets=O_PROJ, gate="sigmoid") -> nn.Module:
    model = biased_llama(dtype)
    mk.attach(model, tiny.checkpoint(model, targets, gate=gate, strength=0.2))
    return model


def sharded(*args) -> nn.Module:
    """`attached(*args)`, of which each rank has a part."""
    model = attached(*args)
    plan = {}
    for name in tiny.EVERY_TARGET:
        block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        routed = isinstance(model.get_submodule(f"model.layers.0.{block}.{name}"), mk.MoGULinear)
        styles = (RoutedColwise, RoutedRowwise) if routed else (ColwiseParallel, RowwiseParallel)
        plan[f"model.layers.*.{block}.{name}"] = styles[name in ROWWISE]()
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


@torch.no_grad()
def answers(model) -> dict[str, torch.Tensor]:
    """Logits [2, 9, vocabulary] with each kind of routing, and the gates."""
    tokens, found = tiny.prompt(batch=2), {}
    with mk.record_gates(model) as gates:
        found["routed"] = model(tokens).logits
    found |= gates
    masks = {
        "off": False,
        "a sequence": torch.tensor([False, True]),
        "some tokens": torch.arange(18).view(2, 9) % 3 == 0,
    }
    for name, mask in masks.items():
        with mk.routing(model, mask):
            found[name] = model(tokens).logits
    return found


def tokens_of(model) -> dict[str, list]:
    inputs = {"input_ids": tiny.prompt(batch=2), "max_new_tokens": 9, "do_sample": False}
    return {
        handoff: mk.generate(model, **inputs, handoff=handoff).tolist()
        for handoff in ("shadow", "replay")
    }


def sharded_answers(*args):
    return answers(sharded(*args))


@pytest.mark.parametrize("dtype", BOUND, ids=["f32", "f64"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("targets", [O_PROJ, tiny.EVERY_TARGET], ids=["o_proj", "all"])
def test_two_ranks_answer_as_one_process(ranks, targets, gate, dtype):
    expected = answers(attached(dtype, targets, gate))
    assert not torch.allclose(expected["routed"], expected["off"], rtol=0.1)
    for found in ranks.run(sharded_answers, dtype, targets, gate):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            error = (tensor - expected[name]).abs().max()
            assert error <= BOUND[dtype] * expected[name].abs().max(), name


def sharded_tokens(*args):
    return tokens_of(sharded(*args))


@pytest.mark.parametrize("targets", [O_PROJ, tiny.EVERY_TARGET], ids=["o_proj", "all"])
def test_every_rank_generates_the_tokens_of_one_process(ranks, targets):
    expected = tokens_of(attached(torch.float64, targets))
    assert ranks.run(sharded_tokens, torch.float64, targets) == [expected] * 2


@contextlib.contextmanager
def reductions():
    """Elements of every all-reduce that the routed projections ask for."""
    found, plain = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        found.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield found
    finally:
        dist.all_reduce = plain


@torch.no_grad()
def collectives(enabled) -> tuple[int, list[int]]:
    model = sharded(torch.float32, tiny.EVERY_TARGET)
    warnings.filterwarnings("ignore", "For backward hooks")  # the mode hooks what is no tensor
    with CommDebugMode() as mode, reductions() as elements, mk.routing(model, enabled):
        model(tiny.prompt())
    return mode.get_total_counts(), elements


def test_one_reduction_a_row_parallel_projection_and_none_a_column_parallel_one(ranks):
    # nine tokens, two projections of two layers
    assert ranks.run(collectives, True) == [(4, [9 * COLUMNS] * 4)] * 2
    assert ranks.run(collectives, False) == [(4, [9 * 64] * 4)] * 2


def fused_mlps() -> int:
    model = sharded(torch.float32, tiny.EVERY_TARGET)
    return sum(isinstance(module, MoGUGatedMLP) for module in model.modules())


def test_a_sharded_gated_mlp_stays_one_kernel(ranks):
    assert ranks.run(fused_mlps) == [2, 2]


def parts() -> dict[str, Any]:
    model = sharded(torch.float32, ("q_proj", "o_proj"))
    layer: Any = model.get_submodule("model.layers.0.self_attn")
    found = {
        f"{name}.{key}": list(parameter.shape)
        for name in ("q_proj", "o_proj")
        for key, parameter in layer.get_submodule(name).named_parameters()
    }
    whole = layer.o_proj.state_dict()["weight"].full_tensor()
    return found | {"repr": repr(layer.o_proj), "saved": list(whole.shape)}


def test_a_rank_holds_its_part_and_saves_the_whole_base(ranks):
    for found in ranks.run(parts):
        assert found == {
            "q_proj.weight": [24, 64],
            "q_proj.bias": [24],
            "q_proj.lora_A": [2, 8, 64],
            "q_proj.lora_B": [2, 24, 8],
            "q_proj.gate_weight": [2, 64],
            "q_proj.gate_bias": [2],
            "o_proj.weight": [64, 24],
            "o_proj.bias": [64],
            "o_proj.lora_A": [2, 8, 24],
            "o_proj.lora_B": [2, 64, 8],
            "o_proj.gate_weight": [2, 24],
            "o_proj.gate_bias": [2],
            "saved": [64, 48],
            "repr": found["repr"],
        }
        assert "RowParallelLinear(in_features=24, out_features=64" in found["repr"]
        assert "ranks=2" in found["repr"]


def detached(*args) -> torch.Tensor:
    model = mk.detach(sharded(*args))
    with torch.no_grad():
        return model(tiny.prompt()).logits


def test_detach_leaves_a_sharded_base(ranks):
    with torch.no_grad():
        expected = biased_llama(torch.float64)(tiny.prompt()).logits
    for found in ranks.run(detached, torch.float64, tiny.EVERY_TARGET):
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def built(rowwise: bool) -> torch.Tensor:
    """A module that was never attached; rank 0's parameters count, in every rank."""
    torch.manual_seed(dist.get_rank())
    rank, module = dist.get_rank(), built_linear()
    style = RoutedRowwise() if rowwise else RoutedColwise()
    parallelize_module(module, init_device_mesh("cpu", (2,)), style)
    x = torch.linspace(-1, 1, 3 * 10, dtype=torch.float64).view(3, 10)
    with torch.no_grad():
        return module(x[:, 5 * rank : 5 * rank + 5] if rowwise else x)


def built_linear() -> mk.MoGULinear:
    module = mk.MoGULinear(10, 6, True, 3, scaling=[2.0, 1.0], dtype=torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


def test_a_built_module_takes_the_parameters_of_rank_0(ranks):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 3 * 10, dtype=torch.float64).view(3, 10)
    with torch.no_grad():
        expected = built_linear()(x)
    for found in ranks.run(built, True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat(ranks.run(built, False), 1), expected)


def half() -> torch.Tensor:
    model = sharded(torch.float32, tiny.EVERY_TARGET).to(torch.bfloat16)
    module: Any = model.get_submodule("model.layers.0.self_attn.o_proj")
    assert module.weight.data_ptr() == module.base.weight.to_local().data_ptr()
    with torch.no_grad():
        return model(tiny.prompt()).logits.float()


def test_half_precision_is_as_far_from_exact_as_one_process(ranks):
    with torch.no_grad():
        exact = attached(torch.float64, tiny.EVERY_TARGET)(tiny.prompt()).logits
        alone = attached(torch.bfloat16, tiny.EVERY_TARGET)(tiny.prompt()).logits
    for found in ranks.run(half):
        assert (found - exact).norm() <= 1.5 * (alone - exact).norm()


def loaded(folder) -> Any:
    config = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def transformers_answers(folder, targets) -> tuple[dict, dict, torch.Tensor]:
    model = loaded(folder)
    report = attach_parallel(model, tiny.checkpoint(biased_llama(), targets, strength=0.2))
    for name in report.modules:
        assert isinstance(model.get_submodule(name), ParallelLinear)
    found, tokens = answers(model), tokens_of(model)
    with torch.no_grad(), reductions() as elements:
        model(tiny.prompt())
    assert elements.count(9 * COLUMNS) == 2 * sum(name in targets for name in ROWWISE)
    model.save_pretrained(f"{folder}/saved")
    with torch.no_grad():
        return found, tokens, mk.detach(model)(tiny.prompt()).logits


@pytest.mark.parametrize("targets", [O_PROJ, tiny.EVERY_TARGET], ids=["o_proj", "all"])
def test_a_model_that_transformers_sharded_answers_as_one_process(ranks, targets, tmp_path):
    base = biased_llama()
    base.save_pretrained(tmp_path)
    model = attached(torch.float32, targets)
    expected, tokens = answers(model), tokens_of(model)
    for found, generated, plain in ranks.run(transformers_answers, str(tmp_path), targets):
        for name, tensor in found.items():
            error = (tensor - expected[name]).abs().max()
            assert error <= 1e-5 * expected[name].abs().max(), name
        assert generated == tokens
        with torch.no_grad():
            torch.testing.assert_close(plain, base(tiny.prompt()).logits)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.state_dict().items())


def page_program(folder, block) -> list:
    namespace = {}
    with contextlib.chdir(folder):
        exec(compile(block, "parallel.md", "exec"), namespace)
    assert any(isinstance(module, ParallelLinear) for module in namespace["model"].modules())
    return namespace["out"].tolist()


def test_both_programs_of_the_page_run_on_two_ranks(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "parallel.md").read_text()
    once, *programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(once, "parallel.md", "exec"), {})
    assert len(programs) == 2
    for program in programs:
        namespace = {}
        exec(compile(program, "parallel.md", "exec"), namespace)
        assert ranks.run(page_program, tmp_path, program) == [namespace["out"].tolist()] * 2


def with_another_plan(folder) -> str:
    config = DistributedConfig(tp_plan={"model.layers.*.self_attn.o_proj": "rowwise_rep"})
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    with pytest.raises(ValueError, match=r"is sharded over ranks: .*attach_parallel"):
        mk.attach(model, tiny.checkpoint(biased_llama()))
    with pytest.raises(ValueError, match="is sharded as 'rowwise_rep'") as error:
        attach_parallel(model, tiny.checkpoint(biased_llama()))
    assert not any(isinstance(module, mk.MoGULinear) for module in model.modules())
    return str(error.value)


def test_a_projection_that_a_plan_shards_otherwise_is_refused(ranks, tmp_path):
    biased_llama().save_pretrained(tmp_path)
    assert (
        "only colwise and rowwise, not quantised" in ranks.run(with_another_plan, str(tmp_path))[0]
    )


def refusals() -> None:
    """Every error names the value and leaves the module as it was."""
    mesh = init_device_mesh("cpu", (2,))

    def refused(module, style, kind, match):
        with pytest.raises(kind, match=match):
            parallelize_module(module, mesh, style)
        assert not isinstance(module, ParallelLinear) or style is again

    again = RoutedRowwise()
    refused(nn.Linear(8, 8), RoutedRowwise(), TypeError, "not a Linear: attach a checkpoint first")
    refused(mk.MoGULinear(7, 8), RoutedRowwise(), ValueError, "in_features=7 is no multiple of 2")
    refused(mk.MoGULinear(8, 5), RoutedColwise(), ValueError, "out_features=5 is no multiple of 2")
    unfolded = mk.MoGULinear(8, 8, router="mlp")
    refused(unfolded, RoutedColwise(), ValueError, r"call module.fold_\(\) before")
    opaque = mk.MoGULinear.from_linear(OpaqueLinear(8, 8))
    refused(opaque, RoutedRowwise(), ValueError, "cannot shard the base .* a OpaqueLinear")
    shared = attached(torch.float32, ("q_proj", "k_proj")).get_submodule("model.layers.0.self_attn")
    refused(shared.q_proj, RoutedRowwise(), ValueError, "reads the same .* take RoutedColwise")
    module = parallelize_module(mk.MoGULinear(8, 8), mesh, RoutedRowwise())
    refused(module, again, ValueError, "sharded over 2 ranks already")
    with pytest.raises(ValueError, match="has 8 features, but this rank holds in_features=4"):
        module(torch.ones(2, 8))
    for style, width in ((RoutedRowwise(), 4), (RoutedColwise(), 8)):
        module = parallelize_module(mk.MoGULinear(8, 8), mesh, style)
        with pytest.raises(ValueError, match="has no backward pass"):
            module(torch.ones(2, width, requires_grad=True))
    mlp = sharded(torch.float32, tiny.EVERY_TARGET).get_submodule("model.layers.0.mlp")
    with pytest.raises(ValueError, match="ColumnParallelLinear has no backward pass"):
        mlp(torch.ones(2, 64, requires_grad=True))


class OpaqueLinear(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_what_cannot_be_sharded_is_refused(ranks):
    ranks.run(refusals)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shares", [(10,), (3, 7), (5, 4, 1)], ids=["one", "two", "three"])
def test_sums_over_shards_are_what_one_launch_gives(shares, gate):
    torch.manual_seed(0)
    x, lora_A = torch.randn(5, 10).double(), torch.randn(3, 4, 10).double()
    gate_weight, gate_bias = torch.randn(3, 10).double(), torch.randn(3).double()
    options = {"scaling": [2.0, 0.5, 1.0], "gate": gate}
    options["routed"] = torch.tensor([True, False, True, True, False])
    expected = ops.shrink_gate(x, lora_A, gate_weight, gate_bias, return_gates=True, **options)
    shards = [tensor.split(shares, -1) for tensor in (x, lora_A, gate_weight)]
    sums = sum(shrink_sums(*shard) for shard in zip(*shards, strict=True))
    found = gate_sums(sums, gate_bias, dtype=torch.float64, **options)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert found[1].tolist()[1] == 1
    assert not found[0][[1, 4]].any()


def test_sums_are_wide_and_what_is_expanded_is_not():
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    sums = shrink_sums(x, torch.randn(2, 4, 6, dtype=torch.bfloat16), torch.randn(2, 6))
    assert (sums.shape, sums.dtype) == ((2, 10), torch.float32)
    options = {"scaling": 2.0, "gate": "sigmoid", "routed": None, "dtype": torch.bfloat16}
    shrunk, total, gates = gate_sums(sums.bfloat16(), torch.zeros(2), **options)
    assert (shrunk.dtype, total.dtype, gates.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
