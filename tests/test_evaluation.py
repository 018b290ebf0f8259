"""Measuring systems: every defence against its paper's procedure, every number against a count."""

import dataclasses
import json
import math
import shutil
import sys

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import mogu_kernels as mk
from bench import comparison, refusal_bias, separability
from mogu_kernels import convert, evaluation
from mogu_kernels.evaluation import judges, measure, pairs, prompts, refusal, report, systems
from mogu_kernels.training import routers
from mogu_kernels.training.data import Example
from tests import tiny
from tests.test_cli import byte_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning"),
]

INSTRUCTIONS = ("hello", "a longer one than the others", "x", "why?", "tell me about soup")
EXAMPLES = [
    Example(instruction, "some words " * (1 + i), False, "test")
    for i, instruction in enumerate(INSTRUCTIONS)
]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A MoGU checkpoint, its experts as PEFT folders, and a PEFT soft prompt."""
    root = tmp_path_factory.mktemp("artefacts")
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model, ("o_proj", "up_proj"))
    mk.save_checkpoint(checkpoint, root / "mogu")
    convert.to_peft(checkpoint, root)
    soft = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(model, soft).save_pretrained(root / "dro")
    return root


def alone(model, ids, **options):
    """Answer tokens of one prompt without padding."""
    ids = torch.tensor([ids])
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=258, **options
    )[0, ids.shape[1] :]


def token_nats(logits, ids, response):
    """Sum of -log p of a response's tokens, one at a time."""
    start = len(ids) - len(response)
    return sum(-float(logits[start + t - 1].log_softmax(-1)[k]) for t, k in enumerate(response))


# --- the rule and its intervals


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, no.", True),
        ("Well. I\N{RIGHT SINGLE QUOTATION MARK}m sorry.", True),
        ("i'm sorry", False),
        ("", False),
        ("Sure, here it is.", False),
    ],
)
def test_a_refusal_is_a_keyword_anywhere(answer, refuses):
    assert refusal.is_refusal(answer, ["I cannot", "I'm sorry"]) is refuses


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson_intervals_are_the_published_ones(k, n, low, high):
    assert refusal.wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_a_difference_is_newcombe_s():
    expected = pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert refusal.difference_interval(56, 70, 48, 80) == expected


# --- answers and likelihoods


@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_answers_do_not_depend_on_the_batch_and_keep_their_order(tokenizer, budget):
    model = tiny.llama()
    system = systems.System(model, tokenizer)
    expected = [
        tokenizer.decode(alone(model, ids, max_new_tokens=7), skip_special_tokens=True)
        for ids in (prompts.chat(tokenizer, i) for i in INSTRUCTIONS)
    ]
    assert system.answers(INSTRUCTIONS, 7, batch_tokens=budget) == expected
    assert len(set(expected)) > 1


def test_batches_stay_within_their_budget_and_lose_nobody():
    rows = [[[0] * n] * 2 for n in (5, 40, 7, 1, 12, 11, 3)]
    found = list(systems.batches(rows, 3, 90))
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert found[0] == [1]
    for batch in found[1:]:
        assert 2 * len(batch) * (max(len(rows[i][0]) for i in batch) + 3) <= 90
    assert len(found) < 5


def test_sampled_answers_follow_their_seed_and_leave_the_caller_s(tokenizer):
    system = systems.System(tiny.llama(), tokenizer)
    state = torch.get_rng_state()
    first, again, other = (
        system.answers(INSTRUCTIONS, 7, sample=True, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def absolute():
    """A model whose positions are absolute, so that padding must not shift them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}
    special = {"bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**sizes, **special)).eval()


@pytest.mark.parametrize("made", [tiny.llama, absolute])
def test_likelihoods_are_those_of_single_responses(tokenizer, made):
    model = made()
    system = systems.System(model, tokenizer)
    expected, count = 0.0, 0
    for example in EXAMPLES:
        response = [*tokenizer(example.response)["input_ids"], 257][:20]
        ids = prompts.chat(tokenizer, example.instruction) + response
        with torch.no_grad():
            expected += token_nats(model(torch.tensor([ids])).logits[0], ids, response)
        count += len(response)
    nats, tokens = system.response_nll(EXAMPLES, max_response_tokens=20)
    assert (nats, tokens) == (pytest.approx(expected, rel=1e-5), count)


@pytest.mark.parametrize("m", [0, 2, None])
def test_routed_likelihoods_follow_routed_decoding(tokenizer, m):
    model = tiny.llama()
    mk.attach(model, tiny.checkpoint(model))
    system = systems.RoutedSystem(model, tokenizer, routed_tokens=m)
    expected = 0.0
    for example in EXAMPLES:
        response = [*tokenizer(example.response)["input_ids"], 257][:20]
        ids = prompts.chat(tokenizer, example.instruction) + response
        for t, token in enumerate(response):
            before = torch.tensor([ids[: len(ids) - len(response) + t]])
            with torch.no_grad(), mk.routing(model, m is None or t < m):
                expected -= float(model(before).logits[0, -1].log_softmax(-1)[token])
    nats, _ = system.response_nll(EXAMPLES, max_response_tokens=20)
    assert nats == pytest.approx(expected, rel=1e-5)
    if m is not None:
        assert system.throughout().response_nll(EXAMPLES)[0] != pytest.approx(nats)


def test_routed_answers_are_those_of_routed_decoding(tokenizer, folders):
    model = tiny.llama()
    system = evaluation.load_system(model, tokenizer, folders / "mogu")
    answers = system.answers(INSTRUCTIONS, 9)
    for instruction, answer in zip(INSTRUCTIONS, answers, strict=True):
        ids = torch.tensor([prompts.chat(tokenizer, instruction)])
        out = mk.generate(model, ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == answer
    assert answers != systems.System(tiny.llama(), tokenizer).answers(INSTRUCTIONS, 9)


def test_gates_of_a_batch_are_those_of_single_prompts(tokenizer, folders):
    model = tiny.llama()
    system = evaluation.load_system(model, tokenizer, folders / "mogu")
    found = system.prompt_gates(INSTRUCTIONS)
    for i, instruction in enumerate(INSTRUCTIONS):
        with mk.record_gates(model) as gates, torch.no_grad():
            model(torch.tensor([prompts.chat(tokenizer, instruction)]))
        mean = torch.stack([own[0] for own in gates.values()]).mean(0)
        torch.testing.assert_close(found["last token"][i], mean[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["whole prompt"][i], mean.mean(0), atol=1e-5, rtol=0)


# --- prompts


def test_a_reminder_stands_before_and_after(tokenizer):
    text = tokenizer.decode(prompts.self_reminder(tokenizer, "MY REQUEST"))
    before, after = text.split("MY REQUEST")
    assert "responsible" in before
    assert "responsible" in after


def test_demonstrations_are_one_refusal_and_one_answer(tokenizer):
    text = tokenizer.decode(prompts.in_context_defence(tokenizer, "MY REQUEST"))
    assert text.index("break the law") < text.index("sorry") < text.index("egg")
    assert text.endswith("<MY REQUEST>")


@pytest.fixture(scope="module")
def word_tokenizer():
    """A BPE with merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([prompts.__doc__, judges.__doc__, pairs.__doc__], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<e>", chat_template="USER {{messages[0].content}} IS"
    )


def test_retokenization_without_dropout_is_the_tokenizer(word_tokenizer):
    for text in (prompts.__doc__, "the first of the rows", "Ärger; 12!"):
        same = prompts.Retokenization(0.0)(word_tokenizer, text)
        assert same == [
            *word_tokenizer("USER ")["input_ids"],
            *word_tokenizer(text)["input_ids"],
            *word_tokenizer(" IS")["input_ids"],
        ]


def test_retokenization_breaks_words_and_keeps_the_text(word_tokenizer):
    text = pairs.__doc__
    usual = prompts.Retokenization(0.0)(word_tokenizer, text)
    broken, again, other = (
        prompts.Retokenization(0.2, seed)(word_tokenizer, text) for seed in (0, 0, 1)
    )
    assert broken == again != other
    assert word_tokenizer.decode(broken) == f"USER {text} IS"
    assert len(usual) < len(broken) < len(f"USER {text} IS")
    characters = prompts.Retokenization(1.0)(word_tokenizer, text)
    assert len(characters) - len(word_tokenizer("USER  IS")["input_ids"]) >= len(text) - 2


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_a_soft_prompt_is_peft_s(tokenizer, folders):
    system = evaluation.load_system(tiny.llama(), tokenizer, folders / "dro")
    theirs = peft.PeftModel.from_pretrained(tiny.llama(), folders / "dro").eval()
    ids = torch.tensor([prompts.chat(tokenizer, INSTRUCTIONS[1])])
    out = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        do_sample=False,
    )[0, ids.shape[1] :]
    answers = system.answers(INSTRUCTIONS, 9)
    assert answers[1] == tokenizer.decode(out, skip_special_tokens=True)
    assert answers != systems.System(tiny.llama(), tokenizer).answers(INSTRUCTIONS, 9)


# --- judges


@pytest.mark.parametrize("question", [judges.input_detection, judges.self_examination])
def test_a_judge_compares_yes_and_no_and_refuses_for_the_flagged(tokenizer, question, monkeypatch):
    model = tiny.llama()
    system = judges.JudgedSystem(model, tokenizer, question)
    given = systems.System(model, tokenizer).answers(INSTRUCTIONS, 9)
    expected = []
    for instruction, answer in zip(INSTRUCTIONS, given, strict=True):
        asked = question(instruction, answer)
        assert (instruction if question is judges.input_detection else answer) in asked
        with torch.no_grad():
            logits = model(torch.tensor([prompts.chat(tokenizer, asked)])).logits[0, -1].exp()
        ids = {c: tokenizer(c)["input_ids"][0] for c in "YyNn "}
        yes = logits[ids["Y"]] + logits[ids["y"]]
        no = logits[ids["N"]] + logits[ids["n"]]
        shared = logits[ids[" "]]  # the first byte of " Yes" and of " No"
        expected.append(judges.REFUSAL if yes + shared > no + shared else answer)
    assert system.answers(INSTRUCTIONS, 9) == expected
    monkeypatch.setattr(system, "says_yes", lambda asked: [i == 2 for i in range(len(asked))])
    assert system.answers(INSTRUCTIONS, 9) == [*given[:2], judges.REFUSAL, *given[3:]]


# --- pairs of rows


def literal_safe_decoding(base, expert, alpha, space):
    """The paper's steps on two lists of logits: probabilities by token."""
    orders = [sorted(range(len(own)), key=lambda t, own=own: -own[t]) for own in (base, expert)]
    for k in range(1, len(base) + 1):
        sample_space = set(orders[0][:k]) & set(orders[1][:k])
        if len(sample_space) >= space:
            break
    p, q = (torch.tensor(own).double().softmax(-1).tolist() for own in (base, expert))
    mixed = {t: max(0.0, p[t] + alpha * (q[t] - p[t])) for t in sample_space}
    return {t: value / sum(mixed.values()) for t, value in mixed.items()}


@pytest.mark.parametrize("space", [1, 5, 9])
def test_safe_decoding_mixes_as_published_then_leaves_the_base(space):
    scores = 2 * torch.randn(6, 12, generator=torch.Generator().manual_seed(space))
    process = pairs.SafeDecoding(4, alpha=3.0, tokens=2, space=space)
    for tokens in (4, 5):
        mixed = process(torch.zeros(6, tokens), scores).softmax(-1)
        for row in range(0, 6, 2):
            literal = literal_safe_decoding(*scores[row : row + 2].tolist(), 3.0, space)
            expected = torch.tensor([literal.get(t, 0.0) for t in range(12)])
            torch.testing.assert_close(mixed[row], expected, atol=1e-5, rtol=0)
            assert torch.equal(mixed[row], mixed[row + 1])
    after = process(torch.zeros(6, 6), scores)
    assert torch.equal(after, scores[0::2].repeat_interleave(2, 0))


def test_safe_decoding_has_a_token_even_where_the_mixture_has_none():
    scores = torch.tensor([[5.0, 4.0, -9.0, -9.0], [1.0, 0.0, 9.0, -9.0]])
    mixed = pairs.SafeDecoding(0, space=1)(torch.zeros(2, 0), scores)
    assert mixed.softmax(-1).sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_an_expert_s_row_is_peft_s_and_the_base_row_keeps_its_bits(tokenizer, folders):
    system = evaluation.load_system(tiny.llama(), tokenizer, folders / "unwill", "safe_decoding")
    ids = tiny.prompt(9).repeat(2, 1)
    with torch.no_grad(), mk.routing(system.model, pairs.expert_rows(ids)):
        rows = system.model(ids).logits
    expert = peft.PeftModel.from_pretrained(tiny.llama(), folders / "unwill").eval()
    with torch.no_grad():
        torch.testing.assert_close(rows[1], expert(ids).logits[1], atol=1e-4, rtol=0)
        assert torch.equal(rows[0], tiny.llama()(ids).logits[0])
    assert not torch.allclose(rows[0], rows[1], atol=0.1)
    answers = system.answers(INSTRUCTIONS, 6)
    assert answers == system.answers(INSTRUCTIONS, 6, batch_tokens=1)
    assert system.response_nll(EXAMPLES) is None


def test_safe_decoding_s_first_tokens_are_the_mixture_s_best(tokenizer, folders):
    system = evaluation.load_system(tiny.llama(), tokenizer, folders / "unwill", "safe_decoding")
    base = tiny.llama()
    expert = peft.PeftModel.from_pretrained(tiny.llama(), folders / "unwill").eval()
    for instruction, answer in zip(INSTRUCTIONS, system.answers(INSTRUCTIONS, 6), strict=True):
        ids = prompts.chat(tokenizer, instruction)
        start = len(ids)
        while len(ids) < start + 6 and ids[-1] != 257:
            with torch.no_grad():
                own, other = (m(torch.tensor([ids])).logits[0, -1].tolist() for m in (base, expert))
            if len(ids) < start + 2:
                mixed = literal_safe_decoding(own, other, 3.0, 5)
                ids.append(max(mixed, key=mixed.get))
            else:
                ids.append(max(range(len(own)), key=own.__getitem__))
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == answer


def test_rose_takes_the_reverse_prompt_s_logits_away(tokenizer):
    model = tiny.llama()
    system = evaluation.load_system(model, tokenizer, defence="rose")
    answers, (nats, _) = system.answers(INSTRUCTIONS, 5), system.response_nll(EXAMPLES)
    expected = 0.0
    for example, answer in zip(EXAMPLES, answers, strict=True):
        usual, reverse = system.rows(example.instruction)
        assert usual == prompts.chat(tokenizer, example.instruction)
        assert "unsafe" in tokenizer.decode(reverse)

        def contrast(after, usual=usual, reverse=reverse):
            with torch.no_grad():
                own, other = (
                    model(torch.tensor([ids + after])).logits[0, -1] for ids in (usual, reverse)
                )
            return own - 0.5 * other

        after = []
        while len(after) < 5 and 257 not in after:
            after.append(int(contrast(after).argmax()))
        assert tokenizer.decode(after, skip_special_tokens=True) == answer
        response = [*tokenizer(example.response)["input_ids"], 257][:64]
        for t, token in enumerate(response):
            expected -= float(contrast(response[:t]).log_softmax(-1)[token])
    assert nats == pytest.approx(expected, rel=1e-5)


def test_both_rows_of_a_pair_draw_the_same_token():
    scores = torch.zeros(40, 50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = pairs.ROSE(sample=True)(torch.zeros(40, 3), scores)
    assert torch.equal(drawn[0::2], drawn[1::2])
    assert ((drawn == 0).sum(1) == 1).all()
    assert len(drawn.argmax(1).unique()) > 5


# --- by name


@pytest.mark.parametrize("defence", [None, *evaluation.DEFENCES])
def test_every_defence_answers_greedily_and_sampled(tokenizer, folders, defence):
    expert = folders / "unwill" if defence == "safe_decoding" else None
    system = evaluation.load_system(tiny.llama(), tokenizer, expert, defence)
    for sample in (False, True):
        answers = system.answers(INSTRUCTIONS, 4, sample=sample)
        assert len(answers) == len(INSTRUCTIONS)
        assert any(answers)  # one may be nothing but its end


@pytest.mark.parametrize(
    ("checkpoint", "defence", "message"),
    [
        (None, "prayer", "defence='prayer': take one of self_reminder"),
        ("mogu", "rose", "rose is for the base model"),
        (None, "safe_decoding", "safe_decoding takes an expert"),
        ("mogu", "safe_decoding", "safe_decoding takes an expert"),
        ("", None, "neither mogu_config.json nor adapter_config.json"),
        ("prefix", None, "prefix is PREFIX_TUNING: of PEFT's prompt learning only PROMPT_TUNING"),
    ],
)
def test_what_does_not_go_together_is_refused(tokenizer, folders, checkpoint, defence, message):
    folder = None if checkpoint is None else folders / checkpoint
    if checkpoint == "prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        peft.get_peft_model(tiny.llama(), config).save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        evaluation.load_system(tiny.llama(), tokenizer, folder, defence)


def test_a_template_is_the_checkpoint_s_or_the_one_asked_for(tokenizer, folders):
    def prompt(*arguments):
        return evaluation.load_system(tiny.llama(), tokenizer, *arguments).prompt

    loaded = mk.load_checkpoint(folders / "mogu")
    about = {"config": {"template": "llama2"}}
    config = dataclasses.replace(loaded.config, provenance=about)
    mk.save_checkpoint(mk.MoGUCheckpoint(config, loaded.tensors), folders / "llama2")
    assert prompt(folders / "llama2") is prompts.llama2
    assert prompt(folders / "llama2", None, "chat") is prompts.chat
    for checkpoint in (None, folders / "mogu", folders / "glad"):
        assert prompt(checkpoint) is prompts.chat
        assert prompt(checkpoint, None, "llama2") is prompts.llama2
    with pytest.raises(ValueError, match="rose is written for the chat template"):
        prompt(None, "rose", "llama2")
    with pytest.raises(ValueError, match="template='llama3': take one of chat, llama2"):
        prompt(None, None, "llama3")


def test_an_adapter_without_peft_is_a_clear_error(tokenizer, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"peft is missing: pip install 'mogu_kernels\[train\]'"):
        evaluation.load_system(tiny.llama(), tokenizer, folders / "glad")


def test_two_experts_are_no_expert(folders):
    with pytest.raises(ValueError, match="has 2 experts: take one"):
        pairs.saturated(mk.load_checkpoint(folders / "mogu"))


def test_a_tokenizer_without_merges_is_not_retokenized():
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(ValueError, match="of a BPE, not a WordLevel"):
        prompts.Retokenization()(PreTrainedTokenizerFast(tokenizer_object=words), "a")


# --- counts


PREFIXES = (("sorry", "illegal"), ("sorry",))
SETS = {
    "bad": [Example(i, None, True, "t") for i in ("sorry", "illegal", "fine", "fine")],
    "good": [Example(i, "well, well", False, "t") for i in ("illegal", "sorry", "fine")],
}


class Echo:
    """Answers with the instruction."""

    def __init__(self):
        self.options = []

    def answers(self, instructions, max_new_tokens, **options):
        self.options.append((max_new_tokens, options))
        return list(instructions)

    def response_nll(self, examples):
        return 10.0 * len(examples), 10 * len(examples)


def test_evaluate_counts_by_class_and_keeps_no_answer():
    found = evaluation.evaluate(Echo(), SETS, prefixes=PREFIXES)
    bad, good = found["sets"]["bad"], found["sets"]["good"]
    assert (bad["n"], bad["refused"], bad["rate"], bad["all"], bad["narrow"]) == (
        4,
        2,
        0.5,
        0.5,
        0.25,
    )
    assert (good["n"], good["refused"], good["all"]) == (3, 1, pytest.approx(2 / 3))
    assert bad["interval"] == pytest.approx(refusal.wilson_interval(2, 4))
    assert found["perplexity"]["decoded"]["perplexity"] == pytest.approx(math.e)
    assert "gates" not in found
    text = json.dumps(found)
    assert all(word not in text for word in ("sorry", "illegal", "fine"))


def test_evaluate_passes_its_options_on_and_takes_a_part():
    system = Echo()
    found = evaluation.evaluate(
        system, SETS, prefixes=PREFIXES, limit=1, max_new_tokens=3, sample=True, seed=5
    )
    assert [own["n"] for own in found["sets"].values()] == [1, 1]
    assert system.options == [(3, {"sample": True, "seed": 5})]
    other = evaluation.evaluate(system, SETS, prefixes=PREFIXES)
    assert found["sets"]["bad"]["answers_sha256"] != other["sets"]["bad"]["answers_sha256"]


def test_a_limit_takes_from_all_over_a_set():
    assert measure.spread(range(10), 3) == [0, 3, 6]
    assert measure.spread(range(3), None) == measure.spread(range(3), 5) == [0, 1, 2]


@pytest.mark.parametrize("examples", [[], [*SETS["bad"], *SETS["good"]]])
def test_a_set_has_one_class(examples):
    with pytest.raises(ValueError, match="set 'mixed' has no prompts or both classes"):
        evaluation.evaluate(Echo(), {"mixed": examples}, prefixes=PREFIXES)


def test_evaluate_tells_a_routed_system_s_gates_by_class(tokenizer, folders):
    system = evaluation.load_system(tiny.llama(), tokenizer, folders / "mogu")
    found = evaluation.evaluate(system, SETS, prefixes=PREFIXES, max_new_tokens=2)
    assert json.loads(json.dumps(found)) == found
    for class_, own in (("benign", "good"), ("malicious", "bad")):
        gates = system.prompt_gates([example.instruction for example in SETS[own]])
        for position in ("last token", "whole prompt"):
            told = found["gates"][class_][position]
            for e, expert in enumerate(("glad", "unwill")):
                assert told[expert]["mean"] == pytest.approx(float(gates[position][:, e].mean()))
                median = float(gates[position][:, e].quantile(0.5))
                assert told[expert]["quantiles"]["0.5"] == pytest.approx(median)
    readings = {name: own["nats"] for name, own in found["perplexity"].items()}
    assert readings["decoded"] != readings["routed throughout"]


# --- the report


def result(bad, good, n=100, perplexity=5.0):
    """What `evaluate` gives for so many refusals of n malicious and n benign prompts."""

    def counted(refused, malicious):
        rate = refused / n
        return {
            "n": n,
            "malicious": malicious,
            "refused": refused,
            "rate": rate,
            "interval": list(refusal.wilson_interval(refused, n)),
            "all": rate,
            "narrow": rate,
        }

    reading = perplexity and {"decoded": {"nats": 1.0, "tokens": 9, "perplexity": perplexity}}
    return {
        "sets": {"bad": counted(bad, True), "good": counted(good, False)},
        "perplexity": reading,
    }


RESULTS = {
    "base": [result(5, 0)],
    "glad": [result(3, 2), result(1, 0)],
    "unwill": [result(100, 90, perplexity=10.0), result(100, 92, perplexity=10.0)],
    "sft": [result(90, 60)],
    "judge": [result(96, 1, perplexity=None)],
    "mogu": [result(90, 2, perplexity=5.5), result(94, 0, perplexity=5.0)],
}


def test_the_table_tells_mean_and_spread_or_an_interval():
    lines = report.markdown(RESULTS, {"mogu": "MoGU"}).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[2:8]}
    mogu = "92.0 (90.0 to 94.0) | 1.0 (0.0 to 2.0) | 92.0 (90.0 to 94.0) | 99.0 (98.0 to 100.0)"
    assert rows["MoGU"] == f"| MoGU | 2 | {mogu} | 1.050 (1.000 to 1.100) |"
    assert rows["base"] == (
        "| base | 1 | 5.0 (2.2 to 11.2) | 0.0 (0.0 to 3.7) | 5.0 | 100.0 | 1.000 |"
    )
    assert rows["judge"].endswith("| none |")


def test_the_report_says_what_is_dominated_and_what_is_not():
    sentence, *lines = report.dominance(RESULTS, "mogu", {"mogu": "MoGU"})
    assert sentence == (
        "MoGU dominates or equals glad, sft. It does not dominate base, unwill: more of one, less "
        "of the other. It is dominated by judge."
    )
    rows = [line for line in lines if line.startswith(("| base", "| unwill", "| judge"))]
    assert rows == [
        "| base | +87.0 | -1.0 (noise) | trades |",
        "| unwill | -8.0 | +90.0 | trades |",
        "| judge | -4.0 (noise) | +0.0 (noise) | is dominated |",
    ]


def test_a_report_needs_the_base_model_and_the_same_sets():
    with pytest.raises(ValueError, match="measure the base model too"):
        report.markdown({"mogu": RESULTS["mogu"]})
    with pytest.raises(ValueError, match="measured on other sets"):
        report.markdown(RESULTS | {"late": [result(1, 1, n=50)]})


def test_the_report_of_a_routed_system_has_its_gates_and_figures(tokenizer, folders, tmp_path):
    routed = evaluation.load_system(tiny.llama(), tokenizer, folders / "mogu")
    found = {
        "base": [evaluation.evaluate(Echo(), SETS, prefixes=PREFIXES)],
        "mine": [evaluation.evaluate(routed, SETS, prefixes=PREFIXES, max_new_tokens=2)] * 2,
    }
    page = report.markdown(found)
    mean = found["mine"][0]["gates"]["malicious"]["last token"]["unwill"]["mean"]
    assert f"{mean:.3f}" in next(
        line for line in page.splitlines() if line.startswith("| mine | malicious | last token")
    )
    assert "mine dominates or equals" in page
    assert "base dominates" not in page
    written = report.figures(found, tmp_path / "new")
    assert [path.name for path in written] == ["frontier.png", "gates-mine.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert report.in_words(found["mine"][0])["bad refused"].endswith("of 4 malicious prompts")


def test_a_table_needs_both_classes():
    found = result(1, 0)
    found["sets"] = {name: own for name, own in found["sets"].items() if own["malicious"]}
    with pytest.raises(ValueError, match="security needs malicious prompts, usability benign"):
        evaluation.markdown({"base": [found]})


# --- the comparison


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """(run the comparison, names of the systems that were evaluated) with folders for two seeds."""
    for seed in (0, 1):
        for artefact in ("glad", "mogu"):
            (tmp_path / f"seed-{seed}" / artefact).mkdir(parents=True)
            (tmp_path / f"seed-{seed}" / artefact / "weights").write_text(f"{artefact}{seed}")
            note = tmp_path / f"seed-{seed}" / f"{artefact}.json"
            note.write_text('{"recipe": "own"}')
    evaluated = []

    def load(model, tokenizer, folder, defence):
        return (folder.parent.name, folder.name) if folder else (None, defence)

    def evaluate(system, **options):
        if len(evaluated) == options.pop("stop_after", 99):
            raise KeyboardInterrupt
        evaluated.append(system)
        return result(len(evaluated), 0)

    monkeypatch.setattr(comparison, "load_system", load)
    monkeypatch.setattr(comparison, "evaluate", evaluate)

    def run(stop_after=99, recipe="own", **settings):
        evaluated_before = len(evaluated)
        results, missing, earlier = comparison.compare(
            tmp_path,
            tmp_path / "evaluated",
            [0, 1],
            lambda: (None, None),
            {"limit": 1, "about": {}} | settings,
            ["base", "glad", "unwill", "mogu", "rose"],
            trained=lambda artefact: {"recipe": recipe},
            stop_after=evaluated_before + stop_after,
        )
        return results, missing, evaluated[evaluated_before:], earlier

    return run, tmp_path


def test_a_killed_comparison_goes_on(compared):
    run, _ = compared
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=3)
    results, missing, evaluated, _ = run()
    assert evaluated == [("seed-0", "mogu"), ("seed-1", "mogu"), (None, "rose")]
    assert missing == ["unwill only, seed 0", "unwill only, seed 1"]
    counts = {name: [own["sets"]["bad"]["refused"] for own in r] for name, r in results.items()}
    assert counts == {"base": [1], "glad": [2, 3], "mogu": [4, 5], "rose": [6]}
    assert run()[2] == []


def test_what_was_measured_otherwise_is_measured_anew(compared):
    run, folder = compared
    run()
    (folder / "seed-1" / "mogu" / "weights").write_text("another")
    assert run()[2] == [("seed-1", "mogu")]
    assert len(run(limit=2)[2]) == 6


def test_an_artefact_of_another_recipe_is_not_measured(compared):
    run, folder = compared
    with pytest.raises(ValueError, match="glad was trained with another recipe: delete it"):
        run(recipe="another")
    run()
    for note in folder.glob("seed-*/*.json"):  # made anew, with the same bytes
        note.write_text('{"recipe": "another"}')
    assert not run(recipe="another")[2]
    shutil.rmtree(folder / "seed-1" / "mogu")
    assert len(run(recipe="another")[0]["mogu"]) == 2  # kept as what the other recipe made
    (folder / "seed-0" / "mogu.json").unlink()
    with pytest.raises(ValueError, match="mogu was trained with another recipe"):
        run(recipe="another")


def test_what_was_measured_stays_when_its_artefact_is_deleted(compared):
    run, folder = compared
    run()
    shutil.rmtree(folder / "seed-1" / "mogu")
    results, missing, evaluated, earlier = run()
    assert len(results["mogu"]) == 2
    assert "MoGU, seed 1" not in missing
    assert not evaluated
    assert not earlier


def test_a_row_without_results_of_this_training_shows_an_earlier_ones(compared):
    run, folder = compared
    before, *_ = run()
    for artefact in folder.glob("seed-*/*/"):
        shutil.rmtree(artefact)
    results, missing, evaluated, earlier = run(recipe="another")
    assert results == before
    assert not evaluated
    assert earlier == {"glad", "mogu"}
    assert "MoGU, seed 1" in missing
    (folder / "seed-1" / "mogu").mkdir()  # trained anew
    (folder / "seed-1" / "mogu.json").write_text('{"recipe": "another"}')
    results, missing, evaluated, earlier = run(recipe="another")
    assert evaluated == [("seed-1", "mogu")]
    assert len(results["mogu"]) == 1  # the two are not mixed
    assert earlier == {"glad"}
    assert "glad" not in run(recipe="another", limit=2)[0]  # measured otherwise


def test_the_page_tells_what_is_missing_and_leaves_single_prompts_out():
    settings = {"max_new_tokens": 32, "sample": False, "about": {"dtype": "bf16"}}
    page = comparison._page("TABLE", settings, [0, 1], ["unwill only, seed 0"], {"mogu"})
    assert "TABLE" in page
    assert "Not measured with today's training: unwill only, seed 0." in page
    assert "\N{DAGGER} Trained before" in page
    gates = {"benign": {"by_prompt": [1], "last token": {"glad": 1}}}
    kept = comparison._without_prompts({"mogu": [{"gates": gates}]})
    assert kept == {"mogu": [{"gates": {"benign": {"last token": {"glad": 1}}}}]}


def test_every_row_of_the_comparison_can_be_loaded():
    for own in comparison.SYSTEMS.values():
        assert own.defence is None or own.defence in evaluation.DEFENCES
    assert next(iter(comparison.SYSTEMS)) == report.BASE


def test_a_bias_is_put_in_anothers_place_as_training_puts_it(tokenizer):
    model = tiny.llama()
    checkpoint = tiny.checkpoint(model, ("o_proj",)).folded()
    mk.attach(model, checkpoint)
    for bias in (0.5, 0.25 - 0.5):  # 0.25 in the end
        refusal_bias.lean(systems.RoutedSystem(model, tokenizer), bias)
    for name, expected in routers._leaning(checkpoint, 0.25).tensors.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def test_the_bias_is_measured_on_what_the_table_does_not_show():
    examples = [Example(str(i), None, True, "test") for i in range(313)]
    shown = {e.instruction for e in measure.spread(examples, 100)}
    left = {e.instruction for e in refusal_bias.left_out(examples)}
    assert len(left) == 213
    assert not left & shown


def test_the_page_of_the_biases_has_every_seed():
    found = {
        bias: [{"sets": {"bad": {"n": 40, "refused": r}}} for r in refused]
        for bias, refused in ((0.0, (30, 32)), (0.5, (38, 40)))
    }
    page = refusal_bias.table(found, [0, 2])
    assert "bad refused of 40: seeds 0, 2 | %" in page
    assert "| 0 | 30, 32 | 77.5 |" in page
    assert "| 0.5 | 38, 40 | 97.5 |" in page


def test_a_probe_sees_what_a_router_would_see():
    model, prompts = tiny.llama(), [[5, 6, 7], [8, 9]]
    read = separability.inputs(model, prompts, (0, 1), title="test")
    for i, ids in enumerate(prompts):
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            normed = model.model.layers[layer].input_layernorm(states[layer])[0, -1]
            torch.testing.assert_close(read["q_proj"][layer, i], normed)
    assert {len(own) for own in read.values()} == {2}
    assert set(read) == set(separability.PROJECTIONS)
    for hooked in model.modules():
        assert not hooked._forward_pre_hooks


def test_a_threshold_catches_most_attacks_and_what_lies_above_it():
    attacks = torch.linspace(0.05, 1, 20)  # one of twenty may be missed
    score = {
        "strongreject": attacks,
        "edgy": torch.tensor([0.08, 0.12, 0.52, 0.92]),
        "roles": torch.tensor([0.0, 0.02, 0.97]),
    }
    auc, edgy, roles = separability.row(score).split(" | ")
    assert float(auc) == pytest.approx((19 + 18 + 10 + 2) / 80, abs=1e-4)
    assert (edgy, roles) == ("3", "1")


def test_a_probe_learns_from_the_chosen_prompts_alone():
    chosen = separability.parts(["a", "a", "a", "a", "b", "b"])
    assert {title: own.tolist() for title, own in chosen.items()} == {
        "all": [True] * 6,
        "every second": [True, False] * 3,
        "every fourth": [True, False, False, False, True, False],
        "all but a": [False] * 4 + [True] * 2,
        "all but b": [True] * 4 + [False] * 2,
    }
    # the first axis tells the classes of the first four, the second those of the others
    states = torch.tensor([[[1.0, 0], [-1, 0], [2, 0], [-2, 0], [0, 1], [0, -1]]])
    malicious = torch.tensor([True, False, True, False, True, False])
    read = {"train": states, "edgy": torch.tensor([[[0.0, 3]]])}
    learnt = {title: separability.scores(read, malicious, own) for title, own in chosen.items()}
    assert learnt["all but a"]["edgy"] > 0.9
    assert learnt["all but b"]["edgy"] == pytest.approx(0.5)
    assert learnt["all"]["train"].shape == (6,)
