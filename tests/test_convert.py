"""Real PEFT folders and files in the published layout become checkpoints of the same function."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile

import peft
import pytest
import safetensors.torch
import torch

import mogu_kernels as mk
import reference
from mogu_kernels import convert
from tests import tiny

# what peft itself reads of transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

O_PROJ = "model.layers.{}.self_attn.o_proj"
CONFIG, TENSORS = convert.ADAPTER_CONFIG, convert.ADAPTER_TENSORS


def adapter(folder, seed=0, dtype=torch.float32, **settings):
    """Train nothing: a tiny Llama with strong random adapters, saved as PEFT saves; its logits."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]} | settings
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = values.to(dtype)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return model.float().eval()(tiny.prompt()).logits


def pair(tmp_path, glad=None, unwill=None):
    """Two different folders and the logits of each."""
    folders = {name: tmp_path / name for name in ("glad", "unwill")}
    logits = {
        "glad": adapter(folders["glad"], seed=1, **glad or {}),
        "unwill": adapter(folders["unwill"], seed=2, **unwill or {}),
    }
    return folders, logits


def chosen(checkpoint, expert, dtype=torch.float32):
    """Logits of the tiny Llama with gates of exactly 1 for one expert and 0 for the others."""
    model = tiny.llama(dtype)
    own = dataclasses.replace(checkpoint, tensors=dict(checkpoint.tensors))
    bias = torch.full((checkpoint.config.num_experts,), -200.0)
    bias[checkpoint.config.expert_names.index(expert)] = 200.0
    for module in checkpoint.modules:
        own.tensors[f"{module}.gate_bias"] = bias
    mk.attach(model, own)
    with torch.no_grad():
        return model(tiny.prompt()).logits


def from_peft(folders, **options):
    return convert.from_peft(folders, architecture="LlamaForCausalLM", **options)


ADAPTERS = {
    "as_published": ({}, {}),
    "unequal_ranks": ({"r": 3, "lora_alpha": 10}, {"r": 8, "lora_alpha": 4}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 9}),
    "one_with_rslora": ({"use_rslora": True, "r": 3}, {"r": 5}),
    "rank_pattern": ({"rank_pattern": {"layers.1.self_attn.o_proj": 7}}, {}),
    "alpha_pattern": (
        {"alpha_pattern": {r".*layers.\d+.self_attn.o_proj": 3}},
        {"alpha_pattern": {"model.layers.0.self_attn.o_proj": 32}},
    ),
    "every_pattern": (
        {
            "target_modules": ["q_proj", "o_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, "layers.0.mlp.down_proj": 6},
            "alpha_pattern": {"^model.layers.1.*": 5, "down_proj": 20},
            "use_rslora": True,
        },
        {"rank_pattern": {"0.self_attn.o_proj": 1}, "alpha_pattern": {"o_proj": 0.5}},
    ),
    "unequal_targets": (
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["gate_proj", "up_proj", "o_proj"], "r": 6},
    ),
    "bf16": ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
    "fp16_and_fp32": ({"dtype": torch.float16}, {}),
    "bf16_with_a_pattern": ({"dtype": torch.bfloat16, "alpha_pattern": {"0.*o_proj": 3}}, {}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_chosen_expert_is_its_peft_model(case, tmp_path):
    folders, logits = pair(tmp_path, *ADAPTERS[case])
    checkpoint = from_peft(folders)
    mk.save_checkpoint(checkpoint, tmp_path / "checkpoint")
    loaded = mk.load_checkpoint(tmp_path / "checkpoint")
    assert (logits["glad"] - logits["unwill"]).abs().max() > 0.1
    for expert, expected in logits.items():
        found = chosen(loaded, expert)
        assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def test_published_settings_survive_bit_for_bit(tmp_path):
    folders, _ = pair(tmp_path, {"r": 3, "lora_alpha": 7}, {"r": 8, "lora_alpha": 16})
    checkpoint = from_peft(folders)
    assert checkpoint.config.ranks == (3, 8)
    assert checkpoint.config.lora_alpha == (7.0, 16.0)
    assert checkpoint.config.expert_names == ("glad", "unwill")
    assert checkpoint.config.target_modules == ("o_proj",)
    for e, folder in enumerate(folders.values()):
        for key, tensor in safetensors.torch.load_file(folder / TENSORS).items():
            module, kind = key.removeprefix("base_model.model.").rsplit(".", 2)[:2]
            stacked, rank = checkpoint.tensors[f"{module}.{kind}"][e], checkpoint.config.ranks[e]
            assert torch.equal(stacked[:rank] if kind == "lora_A" else stacked[:, :rank], tensor)


def kept(checkpoint, folders):
    """Which modules of which expert have the `lora_B` of their folder, bit for bit."""
    found = set()
    for e, (name, folder) in enumerate(folders.items()):
        for key, tensor in safetensors.torch.load_file(folder / TENSORS).items():
            module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            stacked = checkpoint.tensors.get(f"{module}.lora_B")
            if stacked is not None and torch.equal(stacked[e, :, : tensor.shape[1]], tensor):
                found.add((name, module))
    return found


def test_only_a_scaling_of_its_own_is_multiplied_into_a_module(tmp_path):
    settings = {"use_rslora": True, "target_modules": ["q_proj", "o_proj"]}
    other = settings | {"rank_pattern": {"0.self_attn.o_proj": 9}}
    folders, _ = pair(tmp_path, settings, other)
    checkpoint = from_peft(folders)
    assert checkpoint.config.rslora
    assert checkpoint.config.ranks == (4, 9)
    everything = {(name, module) for name in folders for module in checkpoint.modules}
    assert kept(checkpoint, folders) == everything - {("unwill", O_PROJ.format(0))}


def test_one_expert_with_rslora_needs_no_change_of_its_tensors(tmp_path):
    folders, _ = pair(tmp_path, {"use_rslora": True, "r": 3}, {"r": 5})
    checkpoint = from_peft(folders)
    assert not checkpoint.config.rslora
    assert checkpoint.config.lora_alpha == pytest.approx((8 * 3**0.5, 8))
    assert len(kept(checkpoint, folders)) == 4


def test_half_precision_stays_half_unless_a_scaling_goes_into_it(tmp_path):
    half = {"dtype": torch.bfloat16}
    folders, _ = pair(tmp_path, half | {"alpha_pattern": {"0.self_attn.o_proj": 3}}, half)
    tensors = from_peft(folders).tensors
    assert {tensors[O_PROJ.format(i) + ".lora_B"].dtype for i in (0, 1)} == {
        torch.float32,
        torch.bfloat16,
    }


def test_without_routers_every_gate_is_one_half(tmp_path):
    folders, _ = pair(tmp_path)
    model = tiny.llama()
    mk.attach(model, from_peft(folders))
    with mk.record_gates(model) as gates, torch.no_grad():
        model(tiny.prompt())
    assert len(gates) == 2
    assert all((own == 0.5).all() for own in gates.values())


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_routers_that_are_given_are_kept(router, tmp_path):
    folders, _ = pair(tmp_path)
    given = tiny.checkpoint(tiny.llama(), router=router, router_hidden=5)
    routers = {
        module: {k: t for k, t in given.module_tensors(module).items() if "lora" not in k}
        for module in given.modules
    }
    checkpoint = from_peft(
        folders, routers=routers, base_model="tiny", gate="softmax", routed_tokens=None
    )
    assert checkpoint.config.router == router
    assert checkpoint.config.gate == "softmax"
    assert checkpoint.config.routed_tokens is None
    assert checkpoint.config.base_model == "tiny"
    for module, own in routers.items():
        for key, tensor in own.items():
            assert torch.equal(checkpoint.tensors[f"{module}.{key}"], tensor)
    with pytest.raises(ValueError, match="has not both LoRA tensors and a router"):
        from_peft(folders, routers={O_PROJ.format(0): routers[O_PROJ.format(0)]})


def rewritten(folder, change):
    """The tensors of a folder under other keys."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    safetensors.torch.save_file(change(tensors), folder / TENSORS)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_other_spellings_of_the_keys_are_read(rename, tmp_path):
    folders, _ = pair(tmp_path)
    expected = from_peft(folders).tensors
    rewritten(folders["glad"], lambda tensors: {rename(k): t for k, t in tensors.items()})
    found = from_peft(folders).tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def sharded(folder):
    """Write a folder's tensors again as two shards and an index."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    index = {}
    for n, keys in enumerate((sorted(tensors)[:1], sorted(tensors)[1:]), start=1):
        name = f"adapter_model-0000{n}-of-00002.safetensors"
        safetensors.torch.save_file({key: tensors[key] for key in keys}, folder / name)
        index |= dict.fromkeys(keys, name)
    (folder / convert.ADAPTER_INDEX).write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_are_read_and_their_index_is_checked(tmp_path):
    folders, _ = pair(tmp_path)
    expected = from_peft(folders).tensors
    index = sharded(folders["glad"])
    found = from_peft(folders).tensors
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    def write(values):
        (folders["glad"] / convert.ADAPTER_INDEX).write_text(json.dumps(values))

    write({"weight_map": dict.fromkeys(index, "../unwill/adapter_model.safetensors")})
    with pytest.raises(ValueError, match=r"names '../unwill.*no shard here"):
        from_peft(folders)
    write({"weight_map": index | {"more": next(iter(index.values()))}})
    with pytest.raises(ValueError, match="'more' is not both in a shard and in"):
        from_peft(folders)
    write({})
    with pytest.raises(ValueError, match="has no weight_map"):
        from_peft(folders)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora=True: DoRA also rescales.*use_dora=False"),
        ({"lora_bias": True}, "lora_bias=True: MoGU experts have no bias"),
        ({"bias": "all"}, "bias='all': MoGU experts have no bias"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True.*Conv1D"),
        ({"init_lora_weights": "pissa"}, "'pissa'.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": 1}, "init_lora_weights=1"),
        ({"peft_type": "IA3"}, "peft_type='IA3': only LORA"),
        ({"target_parameters": ["experts"]}, "target_parameters=.*use target_modules"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 0}, "r=0 for 'model.layers.0.self_attn.o_proj': take at least 1"),
        ({"r": 5}, r"lora_A \[4, 48\] and lora_B \[64, 4\], but .* gives it rank 5"),
        ({"rank_pattern": {"o_proj": 3}}, "gives it rank 3"),
        ({"rank_pattern": {"(o+)+": 3}}, "no repeated group"),
        ({"alpha_pattern": {"(": 3}}, "take module names"),
        ({"alpha_pattern": {"o_proj": 0}}, "lora_alpha=0 for"),
        ({"lora_alpha": "8"}, "lora_alpha='8' for.*finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000.*finite number"),
    ],
)
def test_an_adapter_that_is_more_or_less_than_lora_is_refused(settings, match, tmp_path):
    folders, _ = pair(tmp_path)
    path = folders["unwill"] / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ValueError, match=match):
        from_peft(folders)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank_pattern": [3]}, r"rank_pattern=\[3\]: take what PEFT writes"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(settings, match, tmp_path):
    folders, _ = pair(tmp_path)
    path = folders["unwill"] / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(TypeError, match=match):
        from_peft(folders)


A = "base_model.model." + O_PROJ.format(0) + ".lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t | {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)},
            "lora_magnitude_vector.*: only lora_A.weight and lora_B.weight|has 'base_model.*only",
        ),
        (lambda t: {k: v for k, v in t.items() if k != A}, "has only one of lora_A and lora_B"),
        (lambda t: t | {A.replace(".weight", ".x.weight"): t[A].clone()}, "lora_A of .* twice"),
        (lambda t: t | {A: t[A] * float("nan")}, "glad: .* has NaN or Inf: train it"),
        (lambda t: t | {A: t[A].int()}, "is torch.int32: save it as"),
        (lambda t: t | {A: t[A][None]}, r"is \[1, 4, 48\]: only adapters of nn.Linear"),
        (lambda t: t | {A: t[A][:3].clone()}, r"lora_A \[3, 48\].*rank 4"),
        (lambda t: t | {A: t[A][:, :5].clone()}, r"a weight of \[64, 48\] in .* but of \[64, 5\]"),
        (lambda t: {}, "has no LoRA tensors"),
        (
            lambda t: {k.replace("model.layers.0", "..etc"): v for k, v in t.items()},
            "cannot be a tensor's name",
        ),
    ],
)
def test_tensors_that_are_no_lora_are_refused(change, match, tmp_path):
    folders, _ = pair(tmp_path)
    rewritten(folders["glad"], change)
    with pytest.raises(ValueError, match=match):
        from_peft(folders)


def test_missing_files_and_pickles_are_refused(tmp_path):
    folders, _ = pair(tmp_path)
    with pytest.raises(ValueError, match="take at least one PEFT folder"):
        from_peft({})
    with pytest.raises(ValueError, match=r"nowhere has no adapter_config.json"):
        from_peft({"glad": tmp_path / "nowhere"})
    (folders["glad"] / TENSORS).unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors: take a folder"):
        from_peft(folders)
    torch.save({}, folders["glad"] / convert.ADAPTER_PICKLE)
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle and never read"):
        from_peft(folders)


def test_experts_of_different_bases_are_refused_unless_told(tmp_path):
    folders, _ = pair(tmp_path)
    for name, folder in folders.items():
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": name}))
    with pytest.raises(ValueError, match=r"different base models, \('glad', 'unwill'\): pass"):
        from_peft(folders)
    assert from_peft(folders, base_model="both").config.base_model == "both"


@pytest.mark.parametrize("rslora", [False, True])
def test_export_and_import_give_the_same_checkpoint_and_peft_the_same_logits(rslora, tmp_path):
    model = tiny.llama()
    original = tiny.checkpoint(model, ("q_proj", "o_proj"), ranks=(3, 5), router="linear")
    original.config = dataclasses.replace(original.config, rslora=rslora, base_model="tiny")
    folders = convert.to_peft(original, tmp_path)
    assert folders == {"glad": tmp_path / "glad", "unwill": tmp_path / "unwill"}
    assert sorted(os.listdir(folders["glad"])) == [CONFIG, TENSORS]
    routers = {
        module: {k: t for k, t in original.module_tensors(module).items() if "gate" in k}
        for module in original.modules
    }
    again = from_peft(folders, routers=routers)
    assert again.tensors.keys() == original.tensors.keys()
    assert all(torch.equal(again.tensors[key], original.tensors[key]) for key in again.tensors)
    assert again.config == dataclasses.replace(
        original.config,
        provenance=again.config.provenance,
        router_hidden=512,
        target_modules=("o_proj", "q_proj"),
    )
    for module in original.modules:
        original.tensors[f"{module}.gate_weight"] = torch.zeros(2, 64)[
            :, : original.tensors[f"{module}.lora_A"].shape[2]
        ].clone()
    for expert, folder in folders.items():
        wrapped = peft.PeftModel.from_pretrained(tiny.llama(), str(folder)).eval()
        with torch.no_grad():
            expected = wrapped(tiny.prompt()).logits
        torch.testing.assert_close(chosen(original, expert), expected, rtol=1e-5, atol=1e-5)


def test_only_the_routed_layers_are_exported(tmp_path):
    folders = convert.to_peft(tiny.checkpoint(tiny.llama(), layers=[1]), tmp_path)
    wrapped = peft.PeftModel.from_pretrained(tiny.llama(), str(folders["glad"]))
    adapted = {n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert adapted == {"base_model.model." + O_PROJ.format(1)}


def test_an_expert_without_ranks_cannot_be_exported(tmp_path):
    empty = tiny.checkpoint(tiny.llama(), ranks=(4, 0))
    with pytest.raises(ValueError, match="expert 'unwill' has rank 0"):
        convert.to_peft(empty, tmp_path)
    assert not os.listdir(tmp_path)


# the published layout: `reference` names its parts as the released files do


def projection(base, seed):
    """One literal projection of visibly different experts."""
    torch.manual_seed(seed)
    K, N = base.in_features, base.out_features
    unwill, glad = reference.LoRA(K, N, 4, 8), reference.LoRA(K, N, 4, 8)
    for lora, strength in ((unwill, 0.9), (glad, 0.1)):
        lora.lora_B.weight.data.normal_(std=strength)
    routers = reference.Router(K, 16), reference.Router(K, 16)
    routers[0].linear_2.bias.data += 1  # alpha_ leans to the unwilling responder
    return reference.RoutedProjection(base, unwill, glad, *routers)


def published(folder, projections, names, family):
    """Write projections as the released files: two PEFT folders and a router."""
    router = {}
    for part, name in (("lora_0", "unwill"), ("lora_1", "glad")):
        (folder / name).mkdir(parents=True)
        tensors = {}
        for i, own in projections.items():
            for kind in ("lora_A", "lora_B"):
                weight = getattr(getattr(own, part), kind).weight.detach().float()
                tensors[f"base_model.model.{names.format(i)}.{kind}.weight"] = weight
        safetensors.torch.save_file(tensors, folder / name / TENSORS)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=[names.rpartition(".")[2]]
        )
        config.save_pretrained(folder / name)
    for i, own in projections.items():
        for prefix in ("alpha_", "beta_"):
            for key, tensor in getattr(own, prefix).state_dict().items():
                router[f"{family}.routers.{i}.{prefix}.{key}"] = tensor.float()
    torch.save(router, folder / "router.pth")
    return folder / "unwill", folder / "glad", folder / "router.pth"


def llama_files(folder, model):
    projections = {i: projection(model.get_submodule(O_PROJ.format(i)), i) for i in (0, 1)}
    return projections, published(folder, projections, O_PROJ, "model")


def test_the_published_llama_files_give_the_published_logits(tmp_path):
    model = tiny.llama(torch.float64)
    projections, files = llama_files(tmp_path, model)
    routed = reference.route(
        model, {O_PROJ.format(i): own.double().eval() for i, own in projections.items()}
    )
    checkpoint = convert.from_official(*files)
    assert checkpoint.config.architecture == "LlamaForCausalLM"
    assert checkpoint.config.router == "mlp"
    assert checkpoint.config.router_hidden == 16
    assert checkpoint.config.expert_names == ("glad", "unwill")
    assert checkpoint.config.routed_tokens == 5
    mk.attach(model, checkpoint)
    with torch.no_grad():
        expected, found = routed(tiny.prompt()).logits, model(tiny.prompt()).logits
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_swapped_published_folders_give_other_logits(tmp_path):
    model = tiny.llama()
    _, (unwill, glad, router) = llama_files(tmp_path, model)
    right = convert.from_official(unwill, glad, router)
    wrong = convert.from_official(glad, unwill, router)
    logits = []
    for checkpoint in (right, wrong):
        mk.attach(model, checkpoint)
        with torch.no_grad():
            logits.append(model(tiny.prompt()).logits)
        mk.detach(model)
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_the_published_falcon_names_are_known(tmp_path):
    names = "transformer.h.{}.self_attention.dense"
    layers = (2, 10)
    projections = {i: projection(torch.nn.Linear(12, 12, bias=False), i) for i in layers}
    files = published(tmp_path, projections, names, "transformer")
    checkpoint = convert.from_official(*files, base_model="falcon")
    assert checkpoint.config.architecture == "FalconForCausalLM"
    assert checkpoint.config.target_modules == ("dense",)
    assert checkpoint.config.base_model == "falcon"
    assert checkpoint.modules == [names.format(i) for i in layers]
    for i in layers:
        own = checkpoint.module_tensors(names.format(i))
        for e, (lora, router) in enumerate((("lora_1", "beta_"), ("lora_0", "alpha_"))):
            weights = getattr(projections[i], lora)
            assert torch.equal(own["lora_A"][e], weights.lora_A.weight)
            assert torch.equal(own["lora_B"][e], weights.lora_B.weight)
            for key, tensor in getattr(projections[i], router).state_dict().items():
                assert torch.equal(own[f"router.{key}"][e], tensor)


R = "model.routers.1.alpha_.linear_0.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: {"state_dict": r}, "'state_dict' of type dict: only a flat dict"),
        (lambda r: list(r.values()), "holds list, not a dict"),
        (lambda r: {}, "holds dict, not a dict of tensors"),
        (lambda r: r | {"model.norm": torch.ones(2)}, "has 'model.norm': take a published router"),
        (lambda r: {k: v for k, v in r.items() if k != R}, "no alpha_.linear_0.weight for layer 1"),
        (lambda r: {k: v for k, v in r.items() if ".1." not in k}, "no router for layer 1"),
        (
            lambda r: r | {k.replace(".1.", ".7."): v.clone() for k, v in r.items()},
            "router for layer 7, but no adapter",
        ),
        (
            lambda r: {k.replace("model", "transformer") if ".1." in k else k: r[k] for k in r},
            "keys of 2 model families",
        ),
        (lambda r: r | {R: r[R][:5].clone()}, r"of \[5, 48\] in alpha_ but of \[16, 48\] in beta_"),
        (lambda r: r | {R: r[R] * float("inf")}, "linear_0.weight has NaN or Inf"),
        (lambda r: r | {R: torch.zeros(1).expand(16, 48)}, r"strides \(0, 0\)"),
        (lambda r: r | {R: r[R].int()}, "in its pickle|IntStorage"),
        (lambda r: {k: v[..., :7].clone() for k, v in r.items()}, "the config asks for"),
    ],
)
def test_a_router_that_is_not_as_published_is_refused(change, match, tmp_path):
    _, files = llama_files(tmp_path, tiny.llama())
    torch.save(change(torch.load(files[2])), files[2])
    with pytest.raises(ValueError, match=match):
        convert.from_official(*files)


def test_two_projections_a_layer_are_not_the_published_layout(tmp_path):
    _, files = llama_files(tmp_path, tiny.llama())
    rewritten(files[0], lambda t: t | {k.replace("o_p", "q_p"): v.clone() for k, v in t.items()})
    with pytest.raises(ValueError, match=r"layer 0 has .*route one module a layer; use from_peft"):
        convert.from_official(*files)
    rewritten(files[0], lambda t: {k.replace("layers.", "layers.x"): v for k, v in t.items()})
    with pytest.raises(ValueError, match="has 0 layer numbers"):
        convert.from_official(*files)


def test_a_router_that_is_no_plain_zip_is_refused(tmp_path):
    _, (unwill, glad, router) = llama_files(tmp_path, tiny.llama())
    with pytest.raises(ValueError, match="is no file"):
        convert.from_official(unwill, glad, tmp_path)
    values, compressed = torch.load(router), tmp_path / "compressed.pth"
    with zipfile.ZipFile(router) as source, zipfile.ZipFile(compressed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"is compressed, which torch.save never does"):
        convert.from_official(unwill, glad, compressed)
    torch.save(values, router, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"File is not a zip file.*save it again"):
        convert.from_official(unwill, glad, router)


def test_conversion_is_no_part_of_the_import():
    program = (
        "import sys, mogu_kernels; assert 'mogu_kernels.convert' not in sys.modules; "
        "import mogu_kernels.convert; assert 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
