"""Routed decoding against the published procedure."""

import concurrent.futures
import dataclasses
import sys

import pytest
import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

import mogu_kernels as mk
import reference
from demo.published import published_model
from demo.smollm2 import load_smollm2
from mogu_kernels.hf import seeded_checkpoint
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


exact = pytest.mark.parametrize("handoff", ["shadow", "replay"])


@exact
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("m", [0, 1, 2, 5, 12, 20])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_tokens_are_the_published_ones(models, m, seed, handoff, cache):
    attached, published, base = models
    ids = tiny.prompt(tokens=4 + 6 * seed, seed=seed)
    expected = reference.mogu_generate(published, base, ids, 12, routed_tokens=m)
    options = {"cache_implementation": "static"} if cache == "static" else {}
    out = ours(attached, ids, routed_tokens=m, eos_token_id=None, handoff=handoff, **options)
    assert torch.equal(out, expected)


def test_keeping_the_routed_cache_is_another_answer(models):
    attached, published, base = models
    ids = tiny.prompt(seed=2)
    kept = ours(attached, ids, handoff="keep", eos_token_id=None)
    expected = reference.mogu_generate(published, base, ids, 12)
    assert torch.equal(kept[:, : 9 + 5], expected[:, : 9 + 5])
    assert not torch.equal(kept, expected)
    # by hand: the routed model's cache and the base model's weights
    with torch.no_grad(), mk.routing(attached, True):
        out = attached(expected[:, : 9 + 4])
    with torch.no_grad(), mk.routing(attached, False):
        out = attached(expected[:, 13:14], past_key_values=out.past_key_values)
    assert out.logits[0, -1].argmax() == kept[0, 14]


@exact
def test_transformers_takes_it_as_a_decoding_method(models, handoff):
    attached, *_ = models
    ids = tiny.prompt()
    out = attached.generate(
        ids,
        custom_generate=mk.generate,
        handoff=handoff,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(out, ours(attached, ids, eos_token_id=None))
    few = attached.generate(
        ids, custom_generate=mk.generate, routed_tokens=2, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(few, ours(attached, ids, routed_tokens=2, max_new_tokens=9))


def test_the_number_of_routed_tokens_is_the_checkpoints(models):
    _, published, base = models
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model, tiny.EVERY_TARGET)
    checkpoint.config = dataclasses.replace(checkpoint.config, routed_tokens=2)
    mk.attach(model, checkpoint)
    ids = tiny.prompt()
    expected = reference.mogu_generate(published, base, ids, 12, routed_tokens=2)
    assert torch.equal(ours(model, ids, eos_token_id=None), expected)


class Listener:
    """What a streamer is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended = True


@exact
def test_a_streamer_gets_every_token_once_and_the_end(models, handoff):
    attached, *_ = models
    listener = Listener()
    out = ours(attached, tiny.prompt(), streamer=listener, handoff=handoff, eos_token_id=None)
    assert torch.equal(torch.cat([t.view(-1) for t in listener.tokens]), out[0])
    assert listener.ended
    assert len(listener.tokens) == 1 + 12


@exact
def test_a_mask_answers_some_sequences_by_the_base_model_alone(models, handoff):
    attached, published, base = models
    ids = tiny.prompt(batch=3)
    mask = torch.tensor([True, False, True])
    out = ours(attached, ids, routed=mask, handoff=handoff, eos_token_id=None)
    for row, on in enumerate(mask):
        alone = reference.mogu_generate(published if on else base, base, ids[row : row + 1], 12)
        assert torch.equal(out[row], alone[0])
    with mk.routing(attached, mask):
        assert torch.equal(ours(attached, ids, handoff=handoff, eos_token_id=None), out)


def test_sampling_gives_the_same_tokens_in_both_exact_modes(models):
    attached, *_ = models
    answers = []
    for handoff in ("shadow", "replay"):
        torch.manual_seed(3)
        kwargs = {"do_sample": True, "num_return_sequences": 4, "temperature": 2.0}
        answers.append(ours(attached, tiny.prompt(batch=2), handoff=handoff, **kwargs))
    assert torch.equal(*answers)


class Counted:
    """Tokens that every layer reads: routed, and not."""

    def __init__(self, model):
        self.read = {True: [0] * len(model.model.layers), False: [0] * len(model.model.layers)}
        state = next(m.routing for m in model.modules() if isinstance(m, mk.MoGULinear))
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_pre_hook(
                lambda module, inputs, number=number: self.add(state, number, inputs[0])
            )

    def add(self, state, number, hidden_states):
        mask = state.tokens(hidden_states) if state.enabled else None
        tokens = hidden_states.shape[:-1].numel()
        routed = 0 if not state.enabled else tokens if mask is None else int(mask.sum())
        self.read[True][number] += routed
        self.read[False][number] += tokens - routed


@exact
def test_layers_below_the_first_routed_one_are_computed_once(handoff):
    base, model = tiny.llama(num_hidden_layers=4), tiny.llama(num_hidden_layers=4)
    checkpoint = tiny.checkpoint(model, layers=[2, 3])
    published = published_model(base, checkpoint)
    mk.attach(model, checkpoint)
    count = Counted(model)
    ids = tiny.prompt(20)
    out = ours(model, ids, handoff=handoff, eos_token_id=None)
    assert torch.equal(out, reference.mogu_generate(published, base, ids, 12))
    assert count.read[True] == [20 + 4] * 4
    # the base model reads prompt and routed tokens in the upper half alone, but for the last one
    assert count.read[False] == [1 + 6, 1 + 6, 20 + 5 + 6, 20 + 5 + 6]


@pytest.mark.parametrize("targets", [("o_proj",), ("q_proj",)])
def test_a_shadow_is_read_beside_the_routed_tokens(targets):
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model, targets))
    widths = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(
            (args or (kwargs["hidden_states"],))[0].shape[1]
        ),
        with_kwargs=True,
    )
    ours(model, tiny.prompt(20), max_new_tokens=8, eos_token_id=None)
    assert widths == [20, 5 + 1, 5 + 1, 5 + 1, 5 + 1, 0 + 5, 1, 1]


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


def test_padding_and_neighbours_do_not_reach_a_gate(models):
    attached, *_ = models
    ids = torch.full((2, 9), 258)
    ids[0, 5:], ids[1] = tiny.prompt(4, seed=4)[0], tiny.prompt(9)[0]
    mask = (ids != 258).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), mk.record_gates(attached) as together:
        attached(ids, attention_mask=mask, position_ids=positions)
    ids[1] = tiny.prompt(9, seed=7)[0]
    with torch.no_grad(), mk.record_gates(attached) as others:
        attached(ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad(), mk.record_gates(attached) as alone:
        attached(ids[:1, 5:])
    for name, gates in together.items():
        assert torch.equal(gates[0], others[name][0])  # to the bit, whatever the neighbour is
        torch.testing.assert_close(gates[0, 5:], alone[name][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_with_routing_off_has_the_bits_of_the_base_model(dtype):
    base, model = tiny.llama(dtype), tiny.llama(dtype)
    report = mk.attach(model, tiny.checkpoint(model, tiny.EVERY_TARGET))
    assert len(report.fused_mlps) == 2
    ids = tiny.prompt(9, batch=3)
    with torch.no_grad(), mk.routing(model, torch.tensor([True, False, True])):
        mixed, plain = model(ids).logits, base(ids).logits
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])


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
        ({"num_beams": 3}, "num_beams=3: beam search is not supported"),
        ({"assistant_model": tiny}, "assisted decoding is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding is not supported"),
        ({"return_dict_in_generate": True}, "a dictionary of outputs is not supported"),
        ({"use_cache": False}, "needs a KV cache: leave use_cache=True"),
        ({"synced_gpus": True}, "synced_gpus=True"),
        ({"penalty_alpha": 0.5}, "contrastive search is not supported"),
        ({"guidance_scale": 2.0}, "guidance by a second prompt is not supported"),
        ({"token_type_ids": torch.zeros(1, 9)}, "token_type_ids=given: a type for every token"),
        ({"cache_implementation": "offloaded"}, "cannot be copied"),
        (
            {"routed": torch.ones(5, dtype=torch.bool)},
            r"routed is \[5\], but there are 1 sequences",
        ),
    ],
)
def test_what_is_not_supported_is_named(models, kwargs, match):
    with pytest.raises(ValueError, match=match):
        ours(models[0], tiny.prompt(), **kwargs)


def test_a_mask_of_numbers_and_a_filled_cache_are_named(models):
    attached, *_ = models
    with pytest.raises(TypeError, match=r"routed is torch.float32: take a bool mask"):
        ours(attached, tiny.prompt(), routed=torch.ones(1))
    cache = attached(tiny.prompt(4)).past_key_values
    with pytest.raises(TypeError, match=r"routed_tokens=2.5: take an int"):
        ours(attached, tiny.prompt(), routed_tokens=2.5)
    with pytest.raises(ValueError, match=r"input_ids is \[9\]: take \[batch, tokens\]"):
        ours(attached, tiny.prompt()[0])
    with pytest.raises(ValueError, match=r"routed is \[2\], but there are 4 sequences"):
        ours(attached, tiny.prompt(batch=4), routed=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="hold 4 tokens, but not whether they were routed"):
        ours(attached, tiny.prompt(9), past_key_values=cache)


def test_an_open_context_without_routing_is_obeyed(models):
    attached, _, base = models
    ids = tiny.prompt()
    with mk.routing(attached, False):
        out = ours(attached, ids, eos_token_id=None)
    assert torch.equal(out, reference.mogu_generate(base, base, ids, 12))


def test_threads_do_not_route_for_each_other(models):
    attached, *_ = models
    prompts = [tiny.prompt(9, seed=seed) for seed in range(4)]
    masks = [None, torch.tensor([False])] * 2
    expected = [
        ours(attached, ids, routed=mask, eos_token_id=None)
        for ids, mask in zip(prompts, masks, strict=True)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for handoff in ("shadow", "replay"):
                found = [
                    pool.submit(
                        ours, attached, ids, routed=mask, handoff=handoff, eos_token_id=None
                    )
                    for _ in range(5)
                    for ids, mask in zip(prompts, masks, strict=True)
                ]
                for i, answer in enumerate(found):
                    assert torch.equal(answer.result(), expected[i % 4])
    finally:
        sys.setswitchinterval(interval)
    assert next(m for m in attached.modules() if isinstance(m, mk.MoGULinear)).routing.enabled


@pytest.mark.parametrize("through", ["generate", "custom_generate"])
def test_a_token_streamer_gets_the_prompt_the_tokens_and_the_end(models, through):
    attached, *_ = models
    listener, ids = Listener(), tiny.prompt()
    if through == "generate":
        out = ours(attached, ids, token_streamer=listener, eos_token_id=None)
    else:
        out = attached.generate(
            ids,
            custom_generate=mk.generate,
            token_streamer=listener,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
    assert torch.equal(torch.cat([t.view(-1) for t in listener.tokens]), out[0])
    assert listener.ended


@pytest.mark.model
def test_stop_strings_end_an_answer():
    model, tokenizer = load_smollm2()
    mk.attach(model, seeded_checkpoint(model, ("o_proj",)))
    ids = tokenizer("One, two, three, four,", return_tensors="pt")["input_ids"]
    whole = tokenizer.decode(ours(model, ids, max_new_tokens=20)[0, ids.shape[1] :])
    stop = whole.split()[3]
    out = ours(model, ids, max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    text = tokenizer.decode(out[0, ids.shape[1] :])
    assert stop in text
    assert len(text) < len(whole)


def dynamic_llama():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return tiny.llama(num_hidden_layers=4, max_position_embeddings=24, rope_parameters=rope)


def longrope_phi3():
    """Crosses the length at which Phi-3 changes its positions and begins its cache anew."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in tiny.SIZES.items() if name != "head_dim"}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 24,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }
    config = Phi3Config(
        **sizes | {"num_hidden_layers": 4, "max_position_embeddings": 96},
        original_max_position_embeddings=24,
        rope_parameters=rope,
        architectures=["Phi3ForCausalLM"],
    )
    return Phi3ForCausalLM(config).eval()


@exact
@pytest.mark.parametrize("layers", [None, [2, 3]])
@pytest.mark.parametrize("build", [dynamic_llama, longrope_phi3])
def test_positions_that_depend_on_the_length_are_read_at_once(build, layers, handoff):
    base, model = build(), build()
    checkpoint = tiny.checkpoint(model, layers=layers)
    published = published_model(build(), checkpoint)
    mk.attach(model, checkpoint)
    ids = tiny.prompt(21)
    expected = reference.mogu_generate(published, base, ids, 12)
    assert torch.equal(ours(model, ids, handoff=handoff, eos_token_id=None), expected)


def test_a_long_prompt_is_read_apart_with_the_same_tokens(models, monkeypatch):
    attached, published, base = models
    monkeypatch.setattr("mogu_kernels.handoff.LONGEST_PACKED", 8)
    ids = tiny.prompt(9)
    expected = reference.mogu_generate(published, base, ids, 12)
    assert torch.equal(ours(attached, ids, eos_token_id=None), expected)


def test_gates_of_the_routed_tokens_are_recorded_whatever_the_mask_says(models):
    attached, *_ = models
    for mask in (torch.tensor([True, False]), torch.tensor([False, False])):
        with mk.record_gates(attached) as gates:
            ours(attached, tiny.prompt(9, batch=2), routed=mask, eos_token_id=None)
        assert {g.shape for g in gates.values()} == {torch.Size([2, 9 + 4, 2])}


def test_an_unattached_model_is_named(models):
    with pytest.raises(ValueError, match="no routed projection"):
        ours(models[2], tiny.prompt())
