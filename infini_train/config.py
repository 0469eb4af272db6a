"""Typed configuration of a run. Nothing else in the package reads YAML, and this file imports neither torch nor a library
that needs one, so a wrong value is refused within a second and before any process group exists."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from infini_train.errors import UserError


@dataclass(kw_only=True)
class ModelConfig:
    """The transformer and its attention."""

    attention: Literal["infini", "full", "local"] = "infini"
    """infini: segment-local attention plus compressive memory; local: segment-local attention alone; full: causal attention
    over a whole micro-batch (its context is segments_per_micro_batch × segment_length tokens)."""
    num_layers: int = 12
    """Transformer layers, over all pipeline stages."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_attention_heads: int = 12
    """Query heads per layer."""
    num_query_groups: int = 4
    """Key/value heads per layer; divides num_attention_heads."""
    head_dim: int = 64
    """Width of one head (d_k = d_v); even, because rotary embedding rotates halves."""
    ffn_hidden_size: int = 2048
    """Inner width of the SwiGLU feed-forward layer."""
    segment_length: int = 2048
    """Tokens per segment: the scope of local attention and the unit of one memory update."""
    update_rule: Literal["linear", "delta"] = "linear"
    """Memory update: linear (Eq. 8 of the paper) or delta (Eq. 9)."""
    first_segment: Literal["paper", "local_only"] = "paper"
    """Mix in a document's first segment, where the memory is empty: paper scales local attention by 1 - sigmoid(β);
    local_only leaves it unscaled."""
    memory_eps: float = 1e-6
    """ε added to the memory's normaliser σ(Q) z."""
    initial_gate: float = 0.0
    """β of every head at the start, before the sigmoid."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies; positions count from the segment's start."""
    norm_eps: float = 1e-5
    """ε of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; layers that write to the residual stream use init_std / sqrt(2 num_layers)."""
    tie_embeddings: bool = False
    """Share input embedding and output matrix; needs pipeline_parallel_size 1."""


@dataclass(kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes shards."""

    source: str = "stdlib"
    """Text for `prepare`: a folder of .txt/.md/.py files, a .jsonl, .jsonl.gz or .jsonl.zst file (or a folder of them), a
    Hugging Face dataset folder saved on disk, or the word stdlib for the source files of Python's standard library."""
    text_key: str = "text"
    """Field that holds the text in .jsonl records and dataset rows."""
    path: str = "runs/data"
    """Folder of tokenizer, shards and index: written by `prepare`, read by everything else."""
    vocab_size: int = 32000
    """Size of the SentencePiece vocabulary that `prepare` trains."""
    tokenizer: str | None = None
    """An existing SentencePiece .model file for `prepare` to use instead of training one."""
    held_out_fraction: float = 0.05
    """Share of the documents kept for evaluation, chosen by a hash of their text."""
    shard_size_mb: float = 256.0
    """Upper bound of one shard, in megabytes; a document is never split over shards."""
    max_text_mb: float | None = None
    """Stop reading the source after this many megabytes of text; null reads all of it."""


@dataclass(kw_only=True)
class LayoutConfig:
    """How the run is spread over processes; the data-parallel size is what remains of the process count."""

    tensor_parallel_size: int = 1
    """Processes that split each layer's heads and feed-forward width."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel layers (norms, residual stream) over the tensor group too."""
    context_parallel_size: int = 1
    """Processes that split each micro-batch's segments in contiguous runs; they exchange one memory state per layer."""
    pipeline_parallel_size: int = 1
    """Pipeline stages; each holds num_layers / pipeline_parallel_size layers."""
    virtual_stages: int = 1
    """Chunks of layers that each pipeline stage holds. Hidden states go round the stages that many times, which divides the
    pipeline's idle time by as much and multiplies its transfers."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 to 3 with one pipeline stage, 0 to 2 with more."""
    offload_optimizer: bool = False
    """Keep master weights and Adam moments in host memory and step there; ZeRO 1 to 3, float32, one pipeline stage."""

    @property
    def num_virtual_stages(self) -> int:
        """Chunks of layers over all pipeline stages."""
        return self.pipeline_parallel_size * self.virtual_stages

    @property
    def model_processes(self) -> int:
        """Processes that work on the same rows."""
        return self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size


@dataclass(kw_only=True)
class TrainingConfig:
    """The size of a step, and how many."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    rows: int = 8
    """Rows of the global batch, each a stream of its own; independent of the number of processes."""
    segments_per_micro_batch: int = 1
    """Consecutive segments of each stream that travel through the pipeline together."""
    micro_batches_per_window: int = 8
    """Micro-batches through which gradients flow back over the memory before they are truncated."""
    windows_per_step: int = 1
    """Windows of each stream per optimizer step."""
    seed: int = 1234
    """Fixes initial weights and the order of documents."""
    recompute: Literal["none", "layer", "stage"] = "none"
    """What backward computes again instead of keeping it: nothing; everything inside a layer; or everything inside a pipeline
    stage, so that a micro-batch in flight costs its input and incoming memory only."""
    self_test: bool = True
    """With more than one process, first train a tiny model in the run's layout and compare it with one process."""
    deterministic: bool = False
    """Refuse operations whose result depends on timing (torch.use_deterministic_algorithms): equal bits on CUDA too."""
    loss_chunk_tokens: int = 1024
    """Positions of a row whose logits exist at one time; larger micro-batches compute the loss chunk by chunk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; memory, master weights and optimizer states are float32 always."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 3e-4
    """Peak learning rate of all weights but the gates."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine decay to the end, or wsd (warm-up, stable, linear decay over decay_steps)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Steps of the final decay; wsd only."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and gates have none."""
    beta1: float = 0.9
    """AdamW's β1."""
    beta2: float = 0.95
    """AdamW's β2."""
    eps: float = 1e-8
    """AdamW's ε."""
    gate_learning_rate: float = 1e-2
    """Peak learning rate of the memory gates β, an optimizer group of their own."""
    gate_weight_decay: float = 0.0
    """Weight decay of the memory gates."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns clipping off."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Held-out perplexity, during training and by the `evaluate` command."""

    every: int = 100
    """Steps between evaluations in training; 0 turns them off."""
    micro_batches: int = 16
    """Micro-batches of every row that one evaluation in training reads, from the beginning of the longest held-out documents;
    the evaluate command reads all of them."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving."""

    every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints to keep; at least 2, so that one damaged checkpoint loses nothing."""


@dataclass(kw_only=True)
class LoggingConfig:
    """What a run says."""

    every: int = 1
    """Steps between lines in metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is online where WANDB_API_KEY is set and off otherwise."""
    wandb_project: str = "infini-train"
    """Weights & Biases project."""


@dataclass(kw_only=True)
class RunConfig:
    """One run."""

    run_dir: str = "runs/default"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, report.html."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one row in one micro-batch."""
        return self.training.segments_per_micro_batch * self.model.segment_length

    @property
    def micro_batches_per_step(self) -> int:
        return self.training.micro_batches_per_window * self.training.windows_per_step

    @property
    def tokens_per_step(self) -> int:
        """Token slots of one step over all rows, padding included."""
        return self.training.rows * self.micro_batches_per_step * self.micro_batch_tokens

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.layout.model_processes


def _positive(section: str, config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if value <= 0:
            raise UserError(f"{section}.{name} is {value}; it must be positive")


def _divides(divisor_key: str, divisor: int, key: str, value: int) -> None:
    if value % divisor:
        raise UserError(f"{key} is {value}, which {divisor_key} = {divisor} does not divide; change one of the two")


def validate_model(config: RunConfig) -> None:
    """Refuse impossible models and batches.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    model, training = config.model, config.training
    _positive(
        "model",
        model,
        "num_layers hidden_size num_attention_heads num_query_groups head_dim ffn_hidden_size segment_length "
        "memory_eps rotary_base norm_eps init_std",
    )
    _positive(
        "training", training, "steps rows segments_per_micro_batch micro_batches_per_window windows_per_step loss_chunk_tokens"
    )
    _divides("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    if model.head_dim % 2:
        raise UserError(f"model.head_dim is {model.head_dim}; rotary embedding needs an even width")
    segments = training.segments_per_micro_batch * training.micro_batches_per_window
    if segments < 2:
        raise UserError(
            "training.micro_batches_per_window × training.segments_per_micro_batch is "
            f"{segments} segment a window; the writing of memory gets no gradient below 2: raise micro_batches_per_window"
        )


def validate_optimizer(config: RunConfig) -> None:
    """Refuse optimizer, schedule, checkpoint and logging values that cannot work or lose data.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    optimizer = config.optimizer
    _positive("optimizer", optimizer, "learning_rate gate_learning_rate eps")
    if optimizer.clip_grad_norm < 0:
        raise UserError(f"optimizer.clip_grad_norm is {optimizer.clip_grad_norm}; use 0 to turn clipping off")
    if optimizer.warmup_steps < 0 or optimizer.warmup_steps >= config.training.steps:
        raise UserError(
            f"optimizer.warmup_steps is {optimizer.warmup_steps}; it must lie between 0 and training.steps "
            f"({config.training.steps}) - 1"
        )
    if optimizer.schedule == "wsd" and not 0 < optimizer.decay_steps <= config.training.steps - optimizer.warmup_steps:
        raise UserError(
            f"optimizer.decay_steps is {optimizer.decay_steps}; the wsd schedule needs between 1 and "
            f"training.steps - warmup_steps = {config.training.steps - optimizer.warmup_steps}"
        )
    _positive("checkpoint", config.checkpoint, "every")
    if config.checkpoint.keep < 2:
        raise UserError(
            f"checkpoint.keep is {config.checkpoint.keep}; keep at least 2, or one damaged checkpoint loses the run"
        )
    _positive("logging", config.logging, "every")
    if config.evaluation.every < 0:
        raise UserError(f"evaluation.every is {config.evaluation.every}; use 0 to turn evaluation off")
    _positive("evaluation", config.evaluation, "micro_batches")


def validate_layout(config: RunConfig, world_size: int) -> None:
    """Refuse layouts that do not divide the model, the batch or the processes, or that are not exact.

    Args:
        world_size: number of processes of the run.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    layout, model = config.layout, config.model
    _positive("layout", layout, "tensor_parallel_size context_parallel_size pipeline_parallel_size virtual_stages")
    tp, cp, pp = layout.tensor_parallel_size, layout.context_parallel_size, layout.pipeline_parallel_size
    if layout.zero_stage not in (0, 1, 2, 3):
        raise UserError(f"layout.zero_stage is {layout.zero_stage}; ZeRO has stages 0, 1, 2 and 3")
    if pp > 1 and layout.zero_stage == 3:
        raise UserError(
            f"layout.zero_stage is 3 with pipeline_parallel_size {pp}: stage 3 gathers weights in an order that a pipeline "
            "breaks, and hangs; use zero_stage 2 or 1"
        )
    if layout.offload_optimizer and (layout.zero_stage == 0 or pp > 1 or config.training.precision != "float32"):
        raise UserError(
            f"layout.offload_optimizer is true with zero_stage {layout.zero_stage}, pipeline_parallel_size {pp} and precision "
            f"{config.training.precision}; it is verified for ZeRO 1 to 3 in float32 with one pipeline stage: set it to false"
        )
    if config.training.precision == "bfloat16" and layout.zero_stage != 1:
        raise UserError(
            f"layout.zero_stage is {layout.zero_stage} with training.precision bfloat16: only stage 1 accumulates gradients in "
            "float32 without loss; use zero_stage 1"
        )
    _divides("layout.tensor_parallel_size", tp, "model.num_attention_heads", model.num_attention_heads)
    _divides("layout.tensor_parallel_size", tp, "model.num_query_groups", model.num_query_groups)
    _divides("layout.tensor_parallel_size", tp, "model.ffn_hidden_size", model.ffn_hidden_size)
    _divides("layout.tensor_parallel_size", tp, "data.vocab_size", config.data.vocab_size)
    if layout.virtual_stages > 1 and pp == 1:
        raise UserError(
            f"layout.virtual_stages is {layout.virtual_stages} with pipeline_parallel_size 1, where no stage waits for "
            "another; set it to 1"
        )
    stages = "layout.pipeline_parallel_size" + " × virtual_stages" * (layout.virtual_stages > 1)
    _divides(stages, layout.num_virtual_stages, "model.num_layers", model.num_layers)
    if layout.sequence_parallel and tp == 1:
        raise UserError("layout.sequence_parallel is true with tensor_parallel_size 1; set it to false")
    if layout.sequence_parallel:
        _divides("layout.tensor_parallel_size", tp, "tokens of a micro-batch", config.micro_batch_tokens // cp)
    if cp > 1 and model.attention == "full":
        raise UserError(
            f"layout.context_parallel_size is {cp} with model.attention full, which needs all keys of a micro-batch; use 1"
        )
    _divides("layout.context_parallel_size", cp, "training.segments_per_micro_batch", config.training.segments_per_micro_batch)
    if model.tie_embeddings and pp > 1:
        raise UserError(
            f"model.tie_embeddings is true with pipeline_parallel_size {pp}: the first and last stage would each train "
            "a copy; set tie_embeddings to false or pipeline_parallel_size to 1"
        )
    if world_size % layout.model_processes:
        raise UserError(
            f"layout.tensor_parallel_size {tp} × context_parallel_size {cp} × pipeline_parallel_size {pp} does not fit "
            f"{world_size} process(es); start a multiple of {layout.model_processes}, for example with "
            f"launch/local.py {layout.model_processes}"
        )
    _divides("the data-parallel size", config.data_parallel_size(world_size), "training.rows", config.training.rows)


def validate_data(config: RunConfig) -> None:
    """Refuse impossible values of the data section (the files themselves are checked by `infini_train.data`).

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    data = config.data
    _positive("data", data, "vocab_size shard_size_mb")
    if not 0 < data.held_out_fraction < 1:
        raise UserError(f"data.held_out_fraction is {data.held_out_fraction}; it must lie between 0 and 1")
    if data.max_text_mb is not None:
        _positive("data", data, "max_text_mb")


def validate(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work, before a process group or a GPU is touched.

    Raises:
        UserError: one line that names the key, its value and the remedy.
    """
    validate_model(config)
    validate_data(config)
    validate_optimizer(config)
    validate_layout(config, world_size)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, readable again by every command."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
