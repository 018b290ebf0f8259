"""The checkpoint: a folder with `mogu_config.json` and `mogu_model.safetensors`.

Everything is checked before anyone sees it, nothing is ever unpickled, and a save either happens as
a whole or leaves the folder as it was.
"""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mogu_kernels.router import fold_router

FORMAT_VERSION = 1
CONFIG_FILE = "mogu_config.json"
TENSORS_FILE = "mogu_model.safetensors"
MAX_EXPERTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoGUConfig:
    """What the tensors of a checkpoint mean.

    Attributes:
        base_model: id of the base model, such as "SmolLM2-135M-Instruct".
        architecture: its class, such as "LlamaForCausalLM".
        target_modules: last components of the routed modules' names, such as ("o_proj",).
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
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {self.format_version!r}, but this mogu_kernels reads "
                f"{FORMAT_VERSION}: update it, or save the checkpoint again"
            )
        for name, kinds in _FIELD_TYPES.items():
            _check_type(name, getattr(self, name), kinds)
        E = len(self.ranks)
        if not 1 <= E <= MAX_EXPERTS:
            raise ValueError(f"ranks={self.ranks}: take 1 to {MAX_EXPERTS} experts")
        for name in ("lora_alpha", "expert_names"):
            if len(getattr(self, name)) != E:
                raise ValueError(f"{name}={getattr(self, name)}, but ranks={self.ranks}: {E} each")
        if min(self.ranks) < 0 or max(self.ranks) < 1:
            raise ValueError(f"ranks={self.ranks}: none below 0, and at least one above")
        if not all(math.isfinite(alpha) for alpha in self.lora_alpha):
            raise ValueError(f"lora_alpha={self.lora_alpha}: take finite numbers")
        for name in ("expert_names", "target_modules"):
            names = getattr(self, name)
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{name}={names}: name each once, and at least one")
        if self.gate not in ("sigmoid", "softmax"):
            raise ValueError(f'gate={self.gate!r}: take "sigmoid" or "softmax"')
        if self.router not in ("linear", "mlp"):
            raise ValueError(f'router={self.router!r}: take "linear" or "mlp"')
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
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version is {version!r}, but this mogu_kernels reads {FORMAT_VERSION}: "
                "update it, or save the checkpoint again"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown keys in the config: {', '.join(unknown)}")
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
            ValueError: missing or surplus tensors, a wrong shape or dtype, NaN or Inf, values in
            the
                padding of an expert's rank, a module that is no target or a target without module.
        """
        expected = {f"{m}.{key}" for m in self.modules for key in self._shapes(m)}
        if surplus := sorted(set(self.tensors) - expected):
            raise ValueError(f"surplus tensors for router={self.config.router!r}: {_few(surplus)}")
        if missing := sorted(expected - set(self.tensors)):
            raise ValueError(f"missing tensors for router={self.config.router!r}: {_few(missing)}")
        kinds = {module.rpartition(".")[2] for module in self.modules}
        if kinds != set(self.config.target_modules):
            raise ValueError(
                f"target_modules={self.config.target_modules}, but the tensors are for "
                f"{tuple(sorted(kinds))}"
            )
        for module in self.modules:
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
                raise ValueError(f"{name} is {list(tensor.shape)}, but the config asks for {shape}")
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype}: take a floating-point dtype")
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.detach().cpu().contiguous() for key, t in checkpoint.tensors.items()}
    with _replacing(folder / TENSORS_FILE) as path:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with _replacing(folder / CONFIG_FILE) as path:
        path.write_text(json.dumps(checkpoint.config.to_dict(), indent=2) + "\n")


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
    try:
        values = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG_FILE} holds a {type(values).__name__}, not an object")
    config = MoGUConfig.from_dict(values)
    path = folder / TENSORS_FILE
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size:,} bytes: {error}): copy it again"
        ) from error
    checkpoint = MoGUCheckpoint(config, tensors)
    checkpoint.validate()
    return checkpoint


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
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
        raise TypeError(f"{name}={value!r}: take {plural}{kind}")


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
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split(".")]


def _few(names: list[str]) -> str:
    """The first three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
