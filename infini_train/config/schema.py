"""Typed configuration of a run.

It imports neither torch nor any library that needs torch, so that a wrong value is refused within a second and before any
process group exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args


@dataclass(kw_only=True)
class ModelConfig:
    """The transformer and its attention."""

    attention: Literal[
        "infini", "full", "local", "window", "transformer_xl", "memorizing", "linear", "recurrent_memory", "feedback"
    ] = "infini"
    """Attention variant. infini: segment-local attention plus compressive memory; local: segment-local attention only;
    full: causal attention over a whole micro-batch, that is segments_per_micro_batch × segment_length tokens; window:
    attention to the newest segment_length tokens; transformer_xl: attention to this segment and a cache of the previous
    one; memorizing: transformer_xl with a key-value bank in one layer; linear: causal linear attention over whole
    documents; recurrent_memory: memory tokens that the last layer writes and the next segment reads; feedback:
    TransformerFAM, memory tokens in every layer."""
    num_layers: int = 12
    """Number of transformer layers, over all pipeline stages."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_attention_heads: int = 12
    """Query heads per layer."""
    num_query_groups: int = 4
    """Key/value heads per layer. Must divide num_attention_heads."""
    head_dim: int = 64
    """Width of one head (d_k = d_v). It must be even, because rotary embedding rotates halves."""
    ffn_hidden_size: int = 2048
    """Inner width of the SwiGLU feed-forward layer."""
    segment_length: int = 2048
    """Tokens per segment. Local attention stays inside a segment, and the memory is updated once per segment."""
    update_rule: Literal["linear", "delta"] = "linear"
    """Update rule of the memory: linear (Eq. 8 of the paper) or delta (Eq. 9)."""
    first_segment: Literal["paper", "local_only"] = "paper"
    """Output in the first segment of a document, where the memory is empty. paper: local attention is scaled by 1 -
    sigmoid(β); local_only: local attention is not scaled."""
    write_strength: Literal["one", "learned"] = "one"
    """Not in the paper: how strongly each token is written to the memory. one: every token with strength 1; learned: each
    token with strength 2 sigmoid(k · u), where u is learned for each key/value head. With learned, the model can leave
    unneeded tokens out of the memory."""
    normaliser: Literal["paper", "corrected"] = "paper"
    """Divisor of a memory read under the delta rule. paper: the sum of all keys ever written, so that a value written twice
    reads as half of itself; corrected, not in the paper: the result of the same rule for values of 1."""
    feature_map: Literal["elu", "softmax"] = "elu"
    """Feature map σ of queries and keys in the memory. elu: ELU + 1, as in the paper; softmax, not in the paper: softmax(2
    x) over the width of a head, which gives the best matches more weight."""
    short_convolution: int = 0
    """Not in the paper: width in tokens of a causal convolution over queries and keys, with one filter per channel. A key
    then depends on the tokens before it, so that memory and attention can find the text that followed the same words. 0
    turns it off."""
    short_convolution_reach: Literal["segment", "document"] = "segment"
    """Input of the convolution before the start of a segment. segment: zeros; document: the previous tokens of the
    document, which are then carried along with the memory."""
    memory_eps: float = 1e-6
    """ε added to the memory's normaliser σ(Q) z."""
    initial_gate: float = 0.0
    """Initial value of β in every head, before the sigmoid."""
    bank_tokens: int = 65536
    """Capacity in tokens of the key-value bank of `memorizing`."""
    bank_top_k: int = 32
    """Number of tokens in the bank that a query attends to: those with the largest scores."""
    memory_tokens: int = 16
    """Number of memory tokens of `recurrent_memory`, and of each layer of `feedback`."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies. Positions count from the start of the segment."""
    rotary_scaling: float = 1.0
    """Factor by which rotary embedding slows down its slow channel pairs, as Llama 3.1 does. Pairs with less than one turn
    in 8,192 tokens are slowed by the whole factor, pairs with more than four turns not at all, and pairs in between partly.
    Llama 3.1 uses 8 and Llama 3.2 uses 32; 1 turns it off."""
    norm_eps: float = 1e-5
    """ε of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights. Layers that write to the residual stream use init_std / sqrt(2 num_layers)."""
    tie_embeddings: bool = False
    """Share the input embedding and the output matrix. Needs pipeline_parallel_size 1."""

    @property
    def bank_layer(self) -> int:
        """Layer of `memorizing` that has the bank, counted from 1.

        It is at three quarters of the depth, as in the paper, which uses the ninth of twelve.
        """
        return max(1, 3 * self.num_layers // 4)

    @property
    def memory_value_width(self) -> int:
        """Columns of a memory M: the width of a value, plus one column of ones with the corrected normaliser."""
        return self.head_dim + (self.normaliser == "corrected")


@dataclass(kw_only=True)
class DataConfig:
    """The source of the text and its conversion to shards."""

    source: str = "stdlib"
    """Input text of `prepare`: a folder of .txt/.md/.py files; a .jsonl, .jsonl.gz or .jsonl.zst file, or a folder of them;
    a Hugging Face dataset saved to disk; or the word stdlib for the source files of Python's standard library."""
    text_key: str = "text"
    """Field that holds the text in .jsonl records and dataset rows."""
    path: str = "runs/data"
    """Folder of tokenizer, shards and index. `prepare` writes it and all other commands read it."""
    vocab_size: int = 32000
    """Size of the SentencePiece vocabulary that `prepare` trains."""
    tokenizer: str | None = None
    """Existing tokenizer that `prepare` uses instead of training one: a SentencePiece .model file, or a Hugging Face
    tokenizer.json with its tokenizer_config.json in the same folder."""
    held_out_fraction: float = 0.05
    """Share of the documents kept for evaluation. A hash of the text selects them."""
    shard_size_mb: float = 256.0
    """Largest size of one shard, in megabytes. A document is never split over shards."""
    max_text_mb: float | None = None
    """Stop reading the source after this many megabytes of text. null reads all of it."""
    on_bad_shard: Literal["fatal", "skip"] = "fatal"
    """Reaction to a training shard that is missing or damaged at the start. fatal: name the shard and stop; skip: name the
    shard and leave out its documents, on all processes alike. A bad held-out shard is always fatal, because a different set
    of documents would measure something else."""
    verify_checksums: bool = True
    """Read every shard once at the start and compare its checksum; the processes share the work. false compares sizes only."""


TaskKind = Literal["passkey", "multi_key", "multi_value", "associative_recall", "babi"]
TASK_KINDS: tuple[str, ...] = get_args(TaskKind)


@dataclass(kw_only=True)
class TaskConfig:
    """Retrieval task: a long text that contains a fact and asks for it at the end. Used by `prepare` and `evaluate
    passkey`."""

    kind: TaskKind | None = None
    """Kind of task. null: no task, `prepare` makes shards of the text of data.source; passkey: one number, as in the paper;
    multi_key: several named numbers, one is asked for; multi_value: several numbers, all are asked for; associative_recall:
    pairs of words, one is asked for; babi: persons move between places, and the last place of one person is asked for.
    `evaluate passkey` treats null as passkey. `--task KIND` is the short form."""
    keys: int = 1
    """Number of facts in a text: numbers, pairs or moves. passkey always has 1."""
    min_keys: int | None = None
    """Smallest number of facts in a text made by `prepare`. Each number from min_keys to keys is equally frequent, as far
    as the lengths allow: a model learns the task from texts with few facts first. null: same as keys. `evaluate passkey`
    always uses keys."""
    words: int = 109
    """Number of words to draw from: the first this many of a list of 109. multi_key uses them as names and
    associative_recall as pairs."""
    digits: int = 5
    """Digits of a number. Each digit is a token."""
    questions: int = 1
    """Number of facts that a text made by `prepare` asks for, one after another at its end. More than 1, and at most keys,
    is possible with multi_key and associative_recall. More questions give more answers to learn from. `evaluate passkey`
    asks for one."""
    filler: Literal["repeated", "text"] = "repeated"
    """Text around the facts. repeated: the paper's sentences (The grass is green. ...); text: documents of data.source,
    from the training split in training data and from the held-out split otherwise."""
    samples: int = 4000
    """Number of texts in the training split. Each text is a document."""
    held_out_samples: int = 64
    """Number of texts in the held-out split."""
    min_tokens: int = 256
    """Length of the shortest text in both splits, in tokens from the begin token to the last token of the answer."""
    max_tokens: int = 512
    """Length of the longest text in both splits, in tokens."""
    length_distribution: Literal["uniform", "log_uniform", "equal_tokens"] = "uniform"
    """Distribution of lengths between min_tokens and max_tokens. log_uniform makes as many texts of 256 to 512 tokens as of
    512 to 1,024. equal_tokens makes twice as many, so that both ranges have the same number of tokens: more answers in the
    same time."""
    late_share: float = 0.15
    """Share of the texts that have the fact in the last 15% of the filler. In the texts outside late_share, border_share
    and own_segment_share, the position of the fact is uniform over the whole filler."""
    border_share: float = 0.15
    """Share of the texts that have the fact in the last three segments before the question. In half of them the fact
    crosses the border between two segments."""
    own_segment_share: float = 0.15
    """Share of the texts that have the fact in the segment of the answer, which is not in the memory yet. If it does not
    fit there, the fact stands right before the question."""
    answer_weight: float = 1.0
    """Weight w of the answer's tokens in the loss, Σ w·loss / Σ w."""
    other_weight: float = 0.2
    """Weight of all other tokens. It must be positive, because a step may contain no answer."""
    seed: int = 0
    """Seed of the samples. Training, held-out and evaluation samples differ even with the same value."""
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768, 131072])
    """Text lengths that `evaluate passkey` measures, in tokens from the begin token to the last token of the answer. The
    text is read as a stream, so a million tokens and more are possible."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Depths of the fact that `evaluate passkey` measures: 0 at the start of the text, 1 right before the question."""
    samples_per_cell: int = 20
    """Number of texts that `evaluate passkey` measures for each pair of length and depth."""
    rows: int = 20
    """Number of texts that `evaluate passkey` reads in parallel."""


@dataclass(kw_only=True)
class LayoutConfig:
    """Distribution of the run over processes. The data-parallel size is the number of processes divided by the other sizes."""

    tensor_parallel_size: int = 1
    """Number of processes that split the heads and the feed-forward width of each layer."""
    sequence_parallel: bool = False
    """Also split the activations between tensor-parallel layers (norms, residual stream) over the tensor-parallel group."""
    context_parallel_size: int = 1
    """Number of processes that split the segments of each micro-batch in contiguous runs. They exchange one memory state
    per layer. Only with attention infini and local."""
    pipeline_parallel_size: int = 1
    """Number of pipeline stages. Each holds num_layers / pipeline_parallel_size layers."""
    virtual_stages: int = 1
    """Number of chunks of layers in each pipeline stage. Hidden states pass through all stages this many times, which
    divides the pipeline's idle time by this number and multiplies its transfers by it."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 to 3 with one pipeline stage, 0 to 2 with more. bfloat16 needs 1."""
    offload_optimizer: bool = False
    """Keep master weights and Adam moments in host memory and run the optimizer step there. Needs ZeRO 1 to 3, float32 and
    one pipeline stage."""

    @property
    def num_virtual_stages(self) -> int:
        """Number of chunks of layers over all pipeline stages."""
        return self.pipeline_parallel_size * self.virtual_stages

    @property
    def model_processes(self) -> int:
        """Number of processes that work on the same rows."""
        return self.tensor_parallel_size * self.context_parallel_size * self.pipeline_parallel_size


@dataclass(kw_only=True)
class TrainingConfig:
    """Size and number of training steps, and the options of training."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    rows: int = 8
    """Rows of the global batch. Each row is a stream. Independent of the number of processes."""
    segments_per_micro_batch: int = 1
    """Consecutive segments of each stream in one micro-batch, the unit that the pipeline moves."""
    micro_batches_per_window: int = 8
    """Micro-batches in one window. Gradients flow back over the memory within a window and are truncated at its start."""
    windows_per_step: int = 1
    """Windows of each stream per optimizer step."""
    seed: int = 1234
    """Seed of the initial weights and of the order of documents."""
    initial_weights: str | None = None
    """Weights to start from when the run has no checkpoint: a file written by `convert` or `checkpoint consolidate`, or a
    step_XXXXXXXX folder of another run. They must fit data.path's tokenizer and a model of the same size. Attention, memory
    and segment_length may differ. Gates that the file lacks start as in a new model. null: random weights."""
    recompute: Literal["none", "layer", "stage"] = "none"
    """Activations that the backward pass computes again to save GPU memory. none: nothing; layer: everything inside a
    layer; stage: everything inside a pipeline stage, so that a micro-batch in flight keeps only its input and its incoming
    memory."""
    recompute_layers: int = 0
    """Number of layers in each chunk, from its first, that recompute layer applies to; the other layers keep their
    activations. The smallest number that fits into GPU memory is the fastest. 0 means all layers. Only with recompute
    layer."""
    self_test: bool = True
    """With more than one process, first train a tiny model in the run's layout and compare the result with a single
    process."""
    deterministic: bool = True
    """On CUDA, use only deterministic operations (torch.use_deterministic_algorithms), so that the same run gives the same
    bits twice. false makes the backward pass of local attention faster, but it sums the gradient of queries in an arbitrary
    order."""
    length_curriculum: float = 0.0
    """Not in the paper: share of the first epoch's documents, selected by the seed, that are read first and sorted by
    length, shortest first. All others follow in random order. 0 turns it off."""
    memory_ageing: int = 1
    """Not in the paper: upper bound (exclusive) on how many times a segment's memory update counts in training, as if the
    segment had come that many times in a row. Gradients then see a memory as diluted as after a very long stream. The bound
    rises from 1 during training. 1 turns it off."""
    memory_ageing_share: float = 0.5
    """Share of the segments whose memory update counts several times. The number of times is log-uniform up to the bound."""
    memory_ageing_rise: float = 0.6
    """Share of the steps during which the bound rises geometrically from 1 to memory_ageing."""
    loss_chunk_tokens: int = 1024
    """Positions of a row whose logits are in memory at the same time. Larger micro-batches compute the loss in chunks of
    this size."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations. The compressive memory, master weights and optimizer states are always float32."""
    fused_layers: Literal["plain", "fused"] = "plain"
    """Implementation of norms, SwiGLU and cross entropy. plain: PyTorch operations; fused: fused kernels on CUDA (cross
    entropy only if the vocabulary is not split). On a CPU both are plain."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 3e-4
    """Peak learning rate of all weights except the gates."""
    final_learning_rate_fraction: float = 0.1
    """Learning rate at the end of the run, as a share of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Schedule after warm-up. cosine: cosine decay until the end; wsd (warm-up, stable, decay): constant, then linear decay
    over decay_steps."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Steps of the final decay. Only with schedule wsd."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms have no weight decay, and gates have gate_weight_decay."""
    beta1: float = 0.9
    """AdamW's β1."""
    beta2: float = 0.95
    """AdamW's β2."""
    eps: float = 1e-8
    """AdamW's ε."""
    gate_learning_rate: float = 1e-2
    """Peak learning rate of the gates: β and the gates of learned writes. They form a separate optimizer group."""
    gate_weight_decay: float = 0.0
    """Weight decay of the gates."""
    clip_grad_norm: float = 1.0
    """Largest global L2 norm of the gradients; larger gradients are scaled down to it. 0 turns clipping off."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Held-out perplexity, measured during training and by the `evaluate` command."""

    every: int = 100
    """Steps between evaluations during training. 0 turns them off."""
    micro_batches: int = 16
    """Micro-batches of every row that one evaluation during training reads, from the beginning of the longest held-out
    documents. The `evaluate` command reads all of them."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving of checkpoints."""

    every: int = 200
    """Steps between checkpoints. The last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints to keep. At least 2, so that one damaged checkpoint does not lose the run."""
    keep_every: int = 0
    """Keep checkpoints permanently if their step is a multiple of this. 0 keeps none permanently."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written, from a copy of each process's share in host memory."""
    timeout_seconds: float = 1800.0
    """Longest time to write a checkpoint. After it the run stops and names the process that is late."""
    copy_to: str | None = None
    """Destination to which every committed checkpoint is copied: any fsspec URL (s3://bucket/run, file:///mnt/archive/run)."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """Profile of the time of a training step."""

    steps: int = 0
    """Number of steps to profile, from the fourth after this start. Writes a trace and a table of time by phase to profile/
    in the run directory. 0 turns profiling off. `--profile.steps N` is the same."""


@dataclass(kw_only=True)
class HealthConfig:
    """Conditions under which a run skips a step, rolls back or stops."""

    max_consecutive_skips: int = 10
    """Stop after this many consecutive steps with a gradient that is not finite (NaN or infinity). Each such step is
    skipped on all processes."""
    spike_zscore: float = 8.0
    """Number of robust standard deviations (1.4826 × median absolute deviation, at least 1% of the median) above the median
    of the window from which a loss counts as a spike. 0 turns spike detection off."""
    spike_window: int = 64
    """Number of steps in the window. No loss counts as a spike before the window is full."""
    on_spike: Literal["report", "rollback"] = "report"
    """Reaction to a spike. report: print and count it; rollback: also go back to the newest checkpoint and skip the data
    read since then, including that of the spike. The streams continue with an empty memory."""
    max_rollbacks: int = 3
    """Stop at the next spike after this many rollbacks."""
    hang_seconds: float = 600.0
    """Longest time of one operation (the forward of a micro-batch, the optimizer step). If the operations of all processes
    take longer, the job hangs: it names the process that holds up the others, writes stacks to stacks/ in the run
    directory, and ends. 0 turns the watchdog off."""
    first_step_seconds: float = 1800.0
    """The same limit until the first step is done. It covers loading, self-test and compilation."""
    save_seconds: float = 3600.0
    """The same limit for saving and loading checkpoints."""


@dataclass(kw_only=True)
class LoggingConfig:
    """Metrics and their destinations."""

    every: int = 1
    """Steps between lines in metrics.jsonl."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Mode of Weights & Biases. auto: the value of WANDB_MODE if it is set; otherwise online if WANDB_API_KEY is set, and
    off if not."""
    wandb_project: str = "infini-train"
    """Project name in Weights & Biases."""


@dataclass(kw_only=True)
class CompareConfig:
    """Runs that `evaluate compare` trains: one for each variant and seed, in folders of run_dir."""

    variants: list[str] = field(default_factory=lambda: ["infini", "transformer_xl", "memorizing", "local", "full"])
    """Values of model.attention, each optionally followed by other model keys: "infini update_rule=delta"."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Values of training.seed."""


@dataclass(kw_only=True)
class RunConfig:
    """Configuration of one run."""

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
        """Number of layers of a chunk, from its first, that `training.recompute: layer` computes again in the backward
        pass."""
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
        """Timeout of collectives in seconds.

        It is longer than every limit after which the run itself stops and names the process that is late.
        """
        health = self.health
        named = (health.hang_seconds, health.first_step_seconds, health.save_seconds, self.checkpoint.timeout_seconds)
        return max(1800.0, *named) + 300.0

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.layout.model_processes
