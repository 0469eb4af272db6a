"""Typed configuration of a run. Nothing else in the package reads YAML, and this file imports neither torch nor a library
that needs one, so a wrong value is refused within a second and before any process group exists."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml


@dataclass(kw_only=True)
class ModelConfig:
    """The transformer and its attention."""

    attention: Literal[
        "infini", "full", "local", "window", "transformer_xl", "memorizing", "linear", "recurrent_memory", "feedback"
    ] = "infini"
    """infini: segment-local attention plus compressive memory; local: segment-local attention alone; full: causal attention
    over a whole micro-batch (its context is segments_per_micro_batch × segment_length tokens); window: the segment_length
    newest tokens; transformer_xl: this segment and a cache of the one before; memorizing: transformer_xl with a key-value bank
    in one layer; linear: causal linear attention over whole documents; recurrent_memory: memory tokens that
    the last layer writes and the next segment reads; feedback: TransformerFAM, memory tokens in every layer."""
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
    write_strength: Literal["one", "learned"] = "one"
    """Not in the paper: learned writes each token's key and value with a strength of 2 sigmoid(k · u), u learned for each
    key/value head, so that a memory need not take in what nothing asks for; one writes all tokens alike."""
    normaliser: Literal["paper", "corrected"] = "paper"
    """What a read of the delta rule's memory is divided by. paper: by all keys ever written, so that a value that is written
    twice reads as half of itself; corrected, not in the paper: by what the same rule makes of values of one."""
    feature_map: Literal["elu", "softmax"] = "elu"
    """σ of queries and keys in the memory: elu is the paper's ELU + 1; softmax, not in the paper, is softmax(2 x) over a head's
    width, so that what fits best outweighs the rest."""
    short_convolution: int = 0
    """Not in the paper: tokens of a causal convolution over queries and keys, one filter a channel. A key sees the tokens
    before its own, so that memory and attention find what came after the same words; 0 has none."""
    short_convolution_reach: Literal["segment", "document"] = "segment"
    """What the convolution sees at a segment's start: segment, nothing; document, the tokens before it, which are then carried
    beside the memory."""
    memory_eps: float = 1e-6
    """ε added to the memory's normaliser σ(Q) z."""
    initial_gate: float = 0.0
    """β of every head at the start, before the sigmoid."""
    bank_tokens: int = 65536
    """Tokens that the bank of `memorizing` holds."""
    bank_top_k: int = 32
    """Tokens of the bank that a query attends to: those with the largest scores."""
    memory_tokens: int = 16
    """Memory tokens of `recurrent_memory`, and of each layer of `feedback`."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies; positions count from the segment's start."""
    rotary_scaling: float = 1.0
    """How much slower than their frequency the slowest pairs of channels turn, those with less than one turn in 8,192 tokens;
    with more than four turns as they are, between the two in between. Llama 3.1 has 8 and 3.2 has 32; 1 changes nothing."""
    norm_eps: float = 1e-5
    """ε of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; layers that write to the residual stream use init_std / sqrt(2 num_layers)."""
    tie_embeddings: bool = False
    """Share input embedding and output matrix; needs pipeline_parallel_size 1."""

    @property
    def bank_layer(self) -> int:
        """The layer of `memorizing` with the bank, counted from 1: at three quarters of the depth, as the paper's ninth of
        twelve."""
        return max(1, 3 * self.num_layers // 4)

    @property
    def memory_value_width(self) -> int:
        """Columns of a memory M: those of a value, and with a corrected normaliser that of ones."""
        return self.head_dim + (self.normaliser == "corrected")


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
    """An existing tokenizer for `prepare` to use instead of training one: a SentencePiece .model file, or a tokenizer.json of
    Hugging Face with its tokenizer_config.json beside it."""
    held_out_fraction: float = 0.05
    """Share of the documents kept for evaluation, chosen by a hash of their text."""
    shard_size_mb: float = 256.0
    """Upper bound of one shard, in megabytes; a document is never split over shards."""
    max_text_mb: float | None = None
    """Stop reading the source after this many megabytes of text; null reads all of it."""
    on_bad_shard: Literal["fatal", "skip"] = "fatal"
    """What a training shard that is missing or damaged at the start means: fatal names it and stops; skip names it and leaves
    its documents out, in every process alike. Held-out shards are always fatal: a part of them measures something else."""
    verify_checksums: bool = True
    """Read every shard once at the start, divided among the processes, and compare its checksum; false compares sizes only."""


TaskKind = Literal["passkey", "multi_key", "multi_value", "associative_recall", "babi"]
TASK_KINDS: tuple[str, ...] = get_args(TaskKind)


@dataclass(kw_only=True)
class TaskConfig:
    """A retrieval task: a fact somewhere in a long text, asked at its end. Its data, and what `evaluate passkey` measures."""

    kind: TaskKind | None = None
    """null: `prepare` makes shards of data.source's text. passkey: one number, as in the paper; multi_key: numbers with names,
    one asked; multi_value: several numbers, all asked; associative_recall: pairs of words, one asked; babi: persons move
    between places, the last place of one is asked. `evaluate passkey` reads null as passkey. `--task KIND` is short for it."""
    keys: int = 1
    """Facts in a text: numbers, pairs or moves; passkey has 1."""
    min_keys: int | None = None
    """Fewest facts in a text of `prepare`, which has from so many to `keys`, each number as often as the lengths allow: a model
    learns the task from texts of few facts first. null: as many as `keys`. `evaluate passkey` has `keys` always."""
    words: int = 109
    """Words from which multi_key draws its names and associative_recall its pairs: the first so many of a list of 109."""
    digits: int = 5
    """Digits of a number, each a token."""
    questions: int = 1
    """Facts that a text of `prepare` asks for, one after the other at its end: up to `keys` of multi_key and
    associative_recall, so that a text teaches more. `evaluate passkey` asks for one."""
    filler: Literal["repeated", "text"] = "repeated"
    """What stands around the facts. repeated: the paper's sentences (The grass is green. ...); text: documents of data.source,
    the training split's in training data and the held-out split's elsewhere."""
    samples: int = 4000
    """Texts in the training split, each a document."""
    held_out_samples: int = 64
    """Texts in the held-out split."""
    min_tokens: int = 256
    """Shortest text of both splits, in tokens from the begin token to the answer's last."""
    max_tokens: int = 512
    """Longest text of both splits."""
    length_distribution: Literal["uniform", "log_uniform", "equal_tokens"] = "uniform"
    """Distribution of lengths between the two; log_uniform makes as many texts of 256 to 512 tokens as of 512 to 1,024,
    equal_tokens twice as many, so that both have as many tokens: more answers in the same time."""
    late_share: float = 0.15
    """Share of the texts whose fact is in the last 15% of the filler. What this and the next two shares leave is uniform over
    all of it."""
    border_share: float = 0.15
    """Share of the texts whose fact is in the last three segments before the question, half of them across a border between
    two segments."""
    own_segment_share: float = 0.15
    """Share of the texts whose fact is in the answer's own segment, where no memory holds it yet, if it fits there, and right
    before the question if not."""
    answer_weight: float = 1.0
    """Weight of an answer's tokens in the loss, which is Σ w·loss / Σ w."""
    other_weight: float = 0.2
    """Weight of all other tokens; positive, because a step may hold no answer."""
    seed: int = 0
    """Fixes the samples. Training, held-out and evaluation samples have different seeds under the same number."""
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768, 131072])
    """Lengths that `evaluate passkey` measures, in tokens from the begin token to the answer's last; a million and more are
    streamed."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Depths that it measures: 0 puts the fact at the start, 1 right before the question."""
    samples_per_cell: int = 20
    """Texts for each pair of length and depth."""
    rows: int = 20
    """Texts that it reads side by side."""


@dataclass(kw_only=True)
class LayoutConfig:
    """How the run is spread over processes; the data-parallel size is what remains of the process count."""

    tensor_parallel_size: int = 1
    """Processes that split each layer's heads and feed-forward width."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel layers (norms, residual stream) over the tensor group too."""
    context_parallel_size: int = 1
    """Processes that split each micro-batch's segments in contiguous runs; they exchange one memory state per layer. With
    attention infini and local."""
    pipeline_parallel_size: int = 1
    """Pipeline stages; each holds num_layers / pipeline_parallel_size layers."""
    virtual_stages: int = 1
    """Chunks of layers that each pipeline stage holds. Hidden states go round the stages that many times, which divides the
    pipeline's idle time by as much and multiplies its transfers."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 to 3 with one pipeline stage, 0 to 2 with more; 1 alone in bfloat16."""
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
    initial_weights: str | None = None
    """Weights that a run without a checkpoint starts from: a file of `convert` or of `checkpoint consolidate`, or a folder
    step_XXXXXXXX of another run. They belong to data.path's tokenizer and to a model of the same size; attention, memory and
    segment_length may be others. Gates that the weights lack begin as in a new model. null draws all weights."""
    recompute: Literal["none", "layer", "stage"] = "none"
    """What backward computes again instead of keeping it: nothing; everything inside a layer; or everything inside a pipeline
    stage, so that a micro-batch in flight costs its input and incoming memory only."""
    recompute_layers: int = 0
    """With recompute layer, and only then: computed again are so many layers of each chunk, from its first, or all where it has
    no more; the others keep what they computed. As few as memory allows are fastest. 0 takes all."""
    self_test: bool = True
    """With more than one process, first train a tiny model in the run's layout and compare it with one process."""
    deterministic: bool = True
    """On CUDA take no operation whose result depends on timing (torch.use_deterministic_algorithms): a run gives the same bits
    twice. Without it local attention's backward is faster, and sums the gradient of queries in any order."""
    length_curriculum: float = 0.0
    """Not in the paper: share of the first epoch's documents, chosen by the seed, that are read by length, shortest first; then
    come all others in an order without lengths. 0 turns it off."""
    memory_ageing: int = 1
    """Not in the paper: while training, a segment's update may count several times, fewer than this, as if it came so often in
    a row. Gradients then see a memory as diluted as that of a very long stream. 1 turns it off; the bound starts at 1."""
    memory_ageing_share: float = 0.5
    """Share of the segments whose update counts more than once; how often is log-uniform up to the bound."""
    memory_ageing_rise: float = 0.6
    """Share of the steps over which the bound rises, geometrically, from 1 to memory_ageing."""
    loss_chunk_tokens: int = 1024
    """Positions of a row whose logits exist at one time; larger micro-batches compute the loss chunk by chunk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations; memory, master weights and optimizer states are float32 always."""
    fused_layers: Literal["plain", "fused"] = "plain"
    """Norms, SwiGLU and, unless the vocabulary is split, cross entropy: plain, or on CUDA kernels that are fused. On a CPU both
    are plain."""


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
    """Decoupled weight decay of matrices; norms have none, gates their own."""
    beta1: float = 0.9
    """AdamW's β1."""
    beta2: float = 0.95
    """AdamW's β2."""
    eps: float = 1e-8
    """AdamW's ε."""
    gate_learning_rate: float = 1e-2
    """Peak learning rate of the gates, an optimizer group of their own: β, and those of learned writes."""
    gate_weight_decay: float = 0.0
    """Weight decay of the gates."""
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
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none so."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, from a copy of this process's share in host memory."""
    timeout_seconds: float = 1800.0
    """A checkpoint that takes longer stops the run, with the name of the process that holds it up."""
    copy_to: str | None = None
    """Any fsspec URL (s3://bucket/run, file:///mnt/archive/run): every committed checkpoint is copied there."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Where the time of a step goes."""

    steps: int = 0
    """Profile so many steps, from the fourth after this start on: a trace and a table of time by part in profile/ of the run
    directory; 0 profiles none. `--profile.steps N` is the same."""


@dataclass(kw_only=True)
class HealthConfig:
    """When a run skips, goes back or stops by itself."""

    max_consecutive_skips: int = 10
    """Stop after so many steps in a row whose gradient was not finite (NaN or infinity); each is skipped on all processes."""
    spike_zscore: float = 8.0
    """A loss so many robust standard deviations (1.4826 × median absolute deviation, at least 1% of the median) above the
    window's median is a spike; 0 looks for none."""
    spike_window: int = 64
    """Steps in the window; nothing is called a spike before it is full."""
    on_spike: Literal["report", "rollback"] = "report"
    """report: say it and count it; rollback: also go back to the newest checkpoint and leave out the data read since then, the
    spike's included. The streams go on with an empty memory."""
    max_rollbacks: int = 3
    """Stop at the spike after so many rollbacks."""
    hang_seconds: float = 600.0
    """A job hangs when the operations of all processes (a micro-batch's forward, the optimizer step) take longer: the process
    that holds up the others is named, stacks are written to stacks/ of the run directory, and the job ends; 0 turns it off."""
    first_step_seconds: float = 1800.0
    """The same limit until the first step is done: loading, self-test, compilation."""
    save_seconds: float = 3600.0
    """The same limit for saving and loading checkpoints."""


@dataclass(kw_only=True)
class LoggingConfig:
    """What a run says."""

    every: int = 1
    """Steps between lines in metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is what WANDB_MODE says, and without it online where WANDB_API_KEY is set and off otherwise."""
    wandb_project: str = "infini-train"
    """Weights & Biases project."""


@dataclass(kw_only=True)
class CompareConfig:
    """What `evaluate compare` trains side by side: one run for each variant and seed, in folders of run_dir."""

    variants: list[str] = field(default_factory=lambda: ["infini", "transformer_xl", "memorizing", "local", "full"])
    """Values of model.attention, each with further keys of model if wanted: "infini update_rule=delta"."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Values of training.seed."""


@dataclass(kw_only=True)
class RunConfig:
    """One run."""

    run_dir: str = "runs/default"
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/, report.html."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)

    @property
    def recomputed_layers(self) -> int:
        """Layers of a chunk, from its first, that are each computed again in the backward: `training.recompute: layer`."""
        layers = self.model.num_layers // self.layout.num_virtual_stages
        asked = self.training.recompute_layers or layers
        return min(asked, layers) if self.training.recompute == "layer" else 0

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

    @property
    def collective_timeout_seconds(self) -> float:
        """Longer than every limit that ends a run with the name of the process that holds it up."""
        health = self.health
        named = (health.hang_seconds, health.first_step_seconds, health.save_seconds, self.checkpoint.timeout_seconds)
        return max(1800.0, *named) + 300.0

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.layout.model_processes


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, readable again by every command."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def dump_keys(keys: dict[str, Any]) -> str:
    """Some keys of a configuration, by section, as YAML."""
    return yaml.safe_dump(keys, sort_keys=False)


def save_config(config: RunConfig, path: Path) -> None:
    """Write `dump_config` to a file."""
    path.write_text(dump_config(config), encoding="utf-8")


WHAT_TRAINS = ("model", "data", "task", "training", "optimizer")
"""Sections that decide what a run learns."""
MEASURES_ALONE = {"task.lengths", "task.depths", "task.samples_per_cell", "task.rows"}
"""Keys among theirs that say how it is measured."""


def difference_from(path: Path, config: RunConfig) -> str | None:
    """The first key in which a run that wrote `path` with `save_config` learned something else; None if there is none.

    A file that is not there differs in nothing, and a key that is newer than the file had its default.
    """
    if not path.is_file():
        return None
    return difference(yaml.safe_load(path.read_text(encoding="utf-8")), config)


def difference(saved: dict[str, Any], config: RunConfig, but: Collection[str] = ()) -> str | None:
    """`difference_from` for what `dataclasses.asdict` made of the other run's configuration, but for these keys."""
    ours = asdict(config)
    for section in WHAT_TRAINS:
        for key, value in ours[section].items():
            before = saved.get(section, {}).get(key, getattr(getattr(RunConfig(), section), key))
            if before != value and f"{section}.{key}" not in {*MEASURES_ALONE, *but}:
                return f"{section}.{key} is {value}, and was {before}"
    return None


def holds_key(path: Path, key: str) -> bool:
    """Whether a YAML file has a key, its sections separated by dots; False if the file cannot be read."""
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    for name in key.split("."):
        if not isinstance(held, dict) or name not in held:
            return False
        held = held[name]
    return True


def read_steps(path: Path) -> int | None:
    """`training.steps` of a configuration that `save_config` wrote; None if the file is not there or not whole."""
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["training"]["steps"])
    except (OSError, ValueError, OverflowError, KeyError, TypeError, yaml.YAMLError):
        return None
