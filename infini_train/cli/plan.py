"""`infini-train plan`: show the resources that a run needs."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.configuration import add_config_keys, add_config_option, run_config
from infini_train.planning.layout_plan import PLANNED_ATTENTION, plan
from infini_train.planning.plan_text import plan_lines, search_lines
from infini_train.planning.refusal import refuse_no_layout, refuse_too_large
from infini_train.planning.search import layout_options, search
from infini_train.runtime.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_config_option(parser)
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs of the job; each has one process")
    parser.add_argument("--gpu", type=str, required=True, help="GPU type: a100-40gb, a100-80gb, h100-80gb or h200-141gb")
    parser.add_argument("--search", action="store_true", help="rank the layouts of this run that fit")
    parser.add_argument("--top", type=int, default=10, help="number of layouts that --search shows")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="run the real code of one rank on meta tensors and compare it with the plan",
    )
    parser.add_argument("--rank", type=int, default=0, help="rank that --dry-run runs")
    add_config_keys(parser)


def run_command(arguments: Namespace) -> int:
    """Print the plan, the ranked layouts or the comparison with a dry run.

    Returns:
        The exit code.

    Raises:
        UserError: the run is not valid or does not fit. The message lists changes that make it fit.
    """
    run = run_config(arguments)
    if arguments.gpus < 1 or arguments.top < 1:
        raise UserError(f"--gpus is {arguments.gpus} and --top {arguments.top}; both must be positive")
    if run.model.attention not in PLANNED_ATTENTION:
        raise UserError(
            f"model.attention is {run.model.attention}, whose memory and time cannot be planned; "
            f"{', '.join(PLANNED_ATTENTION)} can"
        )
    if arguments.search:
        found = search(run, arguments.gpus, arguments.gpu, arguments.top)
        if not found:
            refuse_no_layout(run, arguments.gpus, arguments.gpu)
        print(*search_lines(found), sep="\n")
        print(f"the first: {' '.join(layout_options(found[0], run)) or 'as the run has it'}")
        return 0
    planned = plan(run, arguments.gpus, arguments.gpu)
    if arguments.dry_run:
        if not 0 <= arguments.rank < arguments.gpus:
            raise UserError(f"--rank is {arguments.rank}; the job has ranks 0 to {arguments.gpus - 1}")
        layout = run.layout
        if layout.zero_stage == 3 or layout.offload_optimizer:
            key = "offload_optimizer is true" if layout.offload_optimizer else "zero_stage is 3"
            raise UserError(
                f"layout.{key}, for which DeepSpeed reads tensor values on the host, but meta tensors of a dry run have none; "
                "plan it without --dry_run"
            )
        # Import here: torch, Megatron-core and DeepSpeed take seconds to load, and only the dry run needs them.
        from infini_train.planning.dry_run.check import compare_dry_run

        return compare_dry_run(planned, arguments.rank)
    refuse_too_large(planned)
    print(*plan_lines(planned), sep="\n")
    return 0
