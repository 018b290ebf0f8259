"""Every row of the architecture table: attach, published logits, detach; and what is in no row."""

import copy

import pytest
import torch
import transformers
from torch import nn

import mogu_kernels as mk
import reference
from demo.published import published_model
from mogu_kernels.architectures import ARCHITECTURES, is_target
from mogu_kernels.hf import seeded_checkpoint, target_linears
from tests import baichuan, tiny

WIDE_HEADS = tiny.SIZES  # no projection is square
SMALL = {name: value for name, value in tiny.SIZES.items() if name != "head_dim"}
FALCON = {
    name: value
    for name, value in SMALL.items()
    if name not in ("intermediate_size", "num_key_value_heads")
}
CONFIGS = {
    "LlamaForCausalLM": ("LlamaConfig", WIDE_HEADS),
    "MistralForCausalLM": ("MistralConfig", WIDE_HEADS | {"sliding_window": 6}),
    "Qwen2ForCausalLM": ("Qwen2Config", SMALL),
    "Qwen3ForCausalLM": ("Qwen3Config", WIDE_HEADS),
    "GemmaForCausalLM": ("GemmaConfig", WIDE_HEADS),
    "Gemma2ForCausalLM": ("Gemma2Config", WIDE_HEADS | {"sliding_window": 6}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", WIDE_HEADS | {"sliding_window": 6}),
    "Olmo2ForCausalLM": ("Olmo2Config", SMALL),
    "Phi3ForCausalLM": ("Phi3Config", SMALL),
    "FalconForCausalLM": ("FalconConfig", FALCON | {"parallel_attn": True, "multi_query": True}),
}


def build(architecture: str, dtype=torch.float32) -> nn.Module:
    """A random tiny model of one row."""
    torch.manual_seed(0)
    if architecture == "BaichuanForCausalLM":
        model = baichuan.BaichuanForCausalLM(baichuan.BaichuanConfig(architectures=[architecture]))
        model = model.to(dtype).eval()
        model(tiny.prompt())  # NormHead has normalised its weight
        return model
    config, sizes = CONFIGS[architecture]
    made = getattr(transformers, config)(**sizes, architectures=[architecture])
    return getattr(transformers, architecture)(made).to(dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.prompt(batch=2)).logits


def identity(model) -> tuple:
    """What a swap and its undoing must leave."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
    )


every_row = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_row
def test_routed_logits_equal_the_published_ones_and_detach_restores(architecture):
    model = build(architecture, torch.float64)
    before, plain = identity(model), logits(model)
    row = ARCHITECTURES[architecture]
    checkpoint = tiny.checkpoint(model, row.projections, strength=0.1)
    expected = logits(published_model(model, checkpoint))
    report = mk.attach(model, checkpoint)
    assert len(report.modules) == 2 * len(row.projections)
    assert (logits(model) - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert not torch.allclose(expected, plain, rtol=1e-3)
    with mk.routing(model, False):
        assert torch.equal(logits(model), plain)
    mk.detach(model)
    assert identity(model) == before
    assert torch.equal(logits(model), plain)


@every_row
def test_every_projection_of_a_row_is_fused_in_fp32(architecture):
    model = build(architecture)
    row = ARCHITECTURES[architecture]
    checkpoint = tiny.checkpoint(model, row.projections, strength=0.1)
    expected = logits(published_model(model, checkpoint))
    report = mk.attach(model, checkpoint)
    routed = [module for module in model.modules() if isinstance(module, mk.MoGULinear)]
    assert all(module.is_fused for module in routed)
    assert len(report.fused_mlps) == (2 if row.gated_mlp else 0)
    torch.testing.assert_close(logits(model), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_a_row_generates_the_published_tokens(architecture, layers):
    base, model = build(architecture), build(architecture)
    targets = ARCHITECTURES[architecture].projections[:2]
    checkpoint = tiny.checkpoint(model, targets, strength=0.1, layers=layers)
    published = published_model(base, checkpoint)
    mk.attach(model, checkpoint)
    ids = tiny.prompt(9)
    expected = reference.mogu_generate(published, base, ids, 12)
    for handoff in ("replay", "shadow"):
        out = mk.generate(
            model, ids, max_new_tokens=12, do_sample=False, eos_token_id=None, handoff=handoff
        )
        assert torch.equal(out, expected), handoff


class Unknown(nn.Module):
    """Nobody's architecture."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"mixer": nn.ModuleDict({"out": nn.Linear(8, 8), "gate": nn.Linear(8, 8)})}
            )
            for _ in range(3)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["mixer"]["out"](x) * block["mixer"]["gate"](x))
        return self.head(x)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("target", ["mixer.out", "blocks.*.mixer.out", "out"])
def test_an_unknown_architecture_takes_patterns(target, tmp_path):
    torch.manual_seed(0)
    model = Unknown().eval()
    checkpoint = seeded_checkpoint(model, (target,), router_hidden=4, layers=[0, 2])
    mk.save_checkpoint(checkpoint, tmp_path)
    x = torch.randn(3, 8)
    plain = model(x)
    report = mk.attach(model, tmp_path)
    assert report.modules == ("blocks.0.mixer.out", "blocks.2.mixer.out")
    assert not torch.equal(model(x), plain)
    mk.detach(model)
    assert torch.equal(model(x), plain)


def test_what_cannot_be_routed_is_named():
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
    gpt2 = transformers.GPT2LMHeadModel(config)
    with pytest.raises(TypeError, match=r"c_proj is a Conv1D: it keeps its weight transposed"):
        target_linears(gpt2, ("c_proj",))
    with pytest.raises(ValueError, match="lm_head is the output embedding"):
        target_linears(gpt2, ("lm_head",))
    with pytest.raises(TypeError, match=r"embed_tokens is a Embedding: only nn\.Linear"):
        target_linears(Named(), ("embed_tokens",))
    with pytest.raises(
        ValueError, match=r"'mlp' is no projection of LlamaForCausalLM: take any of"
    ):
        target_linears(tiny.llama(), ("mlp",))
    with pytest.raises(ValueError, match=r"one of \('nowhere',\): its linears are gate, head, out"):
        target_linears(Unknown(), ("nowhere",))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 4)


def test_targets_are_ends_of_names_or_patterns():
    name = "model.layers.10.self_attn.o_proj"
    assert is_target(name, ["o_proj"])
    assert is_target(name, ["self_attn.o_proj"])
    assert is_target(name, ["model.layers.*.o_proj"])
    assert not is_target(name, ["proj"])
    assert not is_target(name, ["layers.*.o_proj"])


def test_a_saved_model_is_the_base_and_the_copy_of_an_attached_one_saves_its_own(tmp_path):
    model = tiny.llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mk.attach(model, tiny.checkpoint(model, tiny.EVERY_TARGET))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    for folder, shift in (("one", 0), ("other", 1)):
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.state_dict().keys() == base.keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, base[name] + (shift if name == "model.norm.weight" else 0))
    assert "save_pretrained" not in mk.detach(model).__dict__


def test_a_hub_id_is_fetched_where_no_folder_has_its_name(tmp_path, monkeypatch):
    model = tiny.llama()
    mk.save_checkpoint(tiny.checkpoint(model), tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        if name == "someone/nothing":
            raise OSError("404 Client Error")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    mk.attach(model, "someone/mogu-llama")
    assert asked == [("someone/mogu-llama", ["mogu_config.json", "mogu_model.safetensors"])]
    with pytest.raises(ValueError, match=r"someone/nothing is no folder here, and the hub .*404"):
        mk.attach(mk.detach(model), "someone/nothing")
    with pytest.raises(ValueError, match=r"has no mogu_config\.json"):
        mk.attach(model, tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny.llama().train()
        mk.attach(model, tiny.checkpoint(model), trainable=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tiny.prompt(batch=2)
        model(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "o_proj.lora" in n})
    assert grads[0]
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[1][name], grad)


def test_an_offloaded_model_is_refused_and_an_attached_one_can_be_offloaded():
    import accelerate

    model = tiny.llama()
    checkpoint = tiny.checkpoint(model, tiny.EVERY_TARGET)
    attached = copy.deepcopy(model)
    mk.attach(attached, checkpoint)
    expected = logits(attached)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="on the meta device: load the model before attaching, or"):
        mk.attach(model, checkpoint)
    accelerate.cpu_offload(attached, execution_device="cpu")
    assert next(attached.parameters()).is_meta
    torch.testing.assert_close(logits(attached), expected)


def test_a_model_spread_by_a_device_map_is_attached_part_by_part():
    import accelerate

    model = tiny.llama()
    plain = logits(model)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, parts, force_hooks=True)
    expected = logits(published_model(tiny.llama(), tiny.checkpoint(tiny.llama())))
    mk.attach(model, tiny.checkpoint(model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(mk.detach(model)), plain)
