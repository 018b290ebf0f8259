"""Train the MoGU of SmolLM2-135M that the demo uses: `make train-demo`."""

import argparse
import shutil
from pathlib import Path

import torch

from demo.smollm2 import CHECKPOINT, load_smollm2
from mogu_kernels.checkpoint import MoGUCheckpoint
from mogu_kernels.evaluation import sets
from mogu_kernels.training import TrainingConfig, load_config, train

RECIPE = Path("recipes/smollm2_v2.yaml")


def main() -> None:
    """Train, and put the checkpoint where the demo looks for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=Path, default=Path("out/train-demo"), help="kept between")
    folder = parser.parse_args().steps
    checkpoint = train_on_split(load_config(RECIPE), folder)
    shutil.copytree(folder / "checkpoint", CHECKPOINT, dirs_exist_ok=True)
    print(f"{CHECKPOINT}: {len(checkpoint.modules)} projections")
    for stage, metrics in checkpoint.config.provenance["metrics"].items():
        print(f"  {stage}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))


def train_on_split(config: TrainingConfig, folder: Path) -> MoGUCheckpoint:
    """Train on the standard split, with the hashes of its parts in the provenance."""
    torch.set_float32_matmul_precision("medium")  # oneDNN's GEMMs: twice as fast on some CPUs
    split = sets.split()
    model, tokenizer = load_smollm2()
    return train(
        config,
        model,
        tokenizer,
        split.train,
        folder,
        validation=split.validation,
        provenance={"data_sha256": split.sha256, "data_counts": split.counts},
    )


if __name__ == "__main__":
    main()
