"""`infini-train report`: write report.html of a run directory."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from infini_train.cli.configuration import add_run_dir_options, run_dir_of


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of the command."""
    add_run_dir_options(parser)


def run_command(arguments: Namespace) -> int:
    """Run the command and return its exit code."""
    run_dir = run_dir_of(arguments)
    from infini_train.report.run_report import write_report
    from infini_train.report.summary import summary_lines

    print(*summary_lines(run_dir), sep="\n")
    print(f"report: {write_report(run_dir)}")
    return 0
