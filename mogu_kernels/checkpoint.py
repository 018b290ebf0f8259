"""The checkpoint: a folder with `mogu_config.json` and `mogu_model.safetensors`.

Everything is checked before anyone sees it, nothing is ever unpickled, and a save either happens as
a whole or leaves the folder as it was.
"""

import contextlib
import dataclasses
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mogu_kernels.architectures import is_target
from mogu_kernels.router import fold_router

FORMAT_VERSION = 1
CONFIG_FILE = "mogu_config.json"
TENSORS_FILE = "mogu_model.safetensors"
MAX_EXPERTS = 8
MAX_SIZE = 2**31 - 1  # of any integer in a config
MAX_CONFIG_BYTES = 2**20  # a config has a few hundred; parsed JSON takes twenty times its file
MAX_TARGETS = 1000
MAX_NAME = 200  # characters of a tensor's name
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoGUConfig:
    """What the tensors of a checkpoint mean.

    Attributes:
        base_model: id of the base model, such as "SmolLM2-135M-Instruct".
        architecture: its class, such as "LlamaForCausalLM".
        target_modules: ends of the routed modules' names, such as ("o_proj",), or patterns for
            whole names, such as ("model.layers.*.mixer.out_proj",).
        ranks: one per expert; the tensors are padded with zeros to the largest.
        lora_alpha: one per expert.
        gate: "sigmoid" (as published) or "softmax".
        router: "mlp" (the published three linears) or "linear" (folded).
        router_hidden: width of the "mlp" router.
        routed_tokens: answer tokens that are routed; None routes all.
        expert_names: one per expert; in the published setting glad (usable) and unwill (safe).
        rslora: scaling is lora_alpha / sqrt(rank), not lora_alpha / rank.
        provenance: how it was trained, any JSON.
        format_version: of the folder.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range, or lists of different lengths.
    """

    base_model: str
    architecture: str
    target_modules: tuple[str, ...]
    ranks: tuple[int, ...]
    lora_alpha: tuple[float, ...]
    gate: str = "sigmoid"
    router: str = "linear"
    router_hidden: int = 512
    routed_tokens: int | None = 5
    expert_names: tuple[str, ...] = ("glad", "unwill")
    rslora: bool = False
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        """Refuse what cannot be meant, with the value."""
        _check_version(self.format_version)
        for name, kinds in _FIELD_TYPES.items():
            _check_type(name, getattr(self, name), kinds)
        E = len(self.ranks)
        if not 1 <= E <= MAX_EXPERTS:
            raise ValueError(f"ranks={short(self.ranks)}: take 1 to {MAX_EXPERTS} experts")
        for name in ("lora_alpha", "expert_names"):
            if len(getattr(self, name)) != E:
                raise ValueError(
                    f"{name}={short(getattr(self, name))}, but ranks={self.ranks}: {E} each"
                )
        if min(self.ranks) < 0 or max(self.ranks) < 1:
            raise ValueError(f"ranks={self.ranks}: none below 0, and at least one above")
        if not all(abs(alpha) <= _LARGEST for alpha in self.lora_alpha):  # NaN is not either
            raise ValueError(f"lora_alpha={short(self.lora_alpha)}: take finite fp32 numbers")
        for name in ("expert_names", "target_modules"):
            names = getattr(self, name)
            if not 1 <= len(names) <= MAX_TARGETS or len(set(names)) != len(names):
                raise ValueError(f"{name}={short(names)}: name each once, and at least one")
        # a name of an expert becomes a folder, that of a target meets module names
        if not all(_WORD.fullmatch(name) for name in self.expert_names):
            raise ValueError(
                f"expert_names={short(self.expert_names)}: take up to 64 letters, digits, _ and -"
            )
        if not all(_TARGET.fullmatch(target) for target in self.target_modules):
            raise ValueError(
                f"target_modules={short(self.target_modules)}: take ends of module names, or "
                "patterns with *"
            )
        if not _WORD.fullmatch(self.architecture):
            raise ValueError(
                f"architecture={short(self.architecture)}: take the name of a class, such as "
                "LlamaForCausalLM"
            )
        if self.gate not in ("sigmoid", "softmax"):
            raise ValueError(f'gate={short(self.gate)}: take "sigmoid" or "softmax"')
        if self.router not in ("linear", "mlp"):
            raise ValueError(f'router={short(self.router)}: take "linear" or "mlp"')
        if self.router_hidden < 1:
            raise ValueError(f"router_hidden={self.router_hidden}: take at least 1")
        if self.routed_tokens is not None and self.routed_tokens < 0:
            raise ValueError(f"routed_tokens={self.routed_tokens}: take 0 or more, or None for all")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """The largest rank, to which the stacked tensors are padded."""
        return max(self.ranks)

    @property
    def scaling(self) -> tuple[float, ...]:
        """`lora_alpha / rank` of each expert (of its own rank; 0 for an expert without ranks)."""
        return tuple(
            0.0 if rank == 0 else alpha / (rank**0.5 if self.rslora else rank)
            for rank, alpha in zip(self.ranks, self.lora_alpha, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MoGUConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown format version, unknown or missing keys.
            TypeError: a value of the wrong type.
        """
        _check_version(values.get("format_version"))
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown keys in the config: {_few(unknown)}")
        needed = {
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        }
        if missing := sorted(needed - set(values)):
            raise ValueError(f"keys missing in the config: {', '.join(missing)}")
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**arguments)


@dataclasses.dataclass
class MoGUCheckpoint:
    """A config and its tensors by full name.

    For every routed module `m`: `m.lora_A` [E, rank, in], `m.lora_B` [E, out, rank], and for the
    "linear" router `m.gate_weight` [E, in] and `m.gate_bias` [E] in fp32, for the "mlp" router
    `m.router.linear_0.weight` [E, H, in], `m.router.linear_1.weight` [E, in, H],
    `m.router.linear_1.bias` [E, in], `m.router.linear_2.weight` [E, 1, in],
    `m.router.linear_2.bias` [E, 1].
    """

    config: MoGUConfig
    tensors: dict[str, Tensor]

    @property
    def modules(self) -> list[str]:
        """Names of the routed modules, sorted as layers are (2 before 10)."""
        names = {key.removesuffix(".lora_A") for key in self.tensors if key.endswith(".lora_A")}
        return sorted(names, key=_natural)

    def module_tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of one module, without its name."""
        prefix = module + "."
        return {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }

    def folded(self, dtype: torch.dtype = torch.float32) -> "MoGUCheckpoint":
        """The same with "mlp" routers folded, exactly, into vectors of `dtype`."""
        if self.config.router == "linear":
            return self
        tensors = {}
        for module in self.modules:
            own = self.module_tensors(module)
            linears = {
                key.removeprefix("router.").replace(".", "_"): tensor
                for key, tensor in own.items()
                if key.startswith("router.")
            }
            gate_weight, gate_bias = fold_router(**linears, dtype=dtype)
            tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = own["lora_A"], own["lora_B"]
            tensors[f"{module}.gate_weight"] = gate_weight
            tensors[f"{module}.gate_bias"] = gate_bias
        return MoGUCheckpoint(dataclasses.replace(self.config, router="linear"), tensors)

    def validate(self) -> None:
        """Check every tensor against the config.

        Raises:
            ValueError: a name that no module can have, missing or surplus tensors, a wrong shape
                or dtype, NaN or Inf, values in the padding of an expert's rank, a module that is
                no target or a target without module.
        """
        for name in self.tensors:
            if len(name) > MAX_NAME or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{short(name)} cannot be a tensor's name: take at most {MAX_NAME} letters, "
                    "digits, _ and -, with single dots between"
                )
        expected = {f"{m}.{key}" for m in self.modules for key in self._shapes(m)}
        if surplus := sorted(set(self.tensors) - expected):
            raise ValueError(f"surplus tensors for router={self.config.router!r}: {_few(surplus)}")
        if missing := sorted(expected - set(self.tensors)):
            raise ValueError(f"missing tensors for router={self.config.router!r}: {_few(missing)}")
        modules, targets = self.modules, self.config.target_modules
        if not all(is_target(module, targets) for module in modules) or not all(
            any(is_target(module, [target]) for module in modules) for target in targets
        ):
            kinds = sorted({module.rpartition(".")[2] for module in modules})
            raise ValueError(
                f"target_modules={short(targets)}, but the tensors are for {short(tuple(kinds))}"
            )
        for module in modules:
            self._validate_module(module)

    def _shapes(self, module: str) -> dict[str, list[int]]:
        """The expected shape of each tensor of one module."""
        E, rank, H = self.config.num_experts, self.config.rank, self.config.router_hidden
        lora_A = self.tensors[f"{module}.lora_A"]
        lora_B = self.tensors.get(f"{module}.lora_B", lora_A)
        width = lora_A.shape[-1] if lora_A.ndim else 0
        out = lora_B.shape[1] if lora_B.ndim > 1 else 0
        shapes = {"lora_A": [E, rank, width], "lora_B": [E, out, rank]}
        if self.config.router == "linear":
            return shapes | {"gate_weight": [E, width], "gate_bias": [E]}
        return shapes | {
            "router.linear_0.weight": [E, H, width],
            "router.linear_1.weight": [E, width, H],
            "router.linear_1.bias": [E, width],
            "router.linear_2.weight": [E, 1, width],
            "router.linear_2.bias": [E, 1],
        }

    def _validate_module(self, module: str) -> None:
        tensors = self.module_tensors(module)
        for key, shape in self._shapes(module).items():
            tensor, name = tensors[key], f"{module}.{key}"
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"{name} is {short(list(tensor.shape))}, but the config asks for {shape}"
                )
            if tensor.numel() == 0:
                raise ValueError(f"{name} is {shape}: a projection has at least one feature")
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name} is {tensor.dtype}: take {_dtype_names()}")
            if key.startswith("gate_") and tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype}: folded routers are kept in fp32")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has NaN or Inf")
        if tensors["lora_A"].dtype != tensors["lora_B"].dtype:
            raise ValueError(
                f"{module}: lora_A is {tensors['lora_A'].dtype} but lora_B is "
                f"{tensors['lora_B'].dtype}"
            )
        for e, rank in enumerate(self.config.ranks):
            if tensors["lora_A"][e, rank:].any() or tensors["lora_B"][e, :, rank:].any():
                raise ValueError(
                    f"{module}: expert {self.config.expert_names[e]!r} has rank {rank}, but there "
                    "are values beyond it: pad with zeros"
                )


def save_checkpoint(checkpoint: MoGUCheckpoint, folder: str | os.PathLike) -> None:
    """Write a checkpoint folder; each file is replaced atomically, the config last.

    Raises:
        ValueError: the checkpoint contradicts itself; nothing has been written.
    """
    checkpoint.validate()
    write_folder(
        Path(folder),
        {TENSORS_FILE: checkpoint.tensors, CONFIG_FILE: checkpoint.config.to_dict()},
    )


def load_checkpoint(folder: str | os.PathLike) -> MoGUCheckpoint:
    """Read and check a checkpoint folder.

    Raises:
        ValueError: a file is missing or damaged, or the tensors contradict the config.
        TypeError: a config value of the wrong type.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}: take a folder that `save_checkpoint` wrote (pickled "
                "files are never read; convert them first)"
            )
    config = MoGUConfig.from_dict(read_json(folder / CONFIG_FILE))
    checkpoint = MoGUCheckpoint(config, read_tensors(folder / TENSORS_FILE))
    checkpoint.validate()
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; stricter than `json.loads`, which lets the last of two keys win.

    Raises:
        ValueError: not JSON, too large or too deep, NaN or Infinity, a key twice, or no object.
    """
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes: a config has at most {MAX_CONFIG_BYTES:,}"
        )
    try:
        values = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
        )
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply: no config needs that") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {_cut(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, MemoryError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size:,} bytes: {_cut(error)}): copy it again"
        ) from error


def write_folder(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write JSON and safetensors files by name, in that order, each replaced atomically.

    Raises:
        ValueError: a config that JSON cannot hold; nothing has been written.
    """
    texts = {name: _to_json(name, own) for name, own in files.items() if name.endswith(".json")}
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in files.items():
        with _replacing(folder / name) as path:
            if name in texts:
                path.write_text(texts[name], encoding="utf-8")
            else:
                tensors = {key: t.detach().cpu().contiguous() for key, t in own.items()}
                safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def short(value: Any) -> str:
    """`repr`, cut: an error must stay readable whatever a file holds."""
    text = _SHORT.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxtuple = _SHORT.maxlist = MAX_EXPERTS
_SHORT.maxlevel = 3

_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TARGET = re.compile(r"[A-Za-z0-9_*-]+(\.[A-Za-z0-9_*-]+)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+")
_LARGEST = torch.finfo(torch.float32).max

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "base_model": (str,),
    "architecture": (str,),
    "target_modules": (tuple, str),
    "ranks": (tuple, int),
    "lora_alpha": (tuple, int, float),
    "gate": (str,),
    "router": (str,),
    "router_hidden": (int,),
    "routed_tokens": (int, type(None)),
    "expert_names": (tuple, str),
    "rslora": (bool,),
    "provenance": (dict,),
}


def _check_type(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """`kinds` starting with tuple: a tuple of the others."""
    values = value if kinds[0] is tuple and isinstance(value, tuple) else (value,)
    allowed = kinds[1:] if kinds[0] is tuple and isinstance(value, tuple) else kinds
    wrong = kinds[0] is tuple and not isinstance(value, tuple)
    if wrong or any(
        not isinstance(v, allowed) or (isinstance(v, bool) and bool not in allowed) for v in values
    ):
        kind = " or ".join(k.__name__ for k in (kinds[1:] if kinds[0] is tuple else kinds))
        plural = "a tuple of " if kinds[0] is tuple else ""
        raise TypeError(f"{name}={short(value)}: take {plural}{kind}")
    if float not in kinds and any(isinstance(v, int) and v > MAX_SIZE for v in values):
        raise ValueError(f"{name}={short(value)}: take at most {MAX_SIZE:,}")


def _check_version(version: Any) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {short(version)}, but this mogu_kernels reads {FORMAT_VERSION}: "
            "update it, or save the checkpoint again"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {short(twice)} stands there twice")
    return values


def _no_constant(name: str) -> None:
    """NaN and Infinity are no JSON, though Python reads and writes them."""
    raise ValueError(f"{name} is no number in JSON")


def _to_json(name: str, values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {_cut(error)}") from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place once it is on the disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers by value, words by letter."""
    parts = name.split(".")
    return [(0, int(p), "") if p.isascii() and p.isdigit() else (1, 0, p) for p in parts]


def _few(names: list[str]) -> str:
    """The first three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(short(name).strip("'") for name in names[:3]) + more


def _cut(error: Exception) -> str:
    """What another library says, without the part of the file it may quote."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _dtype_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
