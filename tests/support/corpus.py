"""A small corpus of generated documents of many lengths, and a configuration of a tiny run on it."""

from __future__ import annotations

import random
from pathlib import Path

from infini_train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LayoutConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> None:
    """Write text files of 20 to 400 words, drawn from a vocabulary of 300 random words."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(300)]
    for index in range(documents):
        count = int(20 * 20 ** rng.random())
        text = " ".join(rng.choice(words) + ("\n" if rng.random() < 0.1 else "") for _ in range(count))
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")


def small_run(folder: Path) -> RunConfig:
    """Return a run of a tiny model under `folder`: source text/, shards data/, run directory run/. Clipping is active."""
    return RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(
            num_layers=4,
            hidden_size=48,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=12,
            ffn_hidden_size=80,
            segment_length=16,
        ),
        data=DataConfig(source=str(folder / "text"), path=str(folder / "data"), vocab_size=512, held_out_fraction=0.15),
        layout=LayoutConfig(),
        training=TrainingConfig(steps=8, rows=4, micro_batches_per_window=4, windows_per_step=2),
        # A large ε. With a small one, Adam turns a rounding difference in a gradient near zero into a step as large as the
        # learning rate.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, clip_grad_norm=0.5, eps=1e-5),
        evaluation=EvaluationConfig(every=0, micro_batches=4),
        checkpoint=CheckpointConfig(every=100),
        logging=LoggingConfig(wandb="off"),
    )
