"""Files that are damaged or hostile: one clear error each, no code run, nothing changed, no memory.

A subprocess makes every case from its seed and reads it; the tests look at what it reports.
"""

import collections
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mogu_kernels as mk
from mogu_kernels import checkpoint, convert
from tests import tiny

CASES = 20  # of each kind
ROOT = Path(__file__).parent.parent


# the parts of a safetensors file


def read_parts(path):
    """The header, parsed, and the data."""
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def write_parts(path, header, data):
    """A file whose length field is right, whatever the header says."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(path, position, bit):
    whole = bytearray(path.read_bytes())
    whole[position] ^= 1 << bit
    path.write_bytes(whole)


# the kinds: each makes `folder`, a copy of good files, bad in a way that `rng` or its number picks


def header_bits(rng, folder, _):
    """Any bit of what the header says of the tensors (a bit of its free metadata does no harm)."""
    path = folder / checkpoint.TENSORS_FILE
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    start = whole.index(b"}", whole.index(b"__metadata__")) + 1
    flip(path, rng.randrange(start, 8 + size), rng.randrange(8))


def data_bits(rng, folder, _):
    """The bit that turns a number of 1 to 2 into Inf or NaN, or any bit in a padded rank."""
    path = folder / checkpoint.TENSORS_FILE
    header, data = read_parts(path)
    start = path.stat().st_size - len(data)
    name = rng.choice([name for name in header if name.endswith("lora_B")])
    first, last = header[name]["data_offsets"]
    values = struct.unpack(f"<{(last - first) // 4}f", data[first:last])
    wanted = rng.choice([lambda v: 1 <= abs(v) < 2, lambda v: v == 0])
    i = rng.choice([i for i, value in enumerate(values) if wanted(value)])
    bit = 30 if values[i] else rng.randrange(31)
    flip(path, start + first + 4 * i + bit // 8, bit % 8)


def truncations(rng, folder, _):
    path = folder / rng.choice([checkpoint.TENSORS_FILE] * 3 + [checkpoint.CONFIG_FILE])
    whole = path.read_bytes()
    path.write_bytes(whole[: rng.randrange(len(whole) - 1)])


def header_lengths(rng, folder, _):
    path = folder / checkpoint.TENSORS_FILE
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    near = [size + rng.choice([-1, 1]) * rng.randrange(1, 60), rng.randrange(size)]
    far = [0, len(whole), 10**8 + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**64)]
    path.write_bytes(struct.pack("<Q", rng.choice(near + far)) + whole[8:])


def shapes_and_offsets(rng, folder, _):
    """Tensors that are huge, overlap, or lie outside of the file."""
    path = folder / checkpoint.TENSORS_FILE
    header, data = read_parts(path)
    names = [name for name in header if name != "__metadata__"]
    own, other = (header[name] for name in rng.sample(names, 2))
    first, last = own["data_offsets"]
    huge = rng.choice([2**32, 2**40, 2**62, 2**63, 2**64, 10**30, -1, 1.5, "6", None])
    own |= rng.choice(
        [
            {"shape": [huge, *own["shape"][1:]]},
            {"shape": [2**31, 2**31, 2**31]},
            {"shape": [2**20, 2**20], "data_offsets": [first, first + 2**42]},
            {"shape": own["shape"] * 1000},
            {"data_offsets": other["data_offsets"]},
            {"data_offsets": [first + 4, last + 4]},
            {"data_offsets": [last, first]},
            {"data_offsets": [first, huge]},
            {"data_offsets": [-4, last]},
        ]
    )
    write_parts(path, header, data)


def changed_tensors(folder, change):
    path = folder / checkpoint.TENSORS_FILE
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def surplus_and_missing(rng, folder, _):
    def change(tensors):
        name = rng.choice(sorted(tensors))
        extra = rng.choice(["lora_C", "weight", "router.linear_9.weight", "gate_scale"])
        for _ in range(rng.choice([0, 0, 1, 3])):
            tensors.pop(rng.choice(sorted(tensors)))
        if name in tensors and rng.random() < 0.3:
            tensors[name + "x"] = tensors.pop(name)
        else:
            tensors[name.rpartition(".")[0] + "." + extra] = torch.ones(1 + rng.randrange(4))

    changed_tensors(folder, change)


def dtypes_and_values(rng, folder, _):
    def change(tensors):
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        if rng.random() < 0.5:
            foreign = [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
            foreign += [] if "router" in name else [torch.float64, torch.float16]
            tensors[name] = tensor.to(rng.choice(foreign))
        else:
            i = rng.randrange(tensor.numel())
            tensor.view(-1)[i] = rng.choice([float("nan"), float("inf"), float("-inf")])

    changed_tensors(folder, change)


def names(rng, folder, _):
    """One module under a name that is a path, empty in part, endless, or no identifier."""
    hostile = ["..", "", "../../etc/x", "/etc/passwd", "a/b", "a\\b", "C:", "%2e%2e", "~", "\0"]
    hostile += ["\n", " ", "*", "²", "é", "\u202e", "9" * 5000, "a" * 10**4, "$(id)", "{0}"]

    def change(tensors):
        module = rng.choice(sorted(n for n in tensors if n.endswith(".lora_A")))[: -len(".lora_A")]
        parts = module.split(".")
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(hostile))
        for key in [key for key in tensors if key.startswith(module + ".")]:
            tensors[".".join(parts) + key.removeprefix(module)] = tensors.pop(key)

    changed_tensors(folder, change)


WRONG = {
    "format_version": [True, 1.0, "1", None, 2, 10**400, [1]],
    "base_model": [None, 3, ["a"], {}],
    "architecture": ["", None, "../x", "a" * 10**5, "\ud800", ["LlamaForCausalLM"], "Other"],
    "target_modules": ["o_proj", [], [[]], ["../x"], ["o_proj"] * 2, ["k_proj"], [None], {"a": 1}],
    "ranks": [4, [], [4, 2.0], [4, True], [4, "2"], [10**400, 2], [2**40, 2], [-1, 2], [1] * 10**4],
    "lora_alpha": [[8, 10**400], [8, "x"], [8, None], [8], [[8, 8]], 8, [8, 1e300]],
    "gate": ["relu", None, "a" * 10**5, 1, {"sigmoid": 1}],
    "router": ["cnn", None, 1, ["mlp"]],
    "router_hidden": [0, -1, 10**400, 2.5, "8", None],
    "routed_tokens": [-1, 10**400, 1.5, "5", [5]],
    "expert_names": [
        ["../../etc", "x"],
        ["a", "a"],
        ["", "b"],
        ["a\0", "b"],
        "ab",
        ["a" * 999, "b"],
    ],
    "rslora": [1, "yes", None, []],
    "provenance": [None, [], "x", 3],
    "colour": ["red"],
    "x" * 10**5: [1],
}


def configs(rng, folder, n):
    path = folder / checkpoint.CONFIG_FILE
    text = path.read_text()
    values = json.loads(text)
    field = rng.choice(sorted(WRONG))
    texts = [
        "[" * 10**5,
        '{"provenance": ' * 10**5,
        text.replace("{", '{"provenance": ' + "[" * 3000 + "]" * 3000 + ",", 1),
        text.replace("[", "[NaN, ", 1),
        text.replace('"lora_alpha": [', '"lora_alpha": [Infinity, '),
        json.dumps(values | {"lora_alpha": [float("nan"), 1]}),
        text.replace("8.0", "1e999"),
        text.replace('"router_hidden": 8', '"router_hidden": ' + "9" * 5000),
        text.replace("{", '{"ranks": [1, 1],', 1),
        text + " " * 2**21,
        "\ufeff" + text,
        "null",
        "",
        json.dumps([values]),
        json.dumps({key: v for key, v in values.items() if key != "ranks"}),
    ]
    wrong = json.dumps(values | {field: rng.choice(WRONG[field])})
    path.write_text([*texts, *[wrong] * (CASES - len(texts))][n % CASES])


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


class Storage:
    """Stands for a storage of `numel` numbers in a pickle."""

    def __init__(self, numel):
        self.numel = numel


def archive(path, values, data=b"\0" * 64, protocol=2):
    """A zip laid out as torch.save does, with any pickle."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", value.numel)
            return None

    with zipfile.ZipFile(path, "w") as file:
        with file.open("router/data.pkl", "w") as entry:
            Pickler(entry, protocol).dump(values)
        file.writestr("router/byteorder", "little")
        file.writestr("router/data/0", data)
        file.writestr("router/version", "3\n")


def claimed(numel, size, stride, offset=0):
    """A tensor that says of itself what it likes."""
    arguments = (Storage(numel), offset, size, stride, False, collections.OrderedDict())
    return Bomb(torch._utils._rebuild_tensor_v2, *arguments)


def pickles(rng, folder, n):
    """A router's .pth that runs code, or asks for memory, or is damaged."""
    marker, path = str(folder / "marker"), folder / "router.pth"
    values = torch.load(path)
    key = rng.choice(sorted(values))
    bomb = rng.choice(
        [
            Bomb(os.system, f"touch {marker}"),
            Bomb(open, marker, "w"),
            Bomb(eval, f"open({marker!r}, 'w')"),
            Bomb(exec, f"open({marker!r}, 'w')"),
            Bomb(bytearray, 10**12),
        ]
    )

    def compressed():
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
            with file.open("router/data.pkl", "w", force_zip64=True) as entry:
                for _ in range(300):
                    entry.write(b"\0" * 2**20)
            file.writestr("router/version", "3\n")

    huge = [
        claimed(2**40, (2**40,), (1,)),
        claimed(16, (2**40,), (1,)),
        claimed(16, (2**40,), (0,)),
        claimed(16, (2**31, 2**31, 2**31), (1, 1, 1)),
        claimed(-1, (4,), (1,)),
        claimed(16, (4,), (1,), -(2**40)),
        claimed(16, (4,), (1,), 2**40),
    ]
    ways = [
        lambda: torch.save(values | {key: bomb}, path),
        lambda: torch.save(values | {key: bomb}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(bomb)),
        lambda: archive(path, bomb, protocol=4),
        lambda: archive(path, values | {key: bomb}),
        *[lambda claim=claim: archive(path, {key: claim}) for claim in huge],
        lambda: torch.save(values | {key: values[key].clone().fill_(float("nan"))}, path),
        lambda: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
        compressed,
    ]
    ways[n % len(ways)]()


def pickled_adapters(rng, folder, _):
    """An adapter that is a pickle, alone or under the name of a safetensors file."""
    marker, glad = str(folder / "marker"), folder / "glad"
    (glad / convert.ADAPTER_TENSORS).unlink()
    bomb = Bomb(*rng.choice([(os.system, f"touch {marker}"), (open, marker, "w")]))
    write = rng.choice([torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
    write(bomb, glad / rng.choice([convert.ADAPTER_PICKLE, convert.ADAPTER_TENSORS]))


def adapters(rng, folder, n):
    """A PEFT folder with a hostile config or damaged tensors."""
    glad = folder / "glad"
    config, path = glad / convert.ADAPTER_CONFIG, glad / convert.ADAPTER_TENSORS
    text = config.read_text()
    values = json.loads(text)
    wrong = rng.choice(
        [
            {"r": rng.choice([None, 0, -4, 10**400, "4", 4.0, True, [4], 2**31])},
            {"lora_alpha": rng.choice([None, 0, 10**400, "4", [4], -1, 1e300])},
            {"rank_pattern": {"(o+)+$": 4}},
            {"alpha_pattern": {rng.choice(["(.*)*x", "(", "(" * 10**4, "a{99999999999}"]): 4}},
            {"alpha_pattern": {"o_proj": {}}},
            {"rank_pattern": "o_proj"},
            {"peft_type": rng.choice(["IA3", None, "a" * 10**5, ["LORA"]])},
            {"init_lora_weights": rng.choice(["pissa", [], {}, 7])},
            {"use_rslora": "a" * 10**5},
            {"base_model_name_or_path": [1]},
        ]
    )
    ways = [
        lambda: config.write_text("[" * 10**5),
        lambda: config.write_text(text[: rng.randrange(len(text) - 2)]),
        lambda: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
        *[lambda: config.write_text(json.dumps(values | wrong))] * 7,
    ]
    ways[n % len(ways)]()


KINDS = {
    kind.__name__: kind
    for kind in (
        header_bits,
        data_bits,
        truncations,
        header_lengths,
        shapes_and_offsets,
        surplus_and_missing,
        dtypes_and_values,
        names,
        configs,
        pickles,
        pickled_adapters,
        adapters,
    )
}


def good_files(folder, model):
    """A checkpoint of each router, and the published layout, that load."""
    for router in ("linear", "mlp"):
        made = tiny.checkpoint(
            model, ("q_proj", "o_proj"), ranks=(4, 2), router=router, router_hidden=8
        )
        mk.save_checkpoint(made, folder / router)
    made = tiny.checkpoint(model, ranks=(4, 4), router_hidden=8)
    convert.to_peft(made, folder / "official")
    router = {}
    for layer, module in enumerate(made.modules):
        for e, prefix in enumerate(("beta_", "alpha_")):
            for key in convert.ROUTER_TENSORS:
                values = made.tensors[f"{module}.router.{key}"][e].clone()
                router[f"model.routers.{layer}.{prefix}.{key}"] = values
    torch.save(router, folder / "official" / "router.pth")


def read(folder, model):
    """Read whatever `folder` holds, and attach it."""
    if (folder / checkpoint.CONFIG_FILE).is_file():
        mk.attach(model, folder)
    else:
        experts = {name: folder / name for name in ("glad", "unwill")}
        convert.from_peft(experts, architecture="LlamaForCausalLM")
        files = folder / "unwill", folder / "glad", folder / "router.pth"
        mk.attach(model, convert.from_official(*files))


def peak():
    """Of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(folder):
    """Every case; one line of JSON."""
    model = tiny.llama()
    good_files(folder / "good", model)
    for good in ("linear", "mlp", "official"):
        read(folder / "good" / good, model)
        mk.detach(model)
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    objects = [id(o) for o in (*model.modules(), *model.parameters())]
    warnings.simplefilter("error")
    before, reports = peak(), []
    for kind, make in KINDS.items():
        official = kind in ("pickles", "pickled_adapters", "adapters")
        for seed in range(CASES):
            rng, error = random.Random(f"{kind}{seed}"), None
            own = folder / f"{kind}{seed}"
            good = "official" if official else rng.choice(["linear", "mlp"])
            shutil.copytree(folder / "good" / good, own)
            make(rng, own, seed)
            try:
                read(own, model)
            except BaseException as raised:
                error = raised
            same = objects == [id(o) for o in (*model.modules(), *model.parameters())]
            same = same and all(torch.equal(p, values[n]) for n, p in model.named_parameters())
            report = {
                "case": f"{kind}{seed}",
                "error": type(error).__name__,
                "message": str(error),
                "unchanged": same,
                "ran": (own / "marker").exists(),
            }
            reports.append(report)
            shutil.rmtree(own)
            if not same:
                break
    return {"reports": reports, "grown_mb": peak() - before}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """What the subprocess says of all cases."""
    folder = tmp_path_factory.mktemp("malformed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_malformed", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_each_gives_one_clear_error_runs_nothing_and_changes_nothing(kind, batch):
    own = [r for r in batch["reports"] if r["case"].rstrip("0123456789") == kind]
    assert len(own) == CASES
    for report in own:
        assert report["error"] in ("ValueError", "TypeError"), report
        assert 0 < len(report["message"]) <= 600, report
        assert report["unchanged"], report
        assert not report["ran"], report


def test_no_case_takes_memory(batch):
    assert batch["grown_mb"] < 200


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(Path(sys.argv[1]))))
