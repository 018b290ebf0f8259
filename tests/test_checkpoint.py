"""The checkpoint folder: roundtrips, atomic writes, and every way it can be wrong."""

import json
import os

import pytest
import torch

from mogu_kernels import MoGUCheckpoint, MoGUConfig, checkpoint, load_checkpoint, save_checkpoint

ROUTERS = pytest.mark.parametrize("router", ["linear", "mlp"])


def config(**changes):
    return MoGUConfig(
        **{
            "base_model": "tiny",
            "architecture": "LlamaForCausalLM",
            "target_modules": ("o_proj",),
            "ranks": (4, 2),
            "lora_alpha": (8.0, 16.0),
            "router_hidden": 5,
            "provenance": {"steps": 3},
        }
        | changes
    )


def example(router="linear", layers=(2, 10)):
    """Two layers of 6 -> 7, the second expert of smaller rank."""
    torch.manual_seed(0)
    tensors = {}
    for layer in layers:
        name = f"model.layers.{layer}.self_attn.o_proj"
        tensors[f"{name}.lora_A"] = torch.randn(2, 4, 6)
        tensors[f"{name}.lora_B"] = torch.randn(2, 7, 4)
        tensors[f"{name}.lora_A"][1, 2:] = 0
        tensors[f"{name}.lora_B"][1, :, 2:] = 0
        if router == "linear":
            tensors[f"{name}.gate_weight"] = torch.randn(2, 6)
            tensors[f"{name}.gate_bias"] = torch.randn(2)
        else:
            tensors[f"{name}.router.linear_0.weight"] = torch.randn(2, 5, 6)
            tensors[f"{name}.router.linear_1.weight"] = torch.randn(2, 6, 5)
            tensors[f"{name}.router.linear_1.bias"] = torch.randn(2, 6)
            tensors[f"{name}.router.linear_2.weight"] = torch.randn(2, 1, 6)
            tensors[f"{name}.router.linear_2.bias"] = torch.randn(2, 1)
    return MoGUCheckpoint(config(router=router), tensors)


def same(one, other):
    return (
        one.config == other.config
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    )


@ROUTERS
def test_a_saved_checkpoint_loads_bit_for_bit(router, tmp_path):
    original = example(router)
    save_checkpoint(original, tmp_path / "new" / "folder")
    assert same(load_checkpoint(str(tmp_path / "new" / "folder")), original)


def test_modules_come_in_the_order_of_layers():
    assert [name.split(".")[2] for name in example().modules] == ["2", "10"]


def test_scaling_is_alpha_over_each_experts_own_rank():
    assert config().scaling == (2.0, 8.0)
    assert config(rslora=True).scaling == (4.0, 16.0 / 2**0.5)
    assert config(ranks=(4, 0)).scaling == (2.0, 0.0)


def test_folding_keeps_experts_and_drops_the_linears(tmp_path):
    original = example("mlp")
    folded = original.folded()
    save_checkpoint(folded, tmp_path)
    assert same(load_checkpoint(tmp_path), folded)
    assert folded.config.router == "linear"
    assert len(folded.tensors) == 8
    name = folded.modules[0]
    u = original.module_tensors(name)
    vector = u["router.linear_2.weight"] @ u["router.linear_1.weight"] @ u["router.linear_0.weight"]
    torch.testing.assert_close(folded.tensors[f"{name}.gate_weight"], vector[:, 0])
    assert folded.folded() is folded


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_save_leaves_the_previous_checkpoint(call, tmp_path, monkeypatch):
    first, second = example(), example()
    save_checkpoint(first, tmp_path)
    second.tensors = {key: tensor + 1 for key, tensor in second.tensors.items()}
    for name in second.modules:
        second.tensors[f"{name}.lora_A"][1, 2:] = 0
        second.tensors[f"{name}.lora_B"][1, :, 2:] = 0

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(second, tmp_path)
    monkeypatch.undo()
    assert same(load_checkpoint(tmp_path), first)
    assert sorted(os.listdir(tmp_path)) == [checkpoint.CONFIG_FILE, checkpoint.TENSORS_FILE]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"format_version": 2}, ValueError, "format_version is 2.*reads 1"),
        ({"base_model": 3}, TypeError, "base_model=3: take str"),
        ({"target_modules": "o_proj"}, TypeError, "target_modules='o_proj': take a tuple of str"),
        ({"ranks": (4, 2.5)}, TypeError, r"ranks=\(4, 2.5\): take a tuple of int"),
        ({"ranks": (4, True)}, TypeError, "ranks"),
        ({"ranks": ()}, ValueError, "take 1 to 8 experts"),
        ({"ranks": (1,) * 9}, ValueError, "take 1 to 8 experts"),
        ({"ranks": (4, -1)}, ValueError, "none below 0"),
        ({"ranks": (0, 0)}, ValueError, "at least one above"),
        ({"lora_alpha": (1.0,)}, ValueError, r"lora_alpha=\(1.0,\), but ranks"),
        ({"lora_alpha": (1.0, float("nan"))}, ValueError, "finite"),
        ({"expert_names": ("glad", "glad")}, ValueError, "name each once"),
        ({"target_modules": ()}, ValueError, "at least one"),
        ({"gate": "relu"}, ValueError, "gate='relu'"),
        ({"router": "cnn"}, ValueError, "router='cnn'"),
        ({"router_hidden": 0}, ValueError, "router_hidden=0"),
        ({"routed_tokens": -1}, ValueError, "routed_tokens=-1"),
        ({"format_version": True}, TypeError, "format_version=True: take int"),
        ({"ranks": (4, 2**31)}, ValueError, "take at most 2,147,483,647"),
        ({"lora_alpha": (1.0, 10**400)}, ValueError, r"lora_alpha=\(1.0, 1000.*\.\.\..*finite"),
        ({"architecture": "../x"}, ValueError, r"architecture='../x': take the name of a class"),
        ({"expert_names": ("glad", "../x")}, ValueError, "take up to 64 letters, digits, _ and -"),
        ({"target_modules": ("a/b",)}, ValueError, r"\('a/b',\): take ends of module names"),
    ],
)
def test_impossible_configs_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        config(**changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d | {"format_version": 99}, "format_version is 99"),
        (lambda d: d | {"colour": "red"}, "unknown keys in the config: colour"),
        (lambda d: {k: v for k, v in d.items() if k != "ranks"}, "missing in the config: ranks"),
        (lambda d: [d], "holds a list"),
        (lambda d: d | {"lora_alpha": [1, float("nan")]}, "is not JSON: NaN is no number"),
        (lambda d: d | {"provenance": "x" * 2**20}, r"a config has at most 1,048,576"),
    ],
)
def test_a_foreign_config_file_is_named(change, match, tmp_path):
    save_checkpoint(example(), tmp_path)
    path = tmp_path / checkpoint.CONFIG_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path)


def _set(key, value):
    def change(tensors):
        tensors[f"model.layers.2.self_attn.o_proj.{key}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.layers.2.self_attn.o_proj.lora_B"), "missing.*2.self_attn.o_proj"),
        (_set("lora_C", torch.ones(1)), "surplus tensors.*lora_C"),
        (_set("gate_bias", torch.zeros(3)), r"gate_bias is \[3\].*\[2\]"),
        (_set("gate_weight", torch.zeros(2, 5)), r"gate_weight is \[2, 5\].*\[2, 6\]"),
        (_set("lora_A", torch.zeros(2, 3, 6)), r"lora_A is \[2, 3, 6\].*\[2, 4, 6\]"),
        (_set("lora_A", torch.zeros(())), r"lora_A is \[\]"),
        (_set("gate_bias", torch.zeros(2).half()), "gate_bias is torch.float16.*fp32"),
        (_set("lora_B", torch.zeros(2, 7, 4).int()), "lora_B is torch.int32: take float16, bf"),
        (_set("lora_B", torch.zeros(2, 7, 4).to(torch.float8_e5m2)), "lora_B is torch.float8"),
        (_set("lora_B", torch.zeros(2, 0, 4)), r"\[2, 0, 4\]: a projection has at least one"),
        (_set("lora_B", torch.zeros(2, 7, 4).half()), "lora_A is torch.float32 but lora_B"),
        (_set("lora_B", torch.full((2, 7, 4), float("nan"))), "lora_B has NaN or Inf"),
        (_set("gate_bias", torch.tensor([0, float("inf")])), "gate_bias has NaN or Inf"),
        (_set("lora_A", torch.ones(2, 4, 6)), "'unwill' has rank 2.*pad with zeros"),
        (lambda t: t.clear(), r"target_modules=\('o_proj',\)"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(change, match, tmp_path):
    broken = example()
    change(broken.tensors)
    with pytest.raises(ValueError, match=match):
        save_checkpoint(broken, tmp_path)
    assert not os.listdir(tmp_path)


def test_a_module_that_is_no_target_is_named():
    broken = MoGUCheckpoint(config(target_modules=("q_proj",)), example().tensors)
    with pytest.raises(ValueError, match=r"\('q_proj',\), but the tensors are for \('o_proj',\)"):
        broken.validate()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    save_checkpoint(example(), tmp_path)
    path = tmp_path / checkpoint.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mogu_model.safetensors is damaged \([\d,]+ bytes"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"mogu_config.json is not JSON"),
        ('{"ranks": 1, "gate": 2, "ranks": 3}', "is not JSON: the key 'ranks' stands there twice"),
        ("[" * 10**5, "is nested too deeply"),
    ],
)
def test_malformed_json_is_named(text, match, tmp_path):
    save_checkpoint(example(), tmp_path)
    (tmp_path / checkpoint.CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_provenance_that_is_no_json_leaves_the_previous_checkpoint(value, tmp_path):
    save_checkpoint(example(), tmp_path)
    broken = MoGUCheckpoint(config(provenance={"loss": value}), example().tensors)
    with pytest.raises(ValueError, match=r"mogu_config.json cannot be written as JSON"):
        save_checkpoint(broken, tmp_path)
    assert same(load_checkpoint(tmp_path), example())


@pytest.mark.parametrize("name", ["../../etc/x", "/x", "a..b", ".a", "a.", "a b", "é", "a" * 201])
def test_a_name_that_no_module_can_have_is_refused(name):
    broken = example()
    broken.tensors[f"{name}.o_proj.lora_A"] = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="cannot be a tensor's name: take at most 200 letters"):
        broken.validate()


@pytest.mark.parametrize("targets", [("self_attn.o_proj",), ("model.layers.*.o_proj",)])
def test_targets_may_be_ends_of_names_or_patterns(targets, tmp_path):
    original = MoGUCheckpoint(config(target_modules=targets), example().tensors)
    save_checkpoint(original, tmp_path)
    assert same(load_checkpoint(tmp_path), original)


def test_pickled_files_are_never_read(tmp_path):
    torch.save({}, tmp_path / "router.pth")
    with pytest.raises(ValueError, match="pickled files are never read"):
        load_checkpoint(tmp_path)
