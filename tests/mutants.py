"""Kernels with one fault each, for the tests to find."""

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mogu_kernels import kernels, launch

FOLDER = Path(kernels.__file__).parent
GEMMS = ("fused", "gated_linear", "one_launch")  # x and weight by pointers, one accumulator
ROUTERS = ("fused", "shrink_gate")
ALL = (*GEMMS, "shrink_gate")
EPILOGUES = ("fused", "epilogue", "persistent_linear")
ORDER = (
    "gates",
    "tiles",
    "epilogue",
    "fused",
    "shrink_gate",
    "gated_linear",
    "persistent_linear",
    "one_launch",
    "gated_mlp",
    "gated_expand",
    "backward_gates",
    "backward_input",
    "backward_weights",
)

# file, what stands there, what the mutant has instead
FAULTS = {
    "experts-swapped": ("gates", "(experts == e)", "(experts == E - 1 - e)"),
    "gate-ignored": ("gates", "rank_gate * SCALING[e]", "rank_gate * 0.0 + SCALING[e]"),
    "scaling-ignored": ("gates", "rank_gate * SCALING[e]", "rank_gate"),
    "gate-bias-ignored": ("gates", "gate_bias.to(tl.float32)[None, :]", "0.0"),
    "gate-bias-stride-hard-coded": ("gates", "experts * stride_c", "experts"),
    "low-part-of-router-dropped": (
        "gates",
        "(columns // EXPERT_COLUMNS < TERMS)",
        "(columns // EXPERT_COLUMNS < 1)",
    ),
    "router-stride-hard-coded": ("gates", "* stride_ue", "* 1"),
    "softmax-over-absent-experts": ("gates", '-float("inf")', "0.0"),
    "softmax-not-normalised": ("gates", "exps / tl.sum(exps, axis=1)[:, None]", "exps"),
    "absent-experts-have-gates": (
        "gates",
        "return tl.where((experts < E)[None, :], gates, 0.0)",
        "return gates",
    ),
    "rank-of-the-wrong-expert": ("gates", "columns // RANK == e", "columns % E == e"),
    "total-ignored": (EPILOGUES, "acc *= total[:, None]", "acc *= 1.0"),
    "bias-dropped": ("tiles", "acc += bias", "acc += 0 * bias"),
    "bias-stride-hard-coded": ("tiles", "offs_n * stride_bias", "offs_n"),
    "bias-of-the-wrong-columns": ("tiles", "offs_n * stride_bias", "0 * offs_n"),
    "mask-m-dropped-on-x": (
        ALL,
        "x_ptrs, mask=mask_m[:, None] & mask_k[None, :]",
        "x_ptrs, mask=mask_k[None, :]",
    ),
    "mask-k-dropped-on-x": (
        ALL,
        "x_ptrs, mask=mask_m[:, None] & mask_k[None, :]",
        "x_ptrs, mask=mask_m[:, None]",
    ),
    "mask-k-dropped-on-weight": (
        GEMMS,
        "w_ptrs, mask=mask_k[:, None] & mask_n[None, :]",
        "w_ptrs, mask=mask_n[None, :]",
    ),
    "mask-n-dropped-on-weight": (
        GEMMS,
        "w_ptrs, mask=mask_k[:, None] & mask_n[None, :]",
        "w_ptrs, mask=mask_k[:, None]",
    ),
    "mask-k-dropped-on-lora-A": (
        ROUTERS,
        "a_ptrs, mask=mask_k[:, None] & mask_r[None, :]",
        "a_ptrs, mask=mask_r[None, :]",
    ),
    "mask-r-dropped-on-lora-A": (
        ROUTERS,
        "a_ptrs, mask=mask_k[:, None] & mask_r[None, :]",
        "a_ptrs, mask=mask_k[:, None]",
    ),
    "mask-k-dropped-on-router": (
        ROUTERS,
        "u_ptrs, mask=mask_k[:, None] & mask_u[None, :]",
        "u_ptrs, mask=mask_u[None, :]",
    ),
    "mask-experts-dropped-on-router": (
        ROUTERS,
        "u_ptrs, mask=mask_k[:, None] & mask_u[None, :]",
        "u_ptrs, mask=mask_k[:, None]",
    ),
    "mask-r-dropped-on-lora-B": (
        ("fused", "epilogue"),
        "b_ptrs, mask=mask_r[:, None] & mask_n[None, :]",
        "b_ptrs, mask=mask_n[None, :]",
    ),
    "mask-n-dropped-on-lora-B": (
        ("fused", "epilogue"),
        "b_ptrs, mask=mask_r[:, None] & mask_n[None, :]",
        "b_ptrs, mask=mask_r[:, None]",
    ),
    "mask-m-dropped-on-y": (
        GEMMS,
        "mask=mask_m[:, None] & mask_n[None, :])",
        "mask=mask_n[None, :])",
    ),
    "mask-n-dropped-on-y": (
        GEMMS,
        "mask=mask_m[:, None] & mask_n[None, :])",
        "mask=mask_m[:, None])",
    ),
    "a-column-of-y-not-stored": (
        GEMMS,
        "mask=mask_m[:, None] & mask_n[None, :])",
        "mask=mask_m[:, None] & (mask_n & (offs_n != 3))[None, :])",
    ),
    "a-gate-column-not-stored": (
        ROUTERS,
        "(experts < E)[None, :] & (pid",
        "(experts < E - 1)[None, :] & (pid",
    ),
    "stride-of-x-hard-coded": (ALL, "x_ptrs += BLOCK_K * stride_xk", "x_ptrs += BLOCK_K"),
    "stride-of-weight-hard-coded": (GEMMS, "* stride_wn", "* K"),
    "stride-of-lora-A-hard-coded": (ROUTERS, "* stride_ae", "* (RANK * K)"),
    "stride-of-lora-B-hard-coded": (("fused", "epilogue"), "* stride_be", "* (RANK * N)"),
    "last-k-tile-skipped": (ALL, "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K + 1, BLOCK_K)"),
    "accumulates-in-half": (
        GEMMS,
        'acc = tl.dot(x, w, acc, input_precision="ieee")',
        "acc = tl.dot(x, w, acc).to(x.dtype).to(tl.float32)",
    ),
    "routed-mask-ignored": (ROUTERS, "if HAS_ROUTED:", "if False:"),
    "routed-mask-on-total-only": (
        ROUTERS,
        "shrunk = tl.where(routed[:, None], shrunk, 0.0)",
        "shrunk = shrunk",
    ),
    "routed-mask-on-ranks-only": (ROUTERS, "total = tl.where(routed, total, 1.0)", "total = total"),
    "rows-of-tiles-lost": ("tiles", "min(tiles_m - group * GROUP_M, GROUP_M)", "GROUP_M"),
    "last-chunk-of-ranks-skipped": (
        "epilogue",
        "static_range(0, E * RANK, BLOCK_R)",
        "static_range(0, E * RANK - BLOCK_R + 1, BLOCK_R)",
    ),
    "last-chunk-of-ranks-skipped-by-descriptor": (
        "persistent_linear",
        "static_range(0, RANK_COLUMNS, BLOCK_R)",
        "static_range(0, RANK_COLUMNS - BLOCK_R + 1, BLOCK_R)",
    ),
    "total-of-the-wrong-rows": ("epilogue", "offs_m * stride_total", "0 * offs_m"),
    "last-tile-lost": (
        "persistent_linear",
        "tl.range(tl.program_id(0), tiles,",
        "tl.range(tl.program_id(0), tiles - 1,",
    ),
    "first-tile-only": ("persistent_linear", "tl.num_programs(0), flatten", "tiles, flatten"),
    "last-k-tile-skipped-by-descriptor": (
        "persistent_linear",
        "range(0, K, BLOCK_K)",
        "range(0, K - BLOCK_K + 1, BLOCK_K)",
    ),
    "mask-m-dropped-on-total": (
        "persistent_linear",
        "stride_total, mask=offs_m < M",
        "stride_total, mask=offs_m < M + BLOCK_M",
    ),
    "weight-rows-of-the-wrong-tile": (
        "persistent_linear",
        "weight_desc.load([column, k])",
        "weight_desc.load([row, k])",
    ),
    "experts-of-the-first-projection-for-all": (
        "shrink_gate",
        "pointers[p], pointer)",
        "pointers[0], pointer)",
    ),
    "shrunk-of-all-projections-in-one-place": ("shrink_gate", "projection * stride_sp", "0"),
    "total-of-all-projections-in-one-place": ("shrink_gate", "projection * stride_tp", "0"),
    "gates-of-all-projections-in-one-place": ("shrink_gate", "projection * stride_gp", "0"),
    "flag-not-waited-for": ("one_launch", 'sem="acquire") < CHUNKS', 'sem="acquire") < 0'),
    "flag-not-acquired": ("one_launch", '0, sem="acquire") < CHUNKS', '0, sem="relaxed") < CHUNKS'),
    "flag-not-released": ("one_launch", '1, sem="release")', '1, sem="relaxed")'),
    "flag-of-the-next-rows": ("one_launch", "flags_ptr + pid_m", "flags_ptr + pid_m + 1"),
    "flag-not-set-back": ("one_launch", "tl.atomic_xchg(flag_ptr, 0", "tl.atomic_xchg(flag_ptr, 1"),
    "gate-and-up-swapped": (
        "gated_mlp",
        "activate(acc_0, ACTIVATION) * acc_1",
        "activate(acc_1, ACTIVATION) * acc_0",
    ),
    "activation-dropped": ("gated_mlp", "activate(acc_0, ACTIVATION) * acc_1", "acc_0 * acc_1"),
    "up-proj-has-the-ranks-of-gate-proj": ("gated_mlp", "shrunk_ptr + stride_sj", "shrunk_ptr"),
    "up-proj-has-the-total-of-gate-proj": ("gated_mlp", "total_ptr + stride_tj", "total_ptr"),
    "up-proj-has-the-bias-of-gate-proj": (
        "gated_mlp",
        "acc_1 = accumulator(bias_1_ptr",
        "acc_1 = accumulator(bias_0_ptr",
    ),
    "up-proj-has-the-lora-B-of-gate-proj": (
        "gated_mlp",
        "stride_tj,\n        lora_B_1_ptr",
        "stride_tj,\n        lora_B_0_ptr",
    ),
    "up-proj-has-the-weight-of-gate-proj": (
        "gated_mlp",
        "weight_1_ptr + w_offsets",
        "weight_0_ptr + w_offsets",
    ),
    "mask-m-dropped-on-x-of-the-mlp": (
        "gated_mlp",
        "x_ptrs, mask=mask_m[:, None] & mask_k[None, :]",
        "x_ptrs, mask=mask_k[None, :]",
    ),
    "mask-k-dropped-on-gate-proj": (
        "gated_mlp",
        "w_0_ptrs, mask=mask_k[:, None] & mask_n[None, :]",
        "w_0_ptrs, mask=mask_n[None, :]",
    ),
    "mask-n-dropped-on-up-proj": (
        "gated_mlp",
        "w_1_ptrs, mask=mask_k[:, None] & mask_n[None, :]",
        "w_1_ptrs, mask=mask_k[:, None]",
    ),
    "last-k-tile-skipped-in-the-mlp": (
        "gated_mlp",
        "range(0, K, BLOCK_K)",
        "range(0, K - BLOCK_K + 1, BLOCK_K)",
    ),
    "mask-n-dropped-on-y-of-the-mlp": (
        "gated_mlp",
        "mask=mask_m[:, None] & mask_n[None, :])",
        "mask=mask_m[:, None])",
    ),
    "mask-m-dropped-on-foreign-y": (
        "gated_expand",
        "mask_m[:, None] & mask_n[None, :]",
        "mask_n[None, :]",
    ),
    "mask-n-dropped-on-foreign-y": (
        "gated_expand",
        "mask_m[:, None] & mask_n[None, :]",
        "mask_m[:, None]",
    ),
    "bias-of-a-foreign-base-dropped": ("gated_expand", "y += accumulator", "accumulator"),
    "stride-of-foreign-y-hard-coded": ("gated_expand", "* stride_ym", "* N"),
}

# of the backward's kernels, found by the battery in test_backward.py
BACKWARD_FAULTS = {
    "gate-ignored-backward": (
        "backward_gates",
        "factors = rank_factors(gates,",
        "factors = rank_factors(gates * 0.0 + 1.0,",
    ),
    "scaling-ignored-backward": ("backward_gates", "axis=1) * SCALING[e]", "axis=1)"),
    "slope-of-the-wrong-expert": (
        "backward_gates",
        "columns // RANK == e)[None, :], v * ranks",
        "columns // RANK == E - 1 - e)[None, :], v * ranks",
    ),
    "mask-ignored-backward": (
        "backward_gates",
        "gates = tl.where(routed[:, None], gates, 0.0)",
        "gates = gates",
    ),
    "mask-ignored-on-total-backward": (
        "backward_gates",
        "total = tl.where(routed, total, 1.0)",
        "total = total",
    ),
    "mask-ignored-on-slopes": (
        "backward_gates",
        "slopes = tl.where(routed[:, None], slopes, 0.0)",
        "slopes = slopes",
    ),
    "mask-on-recorded-gates": (
        "backward_gates",
        "mask=mask_e, other=0.0)\n    tl.store(total_ptr",
        "mask=mask_e & routed[:, None], other=0.0)\n    tl.store(total_ptr",
    ),
    "gradient-of-recorded-gates-dropped": ("backward_gates", "if HAS_GRAD_GATES:", "if False:"),
    "bias-dropped-from-slopes": ("backward_gates", "if HAS_BIAS and", "if False and"),
    "bias-of-the-first-columns-only": (
        "backward_gates",
        "(n + offs_n) * stride_bias",
        "offs_n * stride_bias",
    ),
    "mask-n-dropped-on-grad-y": (
        "backward_gates",
        "dy = tl.load(y_ptrs, mask=mask_m[:, None] & mask_n[None, :]",
        "dy = tl.load(y_ptrs, mask=mask_m[:, None]",
    ),
    "slope-of-the-logit-forgotten": ("backward_gates", "* gates * (1.0 - gates)", "* gates"),
    "softmax-not-centred": (
        "backward_gates",
        "slopes - tl.sum(gates * slopes, axis=1)[:, None]",
        "slopes",
    ),
    "share-of-the-base-of-one-tile": ("backward_gates", "(parts < SHARES)", "(parts < 1)"),
    "share-of-the-base-where-not-routed": (
        "backward_gates",
        "share = tl.where(routed, share, 0.0)",
        "share = share",
    ),
    "experts-swapped-on-the-way-to-x": (
        "backward_gates",
        "experts[:, None] * stride_ue",
        "(E - 1 - experts)[:, None] * stride_ue",
    ),
    "last-step-over-N-skipped": (
        "backward_input",
        "range(0, N, BLOCK_K)",
        "range(0, N - BLOCK_K + 1, BLOCK_K)",
    ),
    "mask-n-dropped-on-turned-weight": (
        "backward_input",
        "w_ptrs, mask=mask_k[:, None] & mask_n[None, :]",
        "w_ptrs, mask=mask_k[:, None]",
    ),
    "mask-n-dropped-on-grad-x": (
        "backward_input",
        "acc.to(grad_x_ptr.dtype.element_ty), mask=mask)",
        "acc.to(grad_x_ptr.dtype.element_ty), mask=mask_m[:, None])",
    ),
    "stride-of-turned-weight-hard-coded": ("backward_input", "* stride_wn", "* K"),
    "x-of-the-wrong-columns": (
        "backward_input",
        "stride_xm + offs_n[None, :]",
        "stride_xm + (offs_n % BLOCK_N)[None, :]",
    ),
    "shares-of-all-tiles-in-one-place": ("backward_input", "pid_n.to(tl.int64) * M", "0 * M"),
    "softmax-routers-do-not-reach-x": ("backward_input", "if SOFTMAX:\n", "if False:\n"),
    "gate-ignored-in-grad-B": (
        "backward_weights",
        "gated_ranks_ptr,\n                grad_y_ptr",
        "grad_ranks_ptr,\n                grad_y_ptr",
    ),
    "experts-swapped-in-the-sums": (
        "backward_weights",
        "(offs_r // RANK) * stride_oe",
        "(E - 1 - offs_r // RANK) * stride_oe",
    ),
    "last-tokens-skipped": (
        "backward_weights",
        "range(0, M, BLOCK_M)",
        "range(0, M - BLOCK_M + 1, BLOCK_M)",
    ),
    "mask-m-dropped-on-the-sums": (
        "backward_weights",
        "ranks_ptrs, mask=mask_m[:, None] & mask_r[None, :]",
        "ranks_ptrs, mask=mask_r[None, :]",
    ),
    "gradient-of-the-gate-bias-lost": (
        "backward_weights",
        "tl.sum(gradients, axis=0)",
        "tl.sum(gradients, axis=0) * 0.0",
    ),
    "sigmoid-routers-do-not-reach-x": (
        "backward_weights",
        "if WANT_X and not SOFTMAX:",
        "if False:",
    ),
    "stride-of-grad-u-wrong": (
        "backward_weights",
        "u_ptrs = grad_u_ptr + experts[None, :] * K",
        "u_ptrs = grad_u_ptr + experts[None, :] * (K + 1)",
    ),
}


@contextlib.contextmanager
def mutant(fault: str, file: str) -> Iterator[None]:
    """`launch` uses kernels in which `file` has the fault."""
    _, old, new = (FAULTS | BACKWARD_FAULTS)[fault]
    source = (FOLDER / f"{file}.py").read_text()
    assert old in source, f"{fault}: {file}.py no longer has {old!r}"
    names = [name for name in vars(launch) if name.endswith("_kernel")]
    originals = {name: getattr(launch, name) for name in names}
    # the interpreter reads a kernel's source again when it is first launched
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / f"{file}.py"
        changed.write_text(source.replace(old, new))
        fresh = _rebuilt(file, changed)
        try:
            for name in names:
                setattr(launch, name, getattr(fresh[name.removesuffix("_kernel")], name))
            yield
        finally:
            for name, kernel in originals.items():
                setattr(launch, name, kernel)


def files_of(fault: str) -> tuple[str, ...]:
    """The files that a fault is put into, one mutant each."""
    where = (FAULTS | BACKWARD_FAULTS)[fault][0]
    return (where,) if isinstance(where, str) else where


def _rebuilt(file: str, changed: Path) -> dict:
    """All kernel modules anew, in the order of their imports, one of them from `changed`."""
    fresh, kept = {}, {}
    try:
        for name in ORDER:
            full = f"mogu_kernels.kernels.{name}"
            path = changed if name == file else FOLDER / f"{name}.py"
            spec = importlib.util.spec_from_file_location(full, path)
            module = importlib.util.module_from_spec(spec)
            kept[full], sys.modules[full] = sys.modules[full], module
            spec.loader.exec_module(module)
            fresh[name] = module
    finally:
        sys.modules.update(kept)
    return fresh
