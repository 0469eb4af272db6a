"""Checks of a run's configuration.

They refuse a run that cannot work, would lose data or would be inexact. The error is one line that names the key, its value
and the remedy. Like `config`, this module imports neither torch nor any library that needs torch.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from math import isfinite
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from infini_train.config import ModelConfig, RunConfig
from infini_train.runtime.errors import UserError

LARGEST, LONGEST = 3e38, 1e9
"""Largest number, because numbers become float32, and longest time in seconds, because a clock must be able to hold it."""
SMALLEST_MEMORY_EPS = 1e-12
"""Smallest ε that the memory operation accepts. A test compares it with `infini_kernels`."""
MOST_AGEING = 1 << 62
"""Largest memory_ageing, because counts are 64-bit integers."""
MOST_WORDS = 109
"""Length of the word list of the tasks. A test compares it with the list."""
WORDS_OF_A_FACT = {"multi_key": 1, "associative_recall": 2}
ASKS_SEVERAL = ("multi_key", "associative_recall")
"""Tasks in which each fact can be asked for."""


def _positive(section: str, config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if value <= 0:
            raise UserError(f"{section}.{name} is {value}; it must be positive")


def _not_negative(section: str, config: Any, names: str) -> None:
    for name in names.split():
        if not 0 <= (value := getattr(config, name)) < 1 << 63:
            raise UserError(f"{section}.{name} is {value}; use 0 or a positive number")


def _share(section: str, config: Any, names: str) -> None:
    for name in names.split():
        if not 0 <= (value := getattr(config, name)) <= 1:
            raise UserError(f"{section}.{name} is {value}; it is a share between 0 and 1")


def validate_values(config: RunConfig) -> None:
    """Refuse keys without a value, which YAML reads as null, and numbers that are infinite, NaN or too large.

    Raises:
        UserError: naming the key.
    """
    for section, holder in vars(config).items():
        for name, value in vars(holder).items() if is_dataclass(holder) else ():
            if value is None and type(None) not in get_args(get_type_hints(type(holder))[name]):
                raise UserError(f"{section}.{name} has no value; give it one, or leave it out")
            if isinstance(value, float) and not isfinite(value):
                raise UserError(f"{section}.{name} is {value}; it must be a finite number")
            if isinstance(value, float) and abs(value) > (largest := LONGEST if name.endswith("_seconds") else LARGEST):
                raise UserError(f"{section}.{name} is {value}; use a number of at most {largest:g}")


def _divides(divisor_key: str, divisor: int, key: str, value: int) -> None:
    if value % divisor:
        raise UserError(f"{key} is {value}, which {divisor_key} = {divisor} does not divide; change one of the two")


ATTENTION = get_args(get_type_hints(ModelConfig)["attention"])


def validate_model(config: RunConfig) -> None:
    """Refuse impossible models and batches.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    model, training = config.model, config.training
    if model.attention not in ATTENTION:
        raise UserError(f"model.attention is {model.attention}; use one of {', '.join(ATTENTION)}")
    _positive(
        "model",
        model,
        "num_layers hidden_size num_attention_heads num_query_groups head_dim ffn_hidden_size segment_length "
        "memory_eps rotary_base norm_eps init_std bank_tokens bank_top_k memory_tokens",
    )
    _positive(
        "training", training, "steps rows segments_per_micro_batch micro_batches_per_window windows_per_step loss_chunk_tokens"
    )
    _divides("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    if model.memory_eps < SMALLEST_MEMORY_EPS:
        raise UserError(f"model.memory_eps is {model.memory_eps}; use at least {SMALLEST_MEMORY_EPS}: float32 must hold 1 / ε²")
    if model.head_dim % 2:
        raise UserError(f"model.head_dim is {model.head_dim}; rotary embedding needs an even width")
    if model.attention == "infini" and model.normaliser == "corrected" and model.update_rule != "delta":
        raise UserError(
            f"model.normaliser is corrected, which needs update_rule delta, but model.update_rule is {model.update_rule}; set "
            "normaliser to paper or update_rule to delta"
        )
    _validate_short_convolution(model)
    if model.rotary_scaling < 1:
        raise UserError(f"model.rotary_scaling is {model.rotary_scaling}; use 1 to turn it off, or a larger factor")
    if training.recompute_layers < 0:
        raise UserError(
            f"training.recompute_layers is {training.recompute_layers}; use 0 for all layers of a chunk, or a positive number"
        )
    if not 1 <= training.memory_ageing <= MOST_AGEING:
        raise UserError(f"training.memory_ageing is {training.memory_ageing}; use 1 to turn it off, and at most {MOST_AGEING}")
    if training.memory_ageing == 2:
        raise UserError(
            "training.memory_ageing is 2, an exclusive bound, so it has no effect; use 3 or more, or 1 to turn it off"
        )
    if training.memory_ageing > 1 and config.model.attention != "infini":
        raise UserError(
            f"training.memory_ageing is {training.memory_ageing}, but model.attention {config.model.attention} has no "
            "memory to age; set it to 1"
        )
    _share("training", training, "length_curriculum memory_ageing_share memory_ageing_rise")
    _not_negative("training", training, "seed")
    segments = training.segments_per_micro_batch * training.micro_batches_per_window
    if segments < 2:
        raise UserError(
            "training.micro_batches_per_window × training.segments_per_micro_batch is "
            f"{segments} segment per window; below 2, memory writes get no gradient: raise micro_batches_per_window"
        )


def _validate_short_convolution(model: ModelConfig) -> None:
    reach = model.short_convolution_reach
    if (width := model.short_convolution) == 0:
        if reach != "segment":
            raise UserError(f"model.short_convolution_reach is {reach}, but model.short_convolution is 0; set its width too")
        return
    if reach == "document" and model.attention != "infini":
        raise UserError(
            f"model.short_convolution_reach is document, but model.attention {model.attention} does not carry the previous "
            "tokens that it needs; set it to segment"
        )
    if model.attention in ("recurrent_memory", "feedback"):
        raise UserError(
            f"model.short_convolution is {width}, but model.attention {model.attention} puts memory tokens between the "
            "tokens of the text; set it to 0"
        )
    if not 2 <= width < model.segment_length:
        raise UserError(
            f"model.short_convolution is {width}; use 0 for none, or at least 2 and fewer than model.segment_length = "
            f"{model.segment_length} tokens"
        )


def validate_optimizer(config: RunConfig) -> None:
    """Refuse optimizer, schedule, checkpoint and logging values that cannot work or lose data.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    optimizer = config.optimizer
    _positive("optimizer", optimizer, "learning_rate gate_learning_rate eps")
    _not_negative("optimizer", optimizer, "weight_decay gate_weight_decay")
    _share("optimizer", optimizer, "final_learning_rate_fraction")
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(optimizer, name)) < 1:
            raise UserError(f"optimizer.{name} is {value}; it must be at least 0 and below 1")
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
    _positive("checkpoint", config.checkpoint, "every timeout_seconds")
    if config.checkpoint.keep_every < 0:
        raise UserError(f"checkpoint.keep_every is {config.checkpoint.keep_every}; use 0 to keep none permanently")
    if config.checkpoint.copy_to is not None and "@" in urlsplit(config.checkpoint.copy_to).netloc:
        raise UserError(
            "checkpoint.copy_to has a user or password in it, which would be written to the run directory; remove them from "
            "the URL, and set them in the environment variables or credential files that the fsspec backend reads"
        )
    if config.checkpoint.keep < 2:
        raise UserError(
            f"checkpoint.keep is {config.checkpoint.keep}; keep at least 2, or one damaged checkpoint loses the run"
        )
    _positive("logging", config.logging, "every")
    if config.evaluation.every < 0:
        raise UserError(f"evaluation.every is {config.evaluation.every}; use 0 to turn evaluation off")
    _positive("evaluation", config.evaluation, "micro_batches")
    if config.profiling.steps < 0:
        raise UserError(f"profiling.steps is {config.profiling.steps}; use 0 to turn profiling off")
    _validate_health(config)


def _validate_health(config: RunConfig) -> None:
    health = config.health
    _positive("health", health, "max_consecutive_skips max_rollbacks")
    if health.spike_zscore < 0:
        raise UserError(f"health.spike_zscore is {health.spike_zscore}; use 0 to turn spike detection off")
    if health.spike_window < 4:
        raise UserError(f"health.spike_window is {health.spike_window}; a median needs at least 4 steps")
    if health.hang_seconds < 0:
        raise UserError(f"health.hang_seconds is {health.hang_seconds}; use 0 to turn the watchdog off")
    for name in ("first_step_seconds", "save_seconds"):
        if getattr(health, name) < health.hang_seconds:
            raise UserError(
                f"health.{name} is {getattr(health, name)}, less than health.hang_seconds {health.hang_seconds}, the limit for "
                f"shorter operations; raise {name}"
            )
    if health.on_spike == "rollback" and health.spike_zscore == 0:
        raise UserError(
            "health.on_spike is rollback, but spike_zscore 0 turns spike detection off; set health.spike_zscore to 8"
        )


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
            f"layout.zero_stage is 3 with pipeline_parallel_size {pp}: a pipeline breaks the order in which stage 3 gathers "
            "weights, and the run hangs; use zero_stage 2 or 1"
        )
    if layout.offload_optimizer and (layout.zero_stage == 0 or pp > 1 or config.training.precision != "float32"):
        raise UserError(
            f"layout.offload_optimizer is true with zero_stage {layout.zero_stage}, pipeline_parallel_size {pp} and precision "
            f"{config.training.precision}; it supports only ZeRO 1 to 3 in float32 with one pipeline stage: set it to false"
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
            f"layout.virtual_stages is {layout.virtual_stages} with pipeline_parallel_size 1, which has no idle time "
            "to reduce; set it to 1"
        )
    stages = "layout.pipeline_parallel_size" + " × virtual_stages" * (layout.virtual_stages > 1)
    _divides(stages, layout.num_virtual_stages, "model.num_layers", model.num_layers)
    if layout.sequence_parallel and tp == 1:
        raise UserError("layout.sequence_parallel is true with tensor_parallel_size 1; set it to false")
    if layout.sequence_parallel:
        _divides("layout.tensor_parallel_size", tp, "tokens of a micro-batch", config.micro_batch_tokens // cp)
    if cp > 1 and model.attention not in ("infini", "local"):
        raise UserError(
            f"layout.context_parallel_size is {cp} with model.attention {model.attention}, which needs all segments of a "
            "micro-batch on one process; set it to 1"
        )
    if model.attention in ("recurrent_memory", "feedback"):
        if layout.sequence_parallel:
            raise UserError(
                f"layout.sequence_parallel is true with model.attention {model.attention}, which puts memory tokens between "
                "segments; set it to false"
            )
        if config.training.recompute == "layer":
            raise UserError(
                f"training.recompute is layer with model.attention {model.attention}, which runs segment by segment; set it "
                "to none or stage"
            )
    if pp > 1 and model.attention == "recurrent_memory":
        raise UserError(
            f"layout.pipeline_parallel_size is {pp} with model.attention recurrent_memory: the first layer needs the output of "
            "the last layer for the next segment, so stages would wait for each other; set it to 1"
        )
    if pp > 1 and model.attention == "memorizing":
        raise UserError(
            f"layout.pipeline_parallel_size is {pp} with model.attention memorizing: its gates are in one layer, so stages "
            "would have different parameter groups, and DeepSpeed would hang when it sums the gradient norm; set it to 1"
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
    """Refuse impossible values of the data section. `infini_train.data` checks the files.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    data = config.data
    _positive("data", data, "vocab_size shard_size_mb")
    if not 0 < data.held_out_fraction < 1:
        raise UserError(f"data.held_out_fraction is {data.held_out_fraction}; it must lie between 0 and 1")
    if data.max_text_mb is not None:
        _positive("data", data, "max_text_mb")


def validate_task(config: RunConfig) -> None:
    """Refuse impossible values of the task section.

    Raises:
        UserError: naming the key, its value and the remedy.
    """
    task = config.task
    _positive(
        "task",
        task,
        "keys digits questions samples held_out_samples min_tokens answer_weight other_weight samples_per_cell rows",
    )
    if not 1 <= task.words <= MOST_WORDS:
        raise UserError(f"task.words is {task.words}; it must lie between 1 and {MOST_WORDS}")
    if task.kind in (None, "passkey") and task.keys > 1:
        raise UserError(f"task.keys is {task.keys} with task.kind passkey, which has at most 1; set it to 1")
    words = WORDS_OF_A_FACT.get(task.kind or "passkey", 0)
    if words * task.keys > task.words:
        raise UserError(
            f"task.keys is {task.keys} with task.kind {task.kind}, which has at most {task.words // words} with task.words "
            f"{task.words}; lower it"
        )
    if task.min_keys is not None and not 1 <= task.min_keys <= task.keys:
        raise UserError(f"task.min_keys is {task.min_keys}; it must lie between 1 and task.keys ({task.keys})")
    asks = task.keys if task.kind in ASKS_SEVERAL else 1
    if task.questions > asks:
        raise UserError(
            f"task.questions is {task.questions}, but a text of task.kind {task.kind or 'passkey'} with task.keys {task.keys} "
            f"asks for at most {asks}; lower it"
        )
    if task.max_tokens < task.min_tokens:
        raise UserError(f"task.max_tokens is {task.max_tokens}, less than task.min_tokens {task.min_tokens}; raise max_tokens")
    shares = ("late_share", "border_share", "own_segment_share")
    _share("task", task, " ".join(shares))
    if sum(getattr(task, name) for name in shares) > 1:
        values = " + ".join(f"{name} {getattr(task, name)}" for name in shares)
        raise UserError(f"task.{values} is more than 1; lower one of them")
    _not_negative("task", task, "seed")
    if not task.lengths or min(task.lengths) < 1:
        raise UserError(f"task.lengths is {task.lengths}; give one or more positive numbers of tokens")
    if not task.depths or not all(0 <= depth <= 1 for depth in task.depths):
        raise UserError(f"task.depths is {task.depths}; give one or more numbers between 0 and 1")


def validate_compare(config: RunConfig) -> None:
    """Refuse a comparison without variants or seeds.

    Raises:
        UserError: naming the key.
    """
    for name in ("variants", "seeds"):
        if not (value := getattr(config.compare, name)):
            raise UserError(f"compare.{name} is {value}; give one or more")


def validate(config: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot work, before a process group or a GPU is touched.

    Raises:
        UserError: one line that names the key, its value and the remedy.
    """
    validate_model(config)
    validate_data(config)
    validate_task(config)
    validate_optimizer(config)
    validate_layout(config, world_size)
