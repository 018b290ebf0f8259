"""Routed decoding against the published procedure."""

import pytest
import torch
from transformers import GenerationConfig

import mogu_kernels as mk
import reference
from demo.published import published_model
from tests import tiny


@pytest.fixture(scope="module")
def models():
    """(attached, published, base), one set of numbers."""
    base, attached = tiny.llama(), tiny.llama()
    checkpoint = tiny.checkpoint(attached, tiny.EVERY_TARGET)
    mk.attach(attached, checkpoint)
    return attached, published_model(base, checkpoint), base


def ours(model, ids, **kwargs):
    return mk.generate(model, ids, **{"max_new_tokens": 12, "do_sample": False} | kwargs)


@pytest.mark.parametrize("m", [0, 1, 5, 12, 20])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_the_published_ones(models, m, seed):
    attached, published, base = models
    ids = tiny.prompt(seed=seed)
    expected = reference.mogu_generate(published, base, ids, 12, routed_tokens=m)
    assert torch.equal(ours(attached, ids, routed_tokens=m, eos_token_id=None), expected)


def test_the_routed_tokens_and_the_base_both_matter(models):
    attached, published, base = models
    ids = tiny.prompt()
    answer = ours(attached, ids)
    assert not torch.equal(answer[:, 9:14], reference.mogu_generate(base, base, ids, 12)[:, 9:14])
    assert not torch.equal(answer, reference.mogu_generate(published, published, ids, 12))


@pytest.mark.parametrize("step", [0, 3, 4, 5, 8])
def test_an_end_token_stops_where_the_published_procedure_stops(models, step):
    attached, published, base = models
    ids = tiny.prompt()
    token = ours(attached, ids, eos_token_id=None)[0, 9 + step].item()
    expected = reference.mogu_generate(published, base, ids, 12, eos_token_ids=(token,))
    out = ours(attached, ids, eos_token_id=token, pad_token_id=258)
    assert torch.equal(out, expected)


def test_a_left_padded_batch_answers_as_each_prompt_alone(models):
    attached, *_ = models
    prompts = [tiny.prompt(n, seed=n) for n in (4, 9, 7)]
    ids = torch.full((3, 9), 258)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - prompt.shape[1] :] = prompt
    alone = [ours(attached, prompt, eos_token_id=None)[0, prompt.shape[1] :] for prompt in prompts]
    mask = (ids != 258).long()
    out = ours(attached, ids, attention_mask=mask, eos_token_id=None)
    assert torch.equal(out[:, 9:], torch.stack(alone))
    end = alone[1][2].item()  # one prompt ends inside the routed tokens, the others go on
    stopped = ours(attached, ids, attention_mask=mask, eos_token_id=end, pad_token_id=258)
    for row, answer in enumerate(alone):
        length = answer.tolist().index(end) + 1 if end in answer else 12
        assert torch.equal(stopped[row, 9 : 9 + length], answer[:length])
        assert (stopped[row, 9 + length :] == 258).all()


def test_routed_tokens_none_routes_throughout(models):
    attached, published, _ = models
    ids = tiny.prompt()
    expected = reference.mogu_generate(published, published, ids, 12, routed_tokens=12)
    assert torch.equal(ours(attached, ids, routed_tokens=None, eos_token_id=None), expected)


def test_sampling_follows_the_seed_and_its_limit_is_greedy(models):
    attached, *_ = models
    ids = tiny.prompt()

    def sample(seed, **kwargs):
        torch.manual_seed(seed)
        return ours(attached, ids, do_sample=True, eos_token_id=None, **kwargs)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, top_k=1), ours(attached, ids, eos_token_id=None))


def test_several_sequences_per_prompt(models):
    attached, *_ = models
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    out = ours(attached, tiny.prompt(batch=2), **kwargs)
    assert out.shape == (6, 21)
    assert torch.equal(out[:, :9], tiny.prompt(batch=2).repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out}) == 6


def test_gates_are_recorded_for_prompt_and_routed_tokens_only(models):
    attached, *_ = models
    with mk.record_gates(attached) as gates:
        ours(attached, tiny.prompt(9), eos_token_id=None)
    assert len(gates) == 14
    assert {g.shape for g in gates.values()} == {torch.Size([1, 9 + 4, 2])}


def test_an_error_inside_restores_routing(models):
    attached, *_ = models
    ids = tiny.prompt()
    before = attached(ids).logits

    def interrupt(input_ids, scores, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours(attached, ids, stopping_criteria=[interrupt])
    assert torch.equal(attached(ids).logits, before)


def test_a_generation_config_is_taken_and_not_changed(models):
    attached, *_ = models
    config = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=None)
    before = config.to_dict()
    ids = tiny.prompt()
    out = mk.generate(attached, ids, generation_config=config)
    assert torch.equal(out, ours(attached, ids, eos_token_id=None, max_new_tokens=7))
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"handoff": "guess"}, "handoff='guess'"),
        ({"routed_tokens": -1}, "routed_tokens=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_beams": 3}, "num_beams=3: beam search is not supported"),
        ({"streamer": object()}, "streaming is not supported"),
    ],
)
def test_what_is_not_supported_is_named(models, kwargs, match):
    with pytest.raises(ValueError, match=match):
        ours(models[0], tiny.prompt(), **kwargs)


def test_an_unattached_model_is_named(models):
    with pytest.raises(ValueError, match="no routed projection"):
        ours(models[2], tiny.prompt())
