"""The `mogu` command: what it prints, where, and with which exit code."""

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mogu_kernels as mk
from mogu_kernels import cli, evaluation, inspection
from mogu_kernels.packages import PackageError
from mogu_kernels.training.data import Example
from tests import tiny

TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and the three special tokens of `tiny.llama`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<bos>", "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, an "mlp" checkpoint of two ranks, a "linear" one, one for another model."""
    root = tmp_path_factory.mktemp("cli")
    model = tiny.llama()
    model.save_pretrained(root / "model")
    byte_tokenizer().save_pretrained(root / "model")
    targets = ("o_proj", "up_proj")
    mk.save_checkpoint(tiny.checkpoint(model, targets, ranks=(3, 5)), root / "mlp")
    other = tiny.checkpoint(model)
    other.config = dataclasses.replace(other.config, architecture="OPTForCausalLM")
    mk.save_checkpoint(other, root / "other")
    linear = tiny.checkpoint(model, router="linear", gate="softmax")
    mk.save_checkpoint(linear, root / "linear")
    return root


@pytest.fixture
def run(capsys):
    """(exit code, stdout, stderr) of the command in this process."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        if isinstance(exit.value.code, str):  # which the interpreter would print
            return 1, out, err + exit.value.code + "\n"
        return exit.value.code or 0, out, err

    return run


def in_process_of_its_own(*arguments):
    command = [sys.executable, "-m", "mogu_kernels.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


COMMANDS = (
    (),
    ("demo",),
    ("generate",),
    ("eval",),
    ("train",),
    ("inspect",),
    ("convert",),
    ("convert", "peft"),
    ("convert", "official"),
    ("convert", "export"),
    ("doctor",),
    ("bench",),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert " ".join(("Example: mogu", *command)) in " ".join(out.split())


def test_json_is_all_that_stdout_gets(folders):
    done = in_process_of_its_own("inspect", folders / "mlp", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"


def test_a_mistake_is_one_line_without_traceback():
    done = in_process_of_its_own("inspect", "nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("mogu: nowhere has no mogu_config.json: take a folder")
    assert done.stderr.count("\n") == 1


def test_generate_in_a_process_of_its_own(folders):
    done = in_process_of_its_own(
        "generate", folders / "model", folders / "mlp", "a", "b", "--json", "--max-new-tokens", 3
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [answer["prompt"] for answer in json.loads(done.stdout)] == ["a", "b"]


def ours(folders, checkpoint, prompt, **options):
    """(answer, tokens, gates by module) through the library."""
    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folders / "model")
    mk.attach(model, folders / checkpoint)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with mk.record_gates(model) as gates:
        out = mk.generate(model, ids, do_sample=False, **options)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True), len(out), gates


@pytest.mark.parametrize(("option", "m"), [((), 5), (("--routed-tokens", "3"), 3)])
def test_generate_gives_the_library_s_answer_and_its_mean_gates(folders, run, option, m):
    code, out, _ = run(
        *("generate", folders / "model", folders / "mlp", "hello", "--no-chat-template"),
        *("--max-new-tokens", 7, "--json", *option),
    )
    assert code == 0
    (answer,) = json.loads(out)
    expected, tokens, gates = ours(folders, "mlp", "hello", max_new_tokens=7, routed_tokens=m)
    assert (answer["answer"], answer["tokens"]) == (expected, tokens)
    mean = torch.cat([own[0, len("hello") - 1 :][:m] for own in gates.values()]).mean(0)
    assert list(answer["gates"]) == ["glad", "unwill"]
    assert list(answer["gates"].values()) == pytest.approx(mean.tolist(), abs=1e-6)
    assert abs(mean[0] - mean[1]) > 1e-3  # else swapped experts would pass


def test_generate_routes_all_or_nothing(folders, run):
    command = ("generate", folders / "model", folders / "mlp", "hello", "--no-chat-template")
    answers = {}
    for number in ("all", "0"):
        options = ("--max-new-tokens", 7, "--json", "--routed-tokens", number)
        answers[number] = json.loads(run(*command, *options)[1])[0]
    for number, m in (("all", None), ("0", 0)):
        expected, _, _ = ours(folders, "mlp", "hello", max_new_tokens=7, routed_tokens=m)
        assert answers[number]["answer"] == expected
    assert answers["all"]["answer"] != answers["0"]["answer"]
    assert answers["all"]["gates"]
    assert answers["0"]["gates"] == {}


def test_generate_speaks_the_chat_template(folders, run):
    command = ("generate", folders / "model", folders / "mlp", "hello", "--max-new-tokens", 7)
    code, out, _ = run(*command, "--handoff", "replay")
    assert code == 0
    expected, _, _ = ours(folders, "mlp", "<hello>", max_new_tokens=7, handoff="replay")
    assert out == expected + "\n"
    assert run(*command, "--no-chat-template")[1] != out


def test_several_answers_stand_below_their_prompts(folders, run):
    _, out, _ = run("generate", folders / "model", folders / "mlp", "one", "two")
    assert out.startswith("> one\n")
    assert "\n> two\n" in out


def test_a_seed_repeats_the_draws(folders, run):
    command = ("generate", folders / "model", folders / "mlp", "hello", "--sample", "--seed")
    assert run(*command, 3)[1] == run(*command, 3)[1] != run(*command, 4)[1]


@pytest.fixture
def small_sets(monkeypatch):
    """Two sets of prompts instead of the packages'."""
    test = {
        "bad": [Example(f"bad {i}", None, True, "t") for i in range(3)],
        "good": [Example(f"good {i}", "a good answer", False, "t") for i in range(3)],
    }
    monkeypatch.setattr(evaluation, "split", lambda: types.SimpleNamespace(test=test))
    monkeypatch.setattr(evaluation, "refusal_prefixes", lambda: (("", "x"), ("x",)))
    return test


def test_eval_measures_what_the_library_does(folders, run, small_sets, tmp_path):
    command = ("eval", folders / "model", folders / "mlp", "--max-new-tokens", 3)
    code, out, _ = run(*command, "--limit", 2, "--json", "--out", tmp_path / "new")
    assert code == 0
    found = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(folders / "model").eval()
    system = evaluation.load_system(model, byte_tokenizer(), folders / "mlp")
    prefixes = evaluation.refusal_prefixes()
    expected = evaluation.evaluate(system, small_sets, prefixes=prefixes, limit=2, max_new_tokens=3)
    assert found == expected | {"measured": found["measured"]}
    assert found["measured"]["checkpoint"] == str(folders / "mlp")
    assert (found["measured"]["limit"], found["measured"]["defence"]) == (2, None)
    assert json.loads((tmp_path / "new" / "eval.json").read_text()) == found
    assert (tmp_path / "new" / "gates.png").is_file()


def test_eval_takes_prompts_of_your_own(folders, run, small_sets, tmp_path):
    rows = [
        {"instruction": "mine", "malicious": True},
        {"instruction": "yours", "response": "good", "malicious": False},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("eval", folders / "model", "--data", tmp_path / "own.jsonl", "--max-new-tokens", 3)
    found = json.loads(run(*command, "--json")[1])
    assert list(found["sets"]) == ["own, malicious", "own, benign"]
    found = json.loads(run(*command, "--sets", "bad", "--json")[1])
    assert list(found["sets"]) == ["own, malicious", "own, benign", "bad"]


def test_eval_tells_people_a_line_a_figure(folders, run, small_sets):
    command = ("eval", folders / "model", "--defence", "rose", "--max-new-tokens", 3)
    _, out, _ = run(*command, "--sets", "bad")
    assert out == "bad refused  100.0 % (43.9 to 100.0) of 3 malicious prompts\n"
    _, out, _ = run(*command, "--sets", "good", "--sample", "--seed", 3)
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "good refused",
        "perplexity, decoded",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sets", "worse"), "no set is named 'worse': take any of bad, good"),
        (("--defence", "hope"), "defence='hope': take one of self_reminder"),
        (
            ("--defence", "rose", "--template", "llama2"),
            "rose is written for the chat template: leave llama2 out",
        ),
        (("nowhere",), "nowhere is no folder: take a MoGU checkpoint or a PEFT folder"),
        (("--seed", 1), "seed=1, but greedy decoding draws nothing: add --sample"),
    ],
)
def test_eval_refuses_what_it_does_not_know(folders, run, small_sets, options, message):
    code, _, err = run("eval", folders / "model", *options)
    assert code == 1
    assert err.startswith(f"mogu: {message}")


def test_the_help_of_eval_names_what_there_is(run):
    _, out, _ = run("eval", "--help")
    names = (*evaluation.DEFENCES, "harmbench", "strongreject", "jailbreaks", "alpaca", "edgy")
    assert all(name in out for name in names)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PackageError("no garak: mend it"), "no garak: mend it"),
        (
            ModuleNotFoundError("No module named 'accelerate'", name="accelerate"),
            "accelerate is missing: pip install 'mogu_kernels[train]'",
        ),
    ],
)
def test_what_is_missing_is_one_line_with_a_remedy(folders, run, monkeypatch, error, message):
    def split():
        raise error

    monkeypatch.setattr(evaluation, "split", split)
    code, _, err = run("eval", folders / "model")
    assert (code, err) == (1, f"mogu: {message}\n")


def test_inspect_measures_what_the_checkpoint_holds(folders):
    checkpoint = mk.load_checkpoint(folders / "mlp")
    found = inspection.inspect_checkpoint(folders / "mlp")
    assert found["layers"] == [0, 1]
    assert [(e["name"], e["rank"], e["scaling"]) for e in found["experts"]] == [
        ("glad", 3, 2.0),
        ("unwill", 5, 2.0),
    ]
    with (folders / "mlp" / "mogu_model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
    assert header + sum(found["bytes"].values()) == size
    assert sum(found["parameters"].values()) == sum(t.numel() for t in checkpoint.tensors.values())
    assert len(found["modules"]) == 4
    folded = checkpoint.folded()
    for module in found["modules"]:
        name = module["name"]
        update = checkpoint.tensors[f"{name}.lora_B"] @ checkpoint.tensors[f"{name}.lora_A"]
        norms = 2 * update.double().flatten(1).norm(dim=1)
        assert list(module["update_norm"].values()) == pytest.approx(norms.tolist(), rel=1e-5)
        at_zero = folded.tensors[f"{name}.gate_bias"].sigmoid()
        assert list(module["gate_at_zero"].values()) == pytest.approx(at_zero.tolist(), rel=1e-5)
        norms = folded.tensors[f"{name}.gate_weight"].norm(dim=1)
        assert list(module["gate_weight_norm"].values()) == pytest.approx(norms.tolist(), rel=1e-5)
        assert 0 < module["logit_difference"] < 1e-5
    assert found["fold"]["logit_difference"] == max(m["logit_difference"] for m in found["modules"])


def test_a_fold_that_strays_is_noticed(folders, monkeypatch):
    fold = mk.MoGUCheckpoint.folded

    def strayed(checkpoint, *rest):
        folded = fold(checkpoint, *rest)
        for name, tensor in folded.tensors.items():
            if name.endswith("layers.1.self_attn.o_proj.gate_bias"):
                tensor[1] += 1e-2
        return folded

    monkeypatch.setattr(mk.MoGUCheckpoint, "folded", strayed)
    found = inspection.inspect_checkpoint(folders / "mlp")["fold"]
    assert found["module"] == "model.layers.1.self_attn.o_proj"
    assert found["logit_difference"] == pytest.approx(1e-2, rel=1e-3)


def test_softmax_gates_at_zero_sum_to_one(folders):
    for module in inspection.inspect_checkpoint(folders / "linear")["modules"]:
        assert sum(module["gate_at_zero"].values()) == pytest.approx(1)


def test_inspect_in_words(folders, run):
    code, out, _ = run("inspect", folders / "mlp")
    assert code == 0
    for words in (
        "4 (o_proj, up_proj)",
        "2 (0 to 1)",
        "rank 3, lora_alpha 6, scaling 2",
        "gate logits differ from the three linears' by at most",
        '"trained": false',
    ):
        assert words in out
    assert "linear (folded already)" in run("inspect", folders / "linear")[1]


def test_inspect_draws(folders, run, tmp_path):
    assert run("inspect", folders / "mlp", "--plot", tmp_path / "layers.png")[0] == 0
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def convert(monkeypatch, folders):
    """A stand-in for `mogu_kernels.convert` that notes its calls."""
    calls = []

    def from_peft(experts, *, architecture, base_model=None):
        calls.append((dict(experts), architecture, base_model))
        return mk.load_checkpoint(folders / "mlp")

    def from_official(unwill, glad, router, *, architecture=None, base_model=None):
        calls.append({"unwill": unwill, "glad": glad, "router": router, "of": architecture})
        return mk.load_checkpoint(folders / "linear")

    def to_peft(checkpoint, folder):
        calls.append(checkpoint.modules)
        return {name: folder / name for name in checkpoint.config.expert_names}

    stand_in = types.SimpleNamespace(
        from_peft=from_peft, from_official=from_official, to_peft=to_peft
    )
    monkeypatch.setitem(sys.modules, "mogu_kernels.convert", stand_in)
    monkeypatch.setattr(mk, "convert", stand_in, raising=False)
    return calls


def test_convert_peft_saves_a_checkpoint(convert, run, tmp_path):
    code, out, _ = run(
        *("convert", "peft", "--glad", "g", "--unwill", "u"),
        *("--architecture", "LlamaForCausalLM", tmp_path / "out"),
    )
    assert code == 0
    assert convert == [({"glad": Path("g"), "unwill": Path("u")}, "LlamaForCausalLM", None)]
    assert f"{tmp_path / 'out'}: 4 projections (o_proj, up_proj), experts glad, unwill" in out
    assert mk.load_checkpoint(tmp_path / "out").config.ranks == (3, 5)


def test_convert_official_does_not_swap_the_experts(convert, run, tmp_path):
    command = ("convert", "official", "--unwill", "u", "--glad", "g", "--router", "r.pth")
    assert run(*command, tmp_path / "out")[0] == 0
    expected = {"unwill": Path("u"), "glad": Path("g"), "router": Path("r.pth"), "of": None}
    assert convert == [expected]
    other = ("--architecture", "BaichuanForCausalLM")
    assert run(*command, *other, tmp_path / "out")[0] == 0
    assert convert[1] == expected | {"of": "BaichuanForCausalLM"}
    assert mk.load_checkpoint(tmp_path / "out").config.gate == "softmax"


def test_convert_export_names_the_folders(convert, folders, run, tmp_path):
    code, out, _ = run("convert", "export", folders / "mlp", tmp_path)
    assert code == 0
    assert convert == [mk.load_checkpoint(folders / "mlp").modules]
    assert out == f"glad: {tmp_path / 'glad'}\nunwill: {tmp_path / 'unwill'}\n"


def test_experts_survive_a_way_out_and_back(folders, run, tmp_path):
    assert run("convert", "export", folders / "mlp", tmp_path / "peft")[0] == 0
    code, _, err = run(
        *("convert", "peft", "--architecture", "LlamaForCausalLM", tmp_path / "back"),
        *("--glad", tmp_path / "peft" / "glad", "--unwill", tmp_path / "peft" / "unwill"),
    )
    assert code == 0, err
    before, after = (
        inspection.inspect_checkpoint(folder)["modules"]
        for folder in (folders / "mlp", tmp_path / "back")
    )
    assert [m["name"] for m in before] == [m["name"] for m in after]
    for one, other in zip(before, after, strict=True):
        assert one["update_norm"] == pytest.approx(other["update_norm"], rel=1e-5)


def test_doctor_in_words_and_in_json(run):
    _, out, _ = run("doctor")
    found = json.loads(run("doctor", "--json")[1])
    for subject, finding in found.items():
        assert subject in out
        assert finding in out


def test_bench_reports_ratios(run, monkeypatch):
    monkeypatch.setattr(cli, "COLD_BYTES", 1e7)
    code, out, _ = run("bench", "--quick", "--json")
    found = json.loads(out)
    assert code == 0
    (row,) = found["sizes"]
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert found["machine"]["torch"]
    assert "on this machine only" in run("bench", "--quick")[1]


def test_demo_runs_in_the_repository(run, monkeypatch):
    ran = []

    def note(command, cwd, check):
        ran.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", note)
    assert run("demo")[0] == 3
    assert ran == [(["-m", "demo"], Path(__file__).parent.parent)]


def test_demo_without_the_repository_says_where_it_lives(run, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    code, _, err = run("demo")
    assert code == 1
    assert err.startswith("mogu: the demo is in the repository's demo/ folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "{}/model", "{}/nowhere", "a"), "nowhere has no mogu_config.json"),
        (("generate", "{}/nowhere", "{}/mlp", "a"), "nowhere has no config.json"),
        (("generate", "{}/mlp", "{}/mlp", "a"), "mlp has no config.json"),
        (("generate", "{}/model", "{}/other", "a"), "OPTForCausalLM"),
        (("generate", "{}/model", "{}/mlp", "a", "--seed", "3"), "seed=3, but greedy decoding"),
        (("generate", "{}/model", "{}/mlp", "", "--no-chat-template"), "'' has no tokens"),
        (("generate", "{}/model", "{}/mlp", "a", "--max-new-tokens", "0"), "max_new_tokens"),
        (("convert", "export", "{}/nowhere", "{}/out"), "nowhere has no mogu_config.json"),
        (("inspect", "{}/mlp", "--plot", "{}/nowhere/a.png"), "No such file or directory"),
    ],
)
def test_mistakes_are_named(folders, run, arguments, message):
    code, out, err = run(*(argument.format(folders) for argument in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("mogu: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("transformers", ("generate", "{}/model", "{}/mlp", "a"), "hf"),
        ("matplotlib.figure", ("inspect", "{}/mlp", "--plot", "{}/a.png"), "plot"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    folders, run, monkeypatch, missing, command, extra
):
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = run(*(argument.format(folders) for argument in command))
    package = missing.partition(".")[0]
    assert code == 1
    assert err == f"mogu: {package} is missing: pip install 'mogu_kernels[{extra}]'\n"


def test_without_typer_the_command_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None; import mogu_kernels.cli"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "mogu: typer is missing: pip install 'mogu_kernels[cli]'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("inspect",),
        ("inspect", "a", "--nonsense"),
        ("generate", "{}/model", "{}/mlp", "a", "--handoff", "guess"),
        ("generate", "{}/model", "{}/mlp", "a", "--routed-tokens", "-1"),
        ("generate", "{}/model", "{}/mlp", "a", "--routed-tokens", "some"),
        ("convert", "peft", "out", "--glad", "g"),
    ],
)
def test_wrong_usage_is_exit_code_2(folders, run, arguments):
    code, out, err = run(*(argument.format(folders) for argument in arguments))
    assert (code, out) == (2, "")
    assert "Usage: mogu" in err


def test_train_makes_a_checkpoint_of_files(run, folders, tmp_path):
    rows = [("bad", "", True), ("worse", "", True), ("good", "yes", False), ("better", "no", False)]
    data = tmp_path / "data.csv"
    lines = ["instruction,response,malicious", *(f"{i},{r},{m}" for i, r, m in rows)]
    data.write_text("\n".join(lines))
    brief = "{steps: 1, batch: 1, accumulation: 1}"
    recipe = tmp_path / "brief.yaml"
    recipe.write_text("\n".join(f"{stage}: {brief}" for stage in ("glad", "unwill", "router")))
    asked = ("train", recipe, tmp_path / "run")
    code, out, _ = run(*asked, "--model", folders / "model", "--data", data)
    assert code == 0
    assert "2 projections" in out
    about = mk.load_checkpoint(tmp_path / "run/checkpoint").config.provenance
    assert about["data_sha256"].keys() == {str(data)}
    assert run(*asked, "--data", data)[2].endswith("names no model: add one, or say --model\n")
    code, _, err = run(*asked, "--model", folders / "model")
    assert err.endswith("names no data: add files, or say --data\n")
    data.write_text("instruction,malicious\nbad,true\n,true\n")
    code, _, err = run(*asked, "--model", folders / "model", "--data", data)
    assert code == 1
    assert f"{data}:3: empty instruction" in err
