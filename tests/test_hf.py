"""Swapping a Hugging Face model's projections, and back."""

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

import mogu_kernels as mk
from demo.published import published_model
from mogu_kernels.hf import target_linears
from tests import tiny


def snapshot(model):
    """What must not change: module objects, parameter objects, values."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: id(parameter) for name, parameter in model.named_parameters()},
        model(tiny.prompt()).logits,
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize(
    "targets",
    [("o_proj",), ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), tiny.EVERY_TARGET],
)
@pytest.mark.parametrize("router", ["mlp", "linear"])
def test_attach_routes_every_target_and_detach_restores_bit_for_bit(targets, router, tmp_path):
    model = tiny.llama()
    before = snapshot(model)
    checkpoint = tiny.checkpoint(model, targets, router=router)
    mk.save_checkpoint(checkpoint, tmp_path)
    report = mk.attach(model, tmp_path)
    assert len(report.modules) == 2 * len(targets)
    assert all(isinstance(model.get_submodule(m), mk.MoGULinear) for m in report.modules)
    assert not torch.equal(model(tiny.prompt()).logits, before[2])
    assert f"routed {2 * len(targets)} projections" in str(report)
    assert mk.detach(model) is model
    assert_unchanged(model, before)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_routed_logits_equal_the_published_model(gate):
    model = tiny.llama(torch.float64)
    checkpoint = tiny.checkpoint(model, tiny.EVERY_TARGET, gate=gate)
    published = published_model(model, checkpoint)
    mk.attach(model, checkpoint)
    ids = tiny.prompt(batch=2)
    expected = published(ids).logits
    # the published routers are fp32 numbers, computed in fp64 on both sides
    assert (model(ids).logits - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_experts_are_told_apart_by_name():
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model)
    swapped = copy.deepcopy(checkpoint)
    swapped.tensors = {key: tensor.flip(0) for key, tensor in checkpoint.tensors.items()}
    swapped.config = dataclasses.replace(checkpoint.config, expert_names=("unwill", "glad"))
    one, other = published_model(model, checkpoint), published_model(model, swapped)
    assert torch.equal(one(tiny.prompt()).logits, other(tiny.prompt()).logits)


def test_attached_weights_are_shared_and_nothing_has_gradients():
    model = tiny.llama()
    parameters = {id(p) for p in model.parameters()}
    report = mk.attach(model, tiny.checkpoint(model))
    added = [p for p in model.parameters() if id(p) not in parameters]
    assert sum(p.numel() for p in added) == report.parameters_added
    assert not any(p.requires_grad for p in added)
    assert parameters <= {id(p) for p in model.parameters()}


def test_trainable_keeps_published_routers_unfolded():
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model)
    folded = copy.deepcopy(model)
    mk.attach(folded, checkpoint)
    mk.attach(model, checkpoint, trainable=True)
    module = model.get_submodule(checkpoint.modules[0])
    assert isinstance(module.router, mk.Router)
    assert module.router.linear_0.weight.requires_grad
    ids = tiny.prompt()
    torch.testing.assert_close(model(ids).logits, folded(ids).logits, rtol=1e-5, atol=1e-5)


def test_attach_follows_the_models_dtype_and_keeps_routers_wide():
    model = tiny.llama(torch.bfloat16)
    checkpoint = tiny.checkpoint(model)
    exact, _ = mk.fold_router(
        **{
            key.removeprefix("router.").replace(".", "_"): tensor
            for key, tensor in checkpoint.module_tensors(checkpoint.modules[0]).items()
            if key.startswith("router.")
        }
    )
    mk.attach(model, checkpoint)
    module = model.get_submodule(checkpoint.modules[0])
    assert module.lora_A.dtype == torch.bfloat16
    assert torch.equal(module.gate_weight, exact)
    assert torch.isfinite(model(tiny.prompt()).logits).all()


def test_a_subset_of_layers_can_be_routed():
    model = tiny.llama()
    report = mk.attach(model, tiny.checkpoint(model, layers=[1]))
    assert report.modules == ("model.layers.1.self_attn.o_proj",)


def test_a_deep_copy_of_an_attached_model_is_whole():
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model))
    other = copy.deepcopy(model)
    ids = tiny.prompt()
    assert torch.equal(other(ids).logits, model(ids).logits)
    with mk.routing(other, False):
        assert not torch.equal(other(ids).logits, model(ids).logits)
    assert_unchanged(mk.detach(other), snapshot(other))


def test_training_mode_and_dtype_survive_detach():
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model))
    mk.detach(model.train().to(torch.bfloat16))
    assert all(m.training for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_swapped_model_compiles_whole_with_dynamic_tokens():
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (9, 5, 7):
            ids = tiny.prompt(tokens)
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            )
    assert counters["stats"]["unique_graphs"] == 1


def foreign_shape(checkpoint):
    key = f"{checkpoint.modules[0]}.lora_B"
    checkpoint.tensors[key] = torch.zeros(2, 65, 8)


def foreign_module(checkpoint):
    checkpoint.tensors = {
        k.replace("layers.1", "layers.7"): t for k, t in checkpoint.tensors.items()
    }


def foreign_architecture(checkpoint):
    checkpoint.config = dataclasses.replace(checkpoint.config, architecture="FalconForCausalLM")


def poisoned(checkpoint):
    checkpoint.tensors[f"{checkpoint.modules[1]}.lora_B"][0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (foreign_shape, r"weight of \[65, 48\] but the model's is \[64, 48\]"),
        (foreign_module, r"model.layers.7.self_attn.o_proj, which the model does not have"),
        (foreign_architecture, "FalconForCausalLM but the model is LlamaForCausalLM"),
        (poisoned, "layers.1.self_attn.o_proj.lora_B has NaN"),
    ],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(damage, match):
    model = tiny.llama()
    before = snapshot(model)
    checkpoint = tiny.checkpoint(model)
    damage(checkpoint)
    with pytest.raises(ValueError, match=match):
        mk.attach(model, checkpoint)
    assert_unchanged(model, before)


def test_a_truncated_checkpoint_leaves_the_model_as_it_was(tmp_path):
    model = tiny.llama()
    before = snapshot(model)
    mk.save_checkpoint(tiny.checkpoint(model), tmp_path)
    path = tmp_path / "mogu_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        mk.attach(model, tmp_path)
    assert_unchanged(model, before)


def test_attaching_twice_and_detaching_nothing_are_named():
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model)
    with pytest.raises(ValueError, match="no routed projection"):
        mk.detach(model)
    mk.attach(model, checkpoint)
    with pytest.raises(ValueError, match="routed already"):
        mk.attach(model, checkpoint)


def test_a_model_on_the_meta_device_is_refused():
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model)
    with pytest.raises(ValueError, match="meta device"):
        mk.attach(model.to("meta"), checkpoint)


@pytest.mark.parametrize("target", ["lm_head", "o_projection", "embed_tokens"])
def test_wrong_targets_are_named(target):
    with pytest.raises(ValueError, match=f"{target!r} is no projection of LlamaForCausalLM"):
        target_linears(tiny.llama(), (target,))


def test_unknown_architectures_and_foreign_modules_are_named():
    with pytest.raises(ValueError, match="no module of Linear"):
        target_linears(torch.nn.Linear(2, 2), ("o_proj",))
    with pytest.raises(ValueError, match="no module of LlamaForCausalLM"):
        target_linears(tiny.llama(), ("o_proj",), layers=[9])
    model = tiny.llama()
    model.model.layers[0].self_attn.o_proj = torch.nn.Identity()
    with pytest.raises(TypeError, match="o_proj is a Identity"):
        target_linears(model, ("o_proj",))


def test_a_module_built_as_routed_has_nothing_to_restore():
    with pytest.raises(ValueError, match="built as a MoGULinear"):
        mk.detach(torch.nn.Sequential(mk.MoGULinear(4, 5)))
