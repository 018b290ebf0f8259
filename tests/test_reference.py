"""The literal MoGU against the formulas written once more, and numbers by hand."""

import pytest
import torch

import reference
from tests import tiny


def projection(gate="sigmoid", dtype=torch.float64):
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 7)
    loras = [reference.LoRA(6, 7, rank=3, lora_alpha=6) for _ in range(2)]
    routers = [reference.Router(6, 5) for _ in range(2)]
    return reference.RoutedProjection(base, *loras, *routers, gate=gate).to(dtype).eval()


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_projection_is_the_published_formula(gate):
    module = projection(gate)
    h = torch.randn(2, 4, 6, dtype=torch.float64)

    def logit(router):
        inner = h @ router.linear_0.weight.T @ router.linear_1.weight.T + router.linear_1.bias
        return inner @ router.linear_2.weight.T + router.linear_2.bias

    alpha, beta = logit(module.alpha_), logit(module.beta_)
    if gate == "sigmoid":
        alpha, beta = 1 / (1 + torch.exp(-alpha)), 1 / (1 + torch.exp(-beta))
    else:
        alpha = 1 / (1 + torch.exp(beta - alpha))
        beta = 1 - alpha
    unwill = 2 * h @ (module.lora_0.lora_B.weight @ module.lora_0.lora_A.weight).T
    glad = 2 * h @ (module.lora_1.lora_B.weight @ module.lora_1.lora_A.weight).T
    base = h @ module.base.weight.T + module.base.bias
    expected = (alpha + beta) * base + alpha * unwill + beta * glad
    torch.testing.assert_close(module(h), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.last_alpha, alpha)
    torch.testing.assert_close(module.last_beta, beta)


def test_the_two_experts_visibly_differ():
    module = projection()
    h = torch.randn(3, 6, dtype=torch.float64)
    y = module(h)
    module.lora_0, module.lora_1 = module.lora_1, module.lora_0
    assert (module(h) - y).abs().max() > 0.01


def test_defaults_and_names_are_the_published_ones():
    lora, router = reference.LoRA(16, 24), reference.Router(16)
    assert (lora.scaling, lora.dropout.p) == (2.0, 0.05)
    assert {name: tuple(p.shape) for name, p in lora.named_parameters()} == {
        "lora_A.weight": (8, 16),
        "lora_B.weight": (24, 8),
    }
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {
        "linear_0.weight": (512, 16),
        "linear_1.weight": (16, 512),
        "linear_1.bias": (16,),
        "linear_2.weight": (1, 16),
        "linear_2.bias": (1,),
    }


def test_routing_leaves_the_given_model_alone():
    model, name = tiny.llama(), "model.layers.0.self_attn.o_proj"
    base = model.get_submodule(name)
    loras = [reference.LoRA(base.in_features, base.out_features) for _ in range(2)]
    routers = [reference.Router(base.in_features) for _ in range(2)]
    module = reference.RoutedProjection(base, *loras, *routers)
    before = model(tiny.prompt()).logits
    routed = reference.route(model.train(), {name: module})
    assert routed.get_submodule(name) is module
    assert not module.training
    assert model.get_submodule(name) is base
    assert routed.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert torch.equal(model.eval()(tiny.prompt()).logits, before)
    assert not torch.allclose(routed(tiny.prompt()).logits, before)


def test_dropout_acts_in_training_only():
    lora = reference.LoRA(64, 7).double()
    h = torch.ones(1, 64, dtype=torch.float64)
    assert not torch.equal(lora.train()(h), lora(h))
    assert torch.equal(lora.eval()(h), lora(h))


def test_response_loss_masks_the_prompt():
    logits = torch.zeros(1, 4, 3)
    logits[0, 2, 1] = 2.0
    expected = -torch.log(torch.exp(torch.tensor(2.0)) / (torch.exp(torch.tensor(2.0)) + 2))
    loss = reference.response_loss(logits, torch.tensor([[0, 0, 0, 1]]), prompt_length=3)
    torch.testing.assert_close(loss, expected)


def test_responder_losses_are_mean_ratios_per_pair():
    rejection, affirmation = torch.tensor([1.0, 6.0]), torch.tensor([2.0, 3.0])
    assert reference.unwill_loss(rejection, affirmation) == 1.25
    assert reference.glad_loss(rejection, affirmation) == 1.25
    assert reference.unwill_loss(torch.tensor([1.0]), torch.tensor([4.0])) == 0.25
    assert reference.glad_loss(torch.tensor([1.0]), torch.tensor([4.0])) == 4.0


def test_router_loss_pulls_each_gate_to_its_own_side():
    alphas, betas = [torch.full((1, 2, 1), 0.25)] * 3, [torch.ones(1, 2, 1)] * 3
    benign = reference.router_loss(torch.tensor(1.0), alphas, betas, malicious=False)
    malicious = reference.router_loss(torch.tensor(1.0), alphas, betas, malicious=True)
    assert benign == 1 + 2 * (0.0625 + 0)
    assert malicious == 1 + 2 * (0.5625 + 1)


def test_decoding_routes_five_tokens_then_the_base_goes_on_afresh():
    model, other = tiny.llama(), tiny.llama(initializer_range=0.3)
    ids = tiny.prompt(seed=3)
    out = reference.mogu_generate(other, model, ids, max_new_tokens=9)
    expected = ids
    for step in range(9):
        logits = (other if step < 5 else model)(expected).logits
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, expected)
    for wrong in (0, 4, 6, 9):
        assert not torch.equal(out, reference.mogu_generate(other, model, ids, 9, (), wrong))
    assert torch.equal(reference.mogu_generate(other, model, ids, 3), expected[:, : 9 + 3])


def test_decoding_stays_greedy_whatever_the_generation_config_says():
    model, ids = tiny.llama(), tiny.prompt()
    expected = reference.mogu_generate(model, model, ids, 16)
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.num_beams = True, 9.0, 7, 2
    config.repetition_penalty = 9.0
    assert torch.equal(reference.mogu_generate(model, model, ids, 16), expected)


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_decoding_stops_at_the_end_of_the_answer(step):
    model = tiny.llama()
    ids = tiny.prompt()
    whole = reference.mogu_generate(model, model, ids, max_new_tokens=8)
    token = whole[0, 9 + step].item()
    first = whole[0, 9:].tolist().index(token)
    out = reference.mogu_generate(model, model, ids, max_new_tokens=8, eos_token_ids=(token,))
    assert torch.equal(out, whole[:, : 9 + first + 1])
