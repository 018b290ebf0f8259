"""Training: the losses as published, every stage on a toy, killed and resumed, baselines."""

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import mogu_kernels as mk
from mogu_kernels.training import (
    Example,
    ResponderConfig,
    RouterConfig,
    StageConfig,
    TrainingConfig,
    baselines,
    batches,
    load_config,
    losses,
    routers,
    train,
    trainer,
)
from mogu_kernels.training.batches import IGNORED, Item, Packer
from mogu_kernels.training.items import Encoder, couples, pairs
from mogu_kernels.training.objectives import ResponderObjective, ResponseObjective, RouterObjective
from mogu_kernels.training.probe import best_layers, probe, probe_losses
from mogu_kernels.training.routers import train_routers
from mogu_kernels.training.trainer import STATE_FILE, last_checkpoint, recomputed
from reference import losses as published
from tests import tiny
from tests.tokens import chat_tokenizer

STAGE = {"learning_rate": 1e-2, "steps": 12, "batch": 4, "save_steps": 3}
TOY = TrainingConfig(
    model="toy",
    max_prompt_tokens=24,
    max_response_tokens=12,
    seed=3,
    glad=ResponderConfig(**STAGE, rank=2),
    unwill=ResponderConfig(**STAGE, rank=2),
    router=RouterConfig(**STAGE | {"steps": 24}, accumulation=1, hidden=8),
)
STAGES = ("glad", "unwill", "router")
MALICIOUS = ["bad apples", "bad bees", "bad cats", "bad dogs", "bad eggs", "bad fish", "bad guns"]
BENIGN = [
    "nice apples",
    "nice bees",
    "nice cats",
    "nice dogs",
    "nice eggs",
    "nice fish",
    "nice gnus",
]
EXAMPLES = [Example(text, None, True, "toy") for text in MALICIOUS] + [
    Example(text, f"{text} are fine", False, "toy") for text in BENIGN
]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, max_prompt_tokens=24, max_response_tokens=12)


def llama(**changes):
    return tiny.llama(vocab_size=300, eos_token_id=1, pad_token_id=1, bos_token_id=0, **changes)


def apart(model, item):
    """Published losses of an item's answers, each as a sequence of its own."""
    losses = []
    for answer in item.answers:
        ids = torch.tensor([item.prompt + answer])
        losses.append(published.response_loss(model(input_ids=ids).logits, ids, len(item.prompt)))
    return losses


@pytest.fixture(params=[1024, 40], ids=["one-row", "rows"])
def packer(request, monkeypatch):
    monkeypatch.setattr(batches, "ROW_TOKENS", request.param)
    return Packer(1, torch.float64)


def unequal(groups):
    """The same with a short prompt and a short answer among the others."""
    (first, *rest), *others = groups
    short = Item(first.prompt[:4] + first.prompt[-2:], first.answers, first.malicious)
    cut = Item(first.prompt, [answer[:5] for answer in first.answers], first.malicious)
    return [[short, *rest], [cut], *others]


def test_packed_answers_have_the_losses_of_two_sequences(encoder, packer):
    model = llama(dtype=torch.float64)
    groups = unequal(pairs(EXAMPLES, encoder, 0)[:4])
    batch = packer(groups)
    assert (len(batch["input_ids"]) > 1) == (batches.ROW_TOKENS == 40)
    own = [apart(model, item) for group in groups for item in group]
    rejection, affirmation = torch.stack([torch.stack(losses) for losses in own]).T
    for wanted, loss in (("rejection", "unwill_loss"), ("affirmation", "glad_loss")):
        out = ResponderObjective(model, wanted)(**batch)
        expected = getattr(published, loss)(rejection, affirmation)
        torch.testing.assert_close(out["loss"], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(out["wanted"], affirmation.mean(), atol=1e-12, rtol=1e-12)


def test_what_a_batch_has_in_common_is_computed_once(encoder):
    groups = pairs(EXAMPLES, encoder, 0)
    ids = Packer(1)(groups)["input_ids"]
    common = 1 + len("bad ")  # the template's beginning as well
    each = sum(len(i.prompt) - common + sum(map(len, i.answers)) for (i,) in groups)
    assert ids.shape == (1, common + each)


def test_the_router_loss_is_the_published_one(encoder, packer):
    model = llama(dtype=torch.float64)
    mk.attach(model, tiny.checkpoint(model), trainable=True)
    objective = RouterObjective(model, ("glad", "unwill"), 2.0)
    groups = unequal(couples(EXAMPLES, encoder, 0)[:3])
    out = objective(**packer(groups))
    total, separation = [], {True: [], False: []}
    for item in [item for group in groups for item in group]:
        with mk.record_gates(model) as gates:
            (response,) = apart(model, item)
        glad, unwill = ([g[..., e : e + 1] for g in gates.values()] for e in range(2))
        total.append(published.router_loss(response, unwill, glad, item.malicious, 2.0))
        separation[item.malicious].append(torch.stack(unwill).mean())
    torch.testing.assert_close(out["loss"], torch.stack(total).mean(), atol=1e-7, rtol=1e-7)
    expected = torch.stack(separation[True]).mean() - torch.stack(separation[False]).mean()
    torch.testing.assert_close(out["separation"], expected, atol=1e-7, rtol=1e-7)


def test_padding_is_no_part_of_a_loss():
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])
    own = F.cross_entropy(logits[1, :2], labels[1, :2])
    torch.testing.assert_close(losses.response_loss(logits, labels)[1], own)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """(folder, checkpoint, base weights before and after) of one whole toy run."""
    folder, model = tmp_path_factory.mktemp("run"), llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    checkpoint = train(TOY, model, tokenizer, EXAMPLES, folder, validation=EXAMPLES[::3])
    return folder, checkpoint, before, model


def test_training_leaves_the_base_as_it_was(trained):
    _, _, before, model = trained
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_gates_of_a_trained_toy_tell_the_classes_apart(trained, encoder):
    folder, _, _, model = trained
    mk.attach(model, folder / "checkpoint")
    try:
        out = RouterObjective(model, ("glad", "unwill"), 2.0)(
            **Packer(1)(couples(EXAMPLES, encoder, 9))
        )
    finally:
        mk.detach(model)
    assert out["separation"] > 0.2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_responders_are_peft_adapters_that_learned_their_answers(trained, encoder):
    folder, _, _, _ = trained
    for name, wanted in (("glad", "affirmation"), ("unwill", "rejection")):
        adapted = PeftModel.from_pretrained(llama(), folder / name / "adapter")
        out = ResponderObjective(adapted, wanted)(**Packer(1)(pairs(EXAMPLES, encoder, 3)))
        assert out["wanted"] < out["unwanted"]


def test_a_checkpoint_tells_how_it_was_trained(trained):
    folder, checkpoint, _, _ = trained
    about = mk.load_checkpoint(folder / "checkpoint").config.provenance
    assert about["trained"]
    assert about["config"]["router"]["gate_loss_weight"] == 2.0
    assert about["metrics"].keys() == {"glad", "unwill", "router"}
    assert checkpoint.config.router == "linear"


V2 = dataclasses.replace(TOY, router=dataclasses.replace(TOY.router, layers=1, backbone_rank=2))
RUN = """
import os, pathlib, signal, sys
from tests.test_training import EXAMPLES, V2, llama
from tests.tokens import chat_tokenizer
from mogu_kernels.training import train, trainer
stop = sys.argv[2]
steps = 0
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def step(self, *args, **kwargs):
    global steps
    steps += 1
    if str(steps) == stop:
        kill()
trainer._Bar.on_step_end = step
if stop == "adapter":  # written, but not yet in its place
    pathlib.Path.rename = lambda self, target: kill()
if stop == "state":  # a checkpoint without its last file
    trainer.TrainerState.save_to_json = lambda self, path: kill()
train(V2, llama(), chat_tokenizer(), EXAMPLES, sys.argv[1], validation=EXAMPLES[::3])
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(tokenizer, tmp_path):
    train(V2, llama(), tokenizer, EXAMPLES, tmp_path / "whole", validation=EXAMPLES[::3])
    rng, killed = random.Random(11), tmp_path / "killed"
    for stop in ["state", *(str(rng.randint(2, 11)) for _ in range(3)), "adapter", "18", "never"]:
        done = subprocess.run([sys.executable, "-c", RUN, str(killed), stop], check=False)
        assert done.returncode == (0 if stop == "never" else -signal.SIGKILL), stop
    for path in sorted((tmp_path / "whole/checkpoint").iterdir()):
        assert path.read_bytes() == (killed / "checkpoint" / path.name).read_bytes(), path.name


def test_accumulated_batches_make_the_step_of_one_large_batch(encoder, tmp_path):
    """The loss is a mean over items, so that a mean of means is what one batch has."""
    items = couples(EXAMPLES, encoder, 0)[:4]
    found = []
    for batch, accumulation in ((4, 1), (1, 4)):
        stage = StageConfig(
            learning_rate=0.0, steps=1, batch=batch, accumulation=accumulation, save_steps=1
        )
        folder = tmp_path / str(batch)
        baselines.train_sft(llama(), items, [], stage, folder, pad_token_id=1)
        history = json.loads((folder / "steps/checkpoint-1" / STATE_FILE).read_text())
        found.append([history["log_history"][0][key] for key in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.fixture
def recomputations(monkeypatch):
    """The forward passes of layers that are to be recomputed."""
    calls, plain = [], trainer.checkpoint

    def counted(function, *args, **options):
        calls.append(function)
        return plain(function, *args, **options)

    monkeypatch.setattr(trainer, "checkpoint", counted)
    return calls


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_train_the_same_model(
    stage, trained, tokenizer, tmp_path, recomputations
):
    folder, checkpoint, *_ = trained
    for name in (own for own in STAGES if own != stage):
        shutil.copytree(folder / name, tmp_path / name)
    if stage == "router":  # goes on where it was without
        shutil.copytree(folder / stage, tmp_path / stage)
        shutil.rmtree(last_checkpoint(tmp_path / stage / "steps"))
    changed = dataclasses.replace(getattr(TOY, stage), gradient_checkpointing=True)
    config, model = dataclasses.replace(TOY, **{stage: changed}), llama()
    again = train(config, model, tokenizer, EXAMPLES, tmp_path, validation=EXAMPLES[::3])
    assert recomputations
    assert checkpoint.tensors.keys() == again.tensors.keys()
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name


@pytest.mark.parametrize(
    "targets", [("o_proj",), ("gate_proj", "up_proj"), ("q_proj", "down_proj")]
)
def test_recomputed_layers_keep_their_input_alone(targets, encoder, recomputations):
    model = llama(num_hidden_layers=3).requires_grad_(False)
    mk.attach(model, tiny.checkpoint(model, targets), trainable=True)
    objective = RouterObjective(model, ("glad", "unwill"), 2.0).train()
    batch = Packer(1)(couples(EXAMPLES, encoder, 0)[:2])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, gradients = [], []
    for own in (contextlib.nullcontext, lambda: recomputed(model)):
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in held:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with own():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = objective(**batch)["loss"]
            gradients.append(torch.autograd.grad(loss, trainable.values()))
        kept.append(sum(storages.values()))
    assert len(recomputations) == 3
    assert kept[1] < 0.5 * kept[0]  # the logits are kept either way
    assert any(gradient.any() for gradient in gradients[0])
    for name, *pair in zip(trainable, *gradients, strict=True):
        torch.testing.assert_close(*pair, msg=name)


def test_recomputed_layers_are_afterwards_as_they_were():
    model = llama()
    first, second = model.model.layers[:2]
    own = first.forward = lambda *args, **options: type(first).forward(first, *args, **options)
    with recomputed(model):
        assert first.forward is not own
    with pytest.raises(KeyboardInterrupt), recomputed(model):
        raise KeyboardInterrupt
    assert first.forward is own
    assert "forward" not in vars(second)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
def test_a_stage_stops_early_and_keeps_its_best_state(encoder, tmp_path):
    both = couples(EXAMPLES, encoder, 0)
    train, watched = both[:1] * 4, both[3:]  # one example by heart helps no other
    stage = StageConfig(**STAGE | {"learning_rate": 0.1, "steps": 90}, patience=2)
    first = baselines.train_sft(llama(), train, watched, stage, tmp_path, pad_token_id=1)
    newest = json.loads((Path(last_checkpoint(tmp_path / "steps")) / STATE_FILE).read_text())
    assert newest["best_global_step"] + 6 == newest["global_step"] < 90
    again = baselines.train_sft(llama(), train, watched, stage, tmp_path, pad_token_id=1)
    assert again == first
    kept = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    loss = ResponseObjective(kept)(**Packer(1)(watched))["loss"]
    assert float(loss.detach()) == pytest.approx(newest["best_metric"], rel=1e-4)


def test_a_run_that_was_moved_goes_on(trained, tokenizer, tmp_path):
    folder, checkpoint, *_ = trained
    shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/router/steps/checkpoint-24")
    again = train(TOY, llama(), tokenizer, EXAMPLES, tmp_path / "moved", validation=EXAMPLES[::3])
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, again.tensors[name])


def test_two_processes_train_one_model(tmp_path):
    """Through accelerate, whose launcher this is; gloo on a CPU."""
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(tmp_path / "run")], check=False, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    state = tmp_path / "run/router/steps/checkpoint-4" / STATE_FILE
    assert json.loads(state.read_text())["global_step"] == 4
    assert mk.load_checkpoint(tmp_path / "run/checkpoint").modules


TWO = """
import dataclasses, sys
sys.path.insert(0, ".")
from tests.test_training import EXAMPLES, STAGES, TOY, llama
from tests.tokens import chat_tokenizer
from mogu_kernels.training import train
short = {
    name: dataclasses.replace(getattr(TOY, name), steps=4, gradient_checkpointing=name != "glad")
    for name in STAGES
}
train(dataclasses.replace(TOY, **short), llama(), chat_tokenizer(), EXAMPLES, sys.argv[1])
"""


def test_a_run_that_has_ended_is_not_stepped_again(trained, tokenizer):
    folder, checkpoint, *_ = trained
    again = train(TOY, llama(), tokenizer, EXAMPLES, folder, validation=EXAMPLES[::3])
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor, again.tensors[name])


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    for step, text in ((4, "{}"), (8, '{"global'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / STATE_FILE).write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_another_config_data_or_model_does_not_go_on_in_the_same_folder(trained, tokenizer):
    folder, *_ = trained
    other = dataclasses.replace(TOY, seed=4)
    with pytest.raises(ValueError, match="another examples, seed: delete it"):
        train(other, llama(), tokenizer, EXAMPLES, folder)
    with pytest.raises(ValueError, match="another model: delete it"):
        train(
            TOY,
            llama(num_hidden_layers=3),
            tokenizer,
            EXAMPLES,
            folder,
            validation=EXAMPLES[::3],
        )


def test_other_weights_are_another_model(trained, tokenizer):
    folder, *_ = trained
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match="another model: delete it"):
        train(TOY, model, tokenizer, EXAMPLES, folder, validation=EXAMPLES[::3])


def test_other_routers_are_trained_on_the_responders_that_are_there(trained, tokenizer, tmp_path):
    folder, *_ = trained
    shutil.copytree(folder, tmp_path / "run")
    before = (tmp_path / "run/glad/adapter/adapter_model.safetensors").read_bytes()
    router = dataclasses.replace(TOY.router, gate_loss_weight=1.0, steps=3)
    other = dataclasses.replace(TOY, model="spelled otherwise", router=router)
    run, options = {"folder": tmp_path / "run"}, {"validation": EXAMPLES[::3]}
    with pytest.raises(ValueError, match="router holds a run with another gate_loss_weight, steps"):
        train(other, llama(), tokenizer, EXAMPLES, **run, **options)
    shutil.rmtree(tmp_path / "run/router")
    plain = train(other, llama(), tokenizer, EXAMPLES, **run, **options)
    assert (tmp_path / "run/router/steps/checkpoint-3").is_dir()
    assert (tmp_path / "run/glad/adapter/adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "run/glad/steps/checkpoint-3").is_dir()  # it was not stepped again
    biased = dataclasses.replace(router, refusal_bias=0.5)  # and this needs no steps at all
    other = dataclasses.replace(other, router=biased)
    found = train(other, llama(), tokenizer, EXAMPLES, **run, **options)
    for name, tensor in plain.tensors.items():
        step = torch.tensor([-0.5, 0.5]) if name.endswith(".gate_bias") else 0.0
        torch.testing.assert_close(found.tensors[name], tensor + step, atol=0, rtol=0)


def test_without_a_terminal_a_checkpoint_is_a_line(tokenizer, tmp_path, capsys):
    short = {name: dataclasses.replace(getattr(TOY, name), steps=3) for name in STAGES}
    train(dataclasses.replace(TOY, **short), llama(), tokenizer, EXAMPLES, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "step 3 of 3, loss" in line]
    assert [line.split(":")[0] for line in lines] == ["glad", "unwill", "routers"]


def test_examples_that_do_not_do_stop_a_run_before_it_begins(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="0 malicious and 7 benign examples"):
        train(TOY, llama(), tokenizer, EXAMPLES[7:], tmp_path)
    silent = [*EXAMPLES, Example("Hm?", None, False, "data.jsonl:7")]
    with pytest.raises(ValueError, match=r"data\.jsonl:7: a benign example without a response"):
        train(TOY, llama(), tokenizer, silent, tmp_path)
    with pytest.raises(ValueError, match="3 malicious and 0 benign examples: give both, to train"):
        train(TOY, llama(), tokenizer, EXAMPLES, tmp_path, validation=EXAMPLES[:3])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("nope",)}, "'nope' is no projection of LlamaForCausalLM"),
        ({"router": dataclasses.replace(TOY.router, patience=2)}, "router: patience=2 needs"),
        (
            {"router": dataclasses.replace(TOY.router, layers=1)},
            "4 examples of a class: the probe for router.layers needs 5 of each",
        ),
    ],
)
def test_a_config_that_does_not_fit_leaves_nothing_behind(changes, message, tokenizer, tmp_path):
    config = dataclasses.replace(TOY, **changes)
    with pytest.raises(ValueError, match=message):
        train(config, llama(), tokenizer, EXAMPLES[3:], tmp_path)
    assert not list(tmp_path.iterdir())


def test_v2_routes_the_best_layers_and_trains_their_projections(tokenizer, tmp_path):
    model = llama(num_hidden_layers=3)
    config = dataclasses.replace(
        TOY, router=dataclasses.replace(TOY.router, layers=2, backbone_rank=3)
    )
    checkpoint = train(config, model, tokenizer, EXAMPLES, tmp_path)
    layers = checkpoint.config.provenance["layers"]
    assert len(layers) == 2
    assert checkpoint.modules == [f"model.layers.{n}.self_attn.o_proj" for n in layers]
    assert checkpoint.config.ranks == (5, 5)
    assert checkpoint.config.scaling == (8.0, 8.0)  # lora_alpha 16, rank 2
    for module in checkpoint.modules:
        own = checkpoint.module_tensors(module)
        glad, unwill = own["lora_B"]
        assert torch.equal(glad[:, 2:], unwill[:, 2:])  # one update, which both experts carry
        assert glad[:, 2:].any()
        assert not torch.equal(glad[:, :2], unwill[:, :2])


def test_the_backbone_of_a_half_precision_model_is_trained_in_fp32():
    model = llama(dtype=torch.bfloat16)
    mk.attach(model, tiny.checkpoint(model), trainable=True)
    module = next(m for m in model.modules() if isinstance(m, mk.MoGULinear))
    dtype, shape = module.lora_A.dtype, module.lora_A.shape
    routers._add_backbone(module, 3)
    shared = [p for name, p in module.named_parameters() if name.endswith(".shared")]
    assert [p.dtype for p in shared] == [torch.float32] * 2
    assert (module.lora_A.dtype, module.lora_B.dtype) == (dtype, dtype)
    assert module.lora_A.shape == (shape[0], shape[1] + 3, shape[2])


def test_routers_without_a_backbone_leave_the_responders_alone(trained, encoder, tmp_path):
    folder, checkpoint, *_ = trained
    adapters = {name: folder / name / "adapter" for name in ("glad", "unwill")}
    start = mk.convert.from_peft(adapters, architecture="LlamaForCausalLM")
    for name, tensor in start.tensors.items():
        if "lora" in name:
            assert torch.equal(tensor, checkpoint.tensors[name])


def test_a_probe_finds_the_layer_that_separates():
    states = torch.randn(4, 60, 8)
    malicious = torch.arange(60) % 2 == 0
    states[2, malicious] += 2
    found = probe_losses(states, malicious)
    assert best_layers(found, 1) == [2]
    assert found[2] < 0.4
    with pytest.raises(ValueError, match="layers=5: the model has 4"):
        best_layers(found, 5)


def test_a_probe_weighs_both_classes_alike():
    states = torch.randn(2, 40, 6)
    malicious = torch.arange(40) < 10
    states[:, malicious] += 0.5
    weight, bias = probe(states, malicious)
    found = ((states @ weight[:, :, None])[:, :, 0] + bias[:, None]).sigmoid()
    means = found[:, malicious].mean(1) + found[:, ~malicious].mean(1)
    torch.testing.assert_close(means, torch.ones(2), atol=1e-3, rtol=0)  # as far up as down


def test_led_edits_the_layer_that_refusals_need(encoder, monkeypatch):
    """Layers that are made to do nothing can be removed without loss."""
    model = llama(num_hidden_layers=15)  # the first ten may be edited
    for number, layer in enumerate(model.model.layers):
        if number != 9:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
    batch = Packer(1)(pairs(EXAMPLES, encoder, 0))
    own = ResponderObjective(model, "rejection")
    optimizer = torch.optim.Adam(model.model.layers[9].parameters(), 1e-2)
    for _ in range(30):  # only the tenth learns to refuse
        optimizer.zero_grad()
        own(**batch)["wanted"].backward()
        optimizer.step()
    edited, toxic = baselines._layers_of_led(model, batch)
    assert 9 in edited
    assert (len(edited), len(toxic)) == (baselines.LED_EDITED, baselines.LED_TOXIC)
    assert toxic[-1] == 14
    monkeypatch.setattr(baselines, "LED_EDITED", 1)
    assert baselines._layers_of_led(model, batch)[0] == [9]


def test_dro_pushes_malicious_queries_to_where_refusals_are(tokenizer, encoder):
    model = llama()
    both = couples(EXAMPLES, encoder, 0)
    space = baselines._Directions(model, tokenizer, [5, 6, 7], both, 1)
    objective = baselines._PromptObjective(model, space)
    malicious, benign = both[0]
    for item, sign in ((malicious, 1), (benign, -1)):
        query = tuple(item.prompt)
        batch = baselines._queries([(item.prompt, item.malicious)], 1)
        losses = []
        for step in (-1.0, 1.0):  # from the start, along the refusal direction
            moved = step * space.basis[:, : baselines.COMPONENTS] @ space.refusal
            states = baselines._last_states(model, [item.prompt], 1)[0]
            space.start[query] = states - moved
            losses.append(float(objective(**batch)["refusal"].detach()))
        assert sign * (losses[0] - losses[1]) > 0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
@pytest.mark.parametrize("name", ["sft", "led", "dro"])
def test_baselines_learn_and_leave_the_base_as_it_was(name, tokenizer, encoder, tmp_path):
    model = llama(num_hidden_layers=9)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    config = StageConfig(**STAGE | {"learning_rate": 3e-3})
    both, own = couples(EXAMPLES, encoder, 0), pairs(EXAMPLES, encoder, 0)
    run = {"folder": tmp_path / name, "pad_token_id": 1}
    if name == "sft":
        baselines.train_sft(model, both, [], config, **run)
    elif name == "led":
        baselines.train_led(model, own, [], config, **run)
    else:
        baselines.train_dro(model, tokenizer, both, [], config, **run)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    history = json.loads((tmp_path / name / "steps/checkpoint-12" / STATE_FILE).read_text())
    first, *_, last = [line["loss"] for line in history["log_history"] if "loss" in line]
    assert last < first
    assert PeftModel.from_pretrained(model, tmp_path / name / "adapter")


def test_the_published_recipe_is_the_default():
    assert load_config("recipes/mogu.yaml") == TrainingConfig(router=RouterConfig(save_steps=50))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("glad: {rnak: 8}", ValueError, r"glad: unknown rnak; take any of learning_rate"),
        ("seed: one", TypeError, r"seed is 'one': take int"),
        ("seed: -1", ValueError, r"seed is -1: take 0 or more"),
        ("max_response_tokens: 0", ValueError, r"max_response_tokens is 0: take more"),
        ("glad: {learning_rate: 0.0}", ValueError, r"learning_rate is 0.0: take more"),
        ("router: 3", ValueError, r"router is a int: take a mapping"),
        ("data: [1]", TypeError, r"data is \[1\]: take a list of texts"),
        ("seed: [", ValueError, r"bad\.yaml"),
        ("router: {gate: relu}", ValueError, r"gate is 'relu': take one of sigmoid, softmax"),
        ("glad: {schedule: cosin}", ValueError, r"schedule is 'cosin': take one of constant"),
        ("template: llama3", ValueError, r"template is 'llama3': take one of chat, llama2"),
        ("unwill: {dropout: 1.0}", ValueError, r"dropout is 1.0: take less than 1"),
        ("glad: {learning_rate: .nan}", ValueError, r"learning_rate is nan: take more"),
        ("glad: {learning_rate: fast}", TypeError, r"learning_rate is 'fast': take float"),
        (
            "router: {gradient_checkpointing: 1}",
            TypeError,
            r"gradient_checkpointing is 1: take bool",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_named(text, error, says, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(error, match=says):
        load_config(path)


def test_a_config_is_read_as_people_write_it(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == TrainingConfig()
    (tmp_path / "short.yaml").write_text("glad: {learning_rate: 5e-4}\nrouter: {refusal_bias: -1}")
    short = load_config(tmp_path / "short.yaml")
    assert (short.glad.learning_rate, short.router.refusal_bias) == (5e-4, -1.0)
    own = json.dumps(dataclasses.asdict(TOY), indent="\t")
    (tmp_path / "own.json").write_text(own)
    assert load_config(tmp_path / "own.json") == TOY


def test_a_refusal_bias_moves_the_gates_and_nothing_else(trained, encoder, tmp_path):
    folder, *_ = trained
    adapters = {name: folder / name / "adapter" for name in ("glad", "unwill")}
    own = couples(EXAMPLES, encoder, 0)
    for bias in (0.0, 0.75):
        config = dataclasses.replace(TOY.router, refusal_bias=bias, steps=3)
        steps = tmp_path / "steps"
        found, _ = train_routers(llama(), adapters, own, [], config, steps, pad_token_id=1)
        if not bias:
            plain = found
    assert plain.config.expert_names == ("glad", "unwill")
    for name, tensor in plain.tensors.items():
        step = torch.tensor([-0.75, 0.75]) if name.endswith(".gate_bias") else 0.0
        torch.testing.assert_close(found.tensors[name], tensor + step, atol=0, rtol=0)


def test_softmax_routers_train_too(trained, encoder, tmp_path):
    folder, *_ = trained
    adapters = {name: folder / name / "adapter" for name in ("glad", "unwill")}
    config = dataclasses.replace(TOY.router, gate="softmax", steps=4)
    checkpoint, metrics = train_routers(
        llama(), adapters, couples(EXAMPLES, encoder, 0), [], config, tmp_path, pad_token_id=1
    )
    assert checkpoint.config.gate == "softmax"
    assert metrics["loss"] > 0


def test_a_model_whose_layers_cannot_be_recomputed_says_so(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "GradientCheckpointingLayer", torch.nn.Bilinear)
    changed = dataclasses.replace(TOY.unwill, gradient_checkpointing=True)
    config = dataclasses.replace(TOY, unwill=changed)
    message = "gradient_checkpointing=True: LlamaForCausalLM has no layers"
    with pytest.raises(ValueError, match=message):
        train(config, llama(), tokenizer, EXAMPLES, tmp_path)
    assert not list(tmp_path.iterdir())
