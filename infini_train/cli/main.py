"""Command line entry point: validate the parsed arguments and dispatch to the command."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace

from infini_train.cli import cluster as cluster
from infini_train.cli import plan as planning
from infini_train.cli.parser import WITHOUT_CONFIG, parse, read_config, run_config
from infini_train.config import RunConfig
from infini_train.config.validation import validate, validate_compare
from infini_train.runtime.errors import AgreedError, UserError
from infini_train.runtime.standard_streams import ignore_stream_errors, replace_unencodable_characters


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program name; None reads `sys.argv`.

    Returns:
        The exit code:

        - 0: success.
        - 1: `checkpoint verify` found damage, or `plan --dry_run` found a difference.
        - 2: a user error, reported in one line.
        - 85: the run stopped early and can be resumed.
        - 87: the run stopped itself because training is unhealthy, reported in one line.
        - 130: Ctrl-C while there was nothing to save.
    """
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        section = arguments[arguments.command]
        if arguments.command in WITHOUT_CONFIG:
            inspect: Callable[[Namespace], int] = globals()[f"_{arguments.command}"]
            return inspect(section)
        handler: Callable[[RunConfig, Namespace], int] = globals()[f"_{arguments.command}"]
        return handler(run_config(section), section)
    except UserError as error:
        _report_error(error)
        if not isinstance(error, AgreedError) and _has_peer_ranks():
            _exit_immediately(error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        print("infini-train: interrupted", file=sys.stderr)
        return 130


def run_and_exit() -> NoReturn:
    """Run `main` and exit the process with its exit code."""
    replace_unencodable_characters()
    try:
        code = main()
    except BrokenPipeError:
        if _has_peer_ranks():
            _exit_immediately(1)
        code = 128 + signal.SIGPIPE  # the reader of stdout closed the pipe
    except Exception:
        if not _has_peer_ranks():
            raise
        sys.excepthook(*sys.exc_info())
        _exit_immediately(1)
    # The work is complete, so ignore SIGTERM: a launcher treats a rank killed by SIGTERM as one that never started.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def _has_peer_ranks() -> bool:
    """Return whether this process is in a process group with other ranks."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1


def _exit_immediately(code: int) -> NoReturn:
    """Exit without cleaning up the process groups.

    A clean NCCL shutdown waits for the other ranks, which wait for this rank in a collective: a deadlock.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_error(error: UserError) -> None:
    """Print the error on rank 0, and on the first rank of every other node.

    Errors that all ranks agreed on are printed by rank 0 only. Other errors may concern a single node.
    """
    if (rank := os.environ.get("RANK", "0")) == "0":
        print(f"infini-train: error: {error}", file=sys.stderr)
    elif os.environ.get("LOCAL_RANK", "0") == "0" and not isinstance(error, AgreedError):
        print(f"infini-train: error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check(run: RunConfig) -> None:
    """Check values, layout and data files, without importing torch."""
    from infini_train.data.dataset import check_dataset

    validate(run, _world_size())
    check_dataset(run)


def _check_initial_weights(run: RunConfig) -> None:
    """Check that a run without a checkpoint can start from `training.initial_weights`."""
    if run.training.initial_weights is None:
        return
    from infini_train.checkpoint.compatibility import check_initial_weights
    from infini_train.checkpoint.folder import list_checkpoints
    from infini_train.data.manifest import load_manifest
    from infini_train.planning.parameter_counts import model_parameters

    if not list_checkpoints(Path(run.run_dir)):
        check_initial_weights(run, load_manifest(Path(run.data.path)).tokenizer_fingerprint, model_parameters(run))


def _check_tokenizer(run: RunConfig) -> None:
    """Check a command that needs only the tokenizer in data.path, not the shards."""
    from infini_train.tokenizers.tokenizer_file import tokenizer_of

    validate(run, _world_size())
    tokenizer = tokenizer_of(run.data.path)
    if tokenizer.vocab_size != run.data.vocab_size:
        raise UserError(
            f"data.vocab_size is {run.data.vocab_size}, but {tokenizer.path} has {tokenizer.vocab_size} tokens; set "
            f"data.vocab_size to {tokenizer.vocab_size}"
        )


def _check_held_out(run: RunConfig) -> None:
    """Check `generate` without a prompt, which takes its prompt from the held-out split."""
    from infini_train.data.dataset import check_dataset

    _check_tokenizer(run)
    try:
        check_dataset(run, ("held_out",))
    except UserError as error:
        raise UserError(f"{error}; or give a prompt with --prompt, which needs no shards in {run.data.path}") from error


def _prepare(run: RunConfig, arguments: Namespace) -> int:
    from infini_train.config.validation import validate_data, validate_task
    from infini_train.data.preparation import prepare

    validate_data(run)
    validate_task(run)
    prepare(run, overwrite=arguments.overwrite)
    return 0


def _pretrain(run: RunConfig, arguments: Namespace) -> int:
    ignore_stream_errors()
    _check(run)
    _check_initial_weights(run)
    if run.checkpoint.copy_to is not None:
        from infini_train.checkpoint.remote import check_url

        check_url(run.checkpoint.copy_to)
    if arguments.check_only:
        return 0
    from infini_train.runtime import platform

    platform.install()
    from infini_train.training.loop import pretrain

    return pretrain(run)


def _evaluate(run: RunConfig, arguments: Namespace) -> int:
    if arguments.what == "passkey":
        return _evaluate_passkey(run, arguments)
    if arguments.what == "compare":
        return _evaluate_compare(run)
    return _with_model(run, arguments, lambda commands, run, checkpoint: commands.evaluate(run, checkpoint))


def _evaluate_passkey(run: RunConfig, arguments: Namespace) -> int:
    def measure(commands: Any, run: RunConfig, checkpoint: Path) -> None:
        from infini_train.evaluation import retrieval_command

        retrieval_command.evaluate_passkey(retrieval_command.evaluation_run(run, _world_size()), checkpoint)

    return _with_model(run, arguments, measure, _check_tokenizer)


def _evaluate_compare(run: RunConfig) -> int:
    if _world_size() > 1:
        raise UserError("evaluate compare starts one process for each of its runs; call it without a launcher")
    validate_compare(run)
    from infini_train.evaluation import comparison as compare

    for each in compare.compare_runs(run):
        try:
            validate(each.run, 1)
        except UserError as error:
            raise UserError(f"compare.variants {each.variant!r}: {error}") from error
    _check(run)
    return compare.compare(run)


def _generate(run: RunConfig, arguments: Namespace) -> int:
    prompt = arguments.prompt
    _check_sampling(arguments)
    if arguments.prompt_file is not None:
        try:
            # Decode as `prepare` does: keep line ends and drop a byte order mark.
            prompt = Path(arguments.prompt_file).read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {arguments.prompt_file} cannot be read: {error}") from error
    if run.layout.pipeline_parallel_size > 1 and _world_size() > 1:
        raise UserError(
            f"layout.pipeline_parallel_size is {run.layout.pipeline_parallel_size}; generate does not support pipeline "
            "parallelism; start it as one process"
        )
    return _with_model(
        run,
        arguments,
        lambda commands, run, checkpoint: commands.generate(
            run,
            checkpoint,
            prompt,
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.top_k,
            arguments.sample_seed,
        ),
        _check_held_out if prompt is None else _check_tokenizer,
    )


def _check_sampling(arguments: Namespace) -> None:
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise UserError("--prompt and --prompt_file are both given; give one")
    try:
        (arguments.prompt or "").encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not text in UTF-8; put it into a file and use --prompt_file") from error
    if not (arguments.temperature == 0 or 0.001 <= arguments.temperature < math.inf):
        raise UserError(f"--temperature is {arguments.temperature}; use 0 for the most likely token, or at least 0.001")
    for name, least in (("top_k", 0), ("max_new_tokens", 1), ("sample_seed", 0)):
        if not least <= (value := getattr(arguments, name)) < 1 << 63:
            raise UserError(f"--{name} is {value}; use a number from {least} to 2^63 - 1")


def _with_model(
    run: RunConfig,
    arguments: Namespace,
    action: Callable[[Any, RunConfig, Path], Any],
    check: Callable[[RunConfig], None] = _check,
) -> int:
    from infini_train.runtime import platform

    platform.install()
    from infini_train.evaluation import commands
    from infini_train.runtime.files import check_writable

    run = commands.inference_layout(run, _world_size())
    check(run)
    checkpoint = commands.find_checkpoint(run, arguments.from_checkpoint)
    # run_dir may not exist yet: --from_checkpoint can name a checkpoint of another run.
    check_writable(Path(run.run_dir), f"run_dir {run.run_dir}")
    action(commands, run, checkpoint)
    return 0


def _checkpoint(arguments: Namespace) -> int:
    from infini_train.checkpoint import folder
    from infini_train.checkpoint import inspection as commands

    configured = read_config(*map(Path, arguments.config)) if arguments.config else RunConfig()
    run_dir = Path(configured.run_dir if arguments.run_dir is None else arguments.run_dir)
    if arguments.action == "list":
        if arguments.path is not None:
            raise UserError(
                f"--path is {arguments.path}, but list shows all checkpoints of --run_dir; leave --path out, or use inspect"
            )
        return commands.list_all(run_dir)
    paths = folder.list_checkpoints(run_dir) if arguments.path is None else [Path(arguments.path)]
    if arguments.path is not None and not paths[0].is_dir():
        raise UserError(
            f"--path {arguments.path}: there is no such folder; `infini-train checkpoint list` shows the checkpoints of a run"
        )
    if not paths:
        raise UserError(f"run_dir {run_dir} holds no checkpoint; name another --run_dir, or a folder with --path")
    if arguments.action == "verify":
        return commands.verify(paths)
    if arguments.action == "inspect":
        return commands.inspect(paths[-1])
    output = Path(arguments.output) if arguments.output else run_dir / f"{paths[-1].name}.safetensors"
    return commands.consolidate(paths[-1], output)


def _convert(arguments: Namespace) -> int:
    from infini_train.convert.conversion import convert

    print(*convert(Path(arguments.source), Path(arguments.output)), sep="\n")
    return 0


def _plan(run: RunConfig, arguments: Namespace) -> int:
    return planning.run_plan(run, arguments)


def _submit(run: RunConfig, arguments: Namespace) -> int:
    from infini_train.data.dataset import check_dataset

    def check(each: RunConfig) -> None:
        check_dataset(each)
        _check_initial_weights(each)

    return cluster.run_submit(run, arguments, check)


def _status(arguments: Namespace) -> int:
    return cluster.run_status(Path(arguments.run))


def _cancel(arguments: Namespace) -> int:
    return cluster.run_cancel(Path(arguments.run), now=arguments.now)


def _logs(arguments: Namespace) -> int:
    return cluster.run_logs(Path(arguments.run), lines=arguments.lines, follow=arguments.follow)


def _report(run: RunConfig, arguments: Namespace) -> int:
    from infini_train.report.run_report import write_report
    from infini_train.report.summary import summary_lines

    print(*summary_lines(Path(run.run_dir)), sep="\n")
    print(f"report: {write_report(Path(run.run_dir))}")
    return 0


if __name__ == "__main__":
    run_and_exit()
