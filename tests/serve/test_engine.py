"""vLLM engines with a MoGU checkpoint, against the Hugging Face path."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mogu_kernels as mk
from mogu_kernels.hf import seeded_checkpoint

pytest.importorskip("vllm")

from vllm import LLM, SamplingParams

from tests.serve.conftest import CHECKPOINT, KINDS, TOKENS
from tests.serve.padded import save_padded
from tests.serve.quantised import quantise_, save_quantised


def engine(model, checkpoint=CHECKPOINT, ranks=1, **options) -> LLM:
    """fp32, eager unless `options` say otherwise; one rank runs in this process."""
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 32,
        "disable_log_stats": False,
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": "uni" if ranks == 1 else "mp",
    }
    return LLM(str(model), **defaults | options, additional_config={"mogu": str(checkpoint)})


def params(kind: str, tokens: int = TOKENS) -> SamplingParams:
    """Greedy, routed as `kind` says."""
    asked = KINDS[kind]
    return SamplingParams(
        temperature=0,
        max_tokens=tokens,
        extra_args=None if asked is None else {"mogu_routed_tokens": asked},
    )


def answers(llm: LLM, reference, shift: int = 0) -> list[tuple[int, str, list[int]]]:
    """All prompts in one batch, a third each routed, routed throughout and base."""
    kinds = [list(KINDS)[(i + shift) % len(KINDS)] for i in range(len(reference.prompts))]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in reference.prompts],
        [params(kind) for kind in kinds],
        use_tqdm=False,
    )
    return [
        (i, kind, list(output.outputs[0].token_ids))
        for i, (kind, output) in enumerate(zip(kinds, outputs, strict=True))
    ]


def metric(llm: LLM, name: str) -> float:
    """The value of one of vLLM's counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def test_preemption_changes_no_token(reference, model_folder):
    """Blocks for a few requests only: others are thrown out and computed anew."""
    llm = engine(
        model_folder, block_size=32, num_gpu_blocks_override=40, enable_prefix_caching=True
    )
    reference.check(answers(llm, reference))
    handed_over = sum(i % 3 == 1 for i in range(len(reference.prompts)))
    assert metric(llm, "vllm:num_preemptions") > handed_over + 3


def test_compiled_and_without_prefix_caching(reference, model_folder):
    """The graph knows nothing of the batch: one trace serves all mixtures."""
    llm = engine(model_folder, enforce_eager=False, enable_prefix_caching=False)
    reference.check(answers(llm, reference))


def test_two_ranks(reference, model_folder, tmp_path, monkeypatch):
    """One all-reduce for each row-parallel projection, routed or not; the tokens are the same."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for the counter below
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    save_padded(model_folder, CHECKPOINT, tmp_path)
    llm = engine(tmp_path / "model", tmp_path / "checkpoint", ranks=2)
    reference.check(answers(llm, reference))
    llm.collective_rpc(_count_reductions)
    llm.generate(
        {"prompt_token_ids": reference.prompts[0]}, params("throughout", 1), use_tqdm=False
    )
    layers, routed = 30, len(mk.load_checkpoint(CHECKPOINT).modules)
    for widths in llm.collective_rpc(_reductions):
        assert len(widths) == 2 * layers + 1  # o_proj and down_proj, and the embedding
        wide = [width for width in widths if width != 576]
        assert wide == [576 + 2 * 16 + 2] * routed


def _count_reductions(worker: Any) -> None:
    from vllm.distributed import get_tp_group

    group, widths = get_tp_group(), []
    original = group._all_reduce_out_place

    def counted(tensor):
        widths.append(tensor.shape[-1])
        return original(tensor)

    group._all_reduce_out_place = counted
    group.mogu_widths = widths


def _reductions(worker: Any) -> list[int]:
    from vllm.distributed import get_tp_group

    return get_tp_group().mogu_widths


EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (SMALL, EVERY),
    "mistral": (SMALL | {"sliding_window": None}, EVERY),
    "qwen2": (SMALL, EVERY),
    "qwen3": (SMALL | {"head_dim": 64}, EVERY),
    "falcon": (
        {**SMALL, "num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": True},
        ("dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
}


@pytest.mark.parametrize(
    ("family", "ranks"), [*((family, 1) for family in FAMILIES), ("llama", 2), ("falcon", 2)]
)
def test_families(family, ranks, tmp_path, monkeypatch):
    """Every projection that vLLM keeps, merges or shards: log-probabilities of the routed model.

    Falcon's attention leaves its sum over the ranks to the MLP's.
    """
    if ranks == 2:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    values, targets = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    checkpoint = seeded_checkpoint(model, targets, strength=0.3)
    mk.save_checkpoint(checkpoint, tmp_path / "checkpoint")
    mk.attach(model, tmp_path / "checkpoint")
    wanted = expected(model)
    llm = engine(tmp_path / "model", tmp_path / "checkpoint", ranks, skip_tokenizer_init=True)
    torch.testing.assert_close(found(llm), wanted, rtol=0, atol=2e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


@pytest.mark.parametrize(("scheme", "dtype"), [("W8A8", "float32"), ("W4A16", "bfloat16")])
def test_quantised_bases(scheme, dtype, tmp_path):
    """8-bit weights and inputs, 4-bit weights: what vLLM unpacks or multiplies is its affair.

    The reference rounds in the same places, though not to the same bits: its error is that of the
    base alone, far below what routing changes.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **SMALL | {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.06}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    mk.save_checkpoint(seeded_checkpoint(model, EVERY, strength=0.3), tmp_path / "checkpoint")
    quantise_(model, scheme)
    mk.attach(model, tmp_path / "checkpoint")
    wanted = expected(model)
    save_quantised(mk.detach(model), tmp_path / "model")
    llm = engine(tmp_path / "model", tmp_path / "checkpoint", dtype=dtype, skip_tokenizer_init=True)
    routed, base = (found(llm) - wanted).abs().mean(1)
    assert base < 0.04
    assert routed < 0.04
    assert (wanted[0] - wanted[1]).abs().mean() > 0.8


PROMPT = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(model) -> torch.Tensor:
    """Log-probabilities [2, 39] of the prompt's tokens, routed throughout and not at all."""
    both = []
    for routed in (True, False):
        with mk.routing(model, routed):
            logits = model(PROMPT).logits[0, :-1].float().log_softmax(-1)
        both.append(logits.gather(1, PROMPT[0, 1:, None])[:, 0])
    return torch.stack(both)


def found(llm: LLM) -> torch.Tensor:
    """The same of an engine, in one pass."""
    asked = [params(kind, 1) for kind in ("throughout", "base")]
    for one in asked:
        one.prompt_logprobs, one.detokenize = 0, False
    outputs = llm.generate([{"prompt_token_ids": PROMPT[0].tolist()}] * 2, asked, use_tqdm=False)
    return torch.tensor(
        [[next(iter(own.values())).logprob for own in o.prompt_logprobs[1:]] for o in outputs]
    )


def test_a_checkpoint_that_does_not_fit_is_refused(model_folder, tmp_path):
    """Before any worker starts, by name."""
    checkpoint = mk.load_checkpoint(CHECKPOINT)
    mk.save_checkpoint(checkpoint, tmp_path)
    path = tmp_path / "mogu_config.json"
    values = json.loads(path.read_text()) | {"architecture": "MistralForCausalLM"}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is for MistralForCausalLM but the model is Llama"):
        engine(model_folder, tmp_path)
