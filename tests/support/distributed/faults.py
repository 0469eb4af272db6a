"""A rank of a run with a real fault at a chosen point: `python -m tests.support.distributed.faults FAULT ...`.

FAULT is NAME@RANK@STEP. The run uses the product's code; this module only injects the fault.
"""

from __future__ import annotations

import atexit
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint import filesystem

from infini_train.checkpoint import folder, writer
from infini_train.cli import main as cli

WRITE_DATA, WRITE_ITEM = writer._Files.write_data, filesystem._write_item


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_twice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def when_writing(step: int, action: Callable[[], None]) -> None:
    """Run an action on the writing thread, before the first byte of this rank's share."""

    def write_data(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self._save.step == step:
            action()
        return WRITE_DATA(self, *arguments, **keywords)

    writer._Files.write_data = write_data


def kill_inside_a_shard(step: int) -> None:
    """Kill this rank after it has written the third tensor of its file."""
    written = 0

    def write_item(*arguments: Any, **keywords: Any) -> Any:
        nonlocal written
        result = WRITE_ITEM(*arguments, **keywords)
        written += 1
        if written == 3:
            os.sync()
            kill()
        return result

    def arm() -> None:
        filesystem._write_item = write_item

    when_writing(step, arm)


def kill_instead_of(name: str, step: int) -> None:
    original = getattr(folder, name)

    def killed(path: Any, *arguments: Any) -> Any:
        if name == "retain" and not folder.is_committed(folder.checkpoint_root(path) / folder.folder_name(step)):
            return original(path, *arguments)
        if name == "write_marker" and path.name != folder.folder_name(step):
            return original(path, *arguments)
        kill()
        return None

    setattr(folder, name, killed)


def no_space() -> None:
    """Limit the size of this process's files to 8 KiB, so that larger writes fail."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


def some_space() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def when_evaluating(step: int, action: Callable[[], None]) -> None:
    """Run an action at the start of the evaluation after this step."""
    from infini_train.training import loop

    held_out_loss, evaluate = loop.held_out_loss, loop._evaluate_when_due
    now = 0

    def remember(parts: Any, record: Any, progress: Any) -> None:
        nonlocal now
        now = record["step"]
        evaluate(parts, record, progress)

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        if now == step:
            action()
        return held_out_loss(*arguments, **keywords)

    loop.held_out_loss, loop._evaluate_when_due = interrupted, remember


def only_at(step: int, action: Callable[[], None], otherwise: Callable[[], None]) -> None:
    def write_data(self: Any, *arguments: Any, **keywords: Any) -> Any:
        (action if self._save.step == step else otherwise)()
        return WRITE_DATA(self, *arguments, **keywords)

    writer._Files.write_data = write_data


def before_reading(step: int, action: Callable[[], None]) -> None:
    """Run an action before this rank reads the data of a step."""
    from infini_train.training import step as training_step

    read = training_step._next

    def act_and_read(parts: Any) -> Any:
        if parts.state.step + 1 == step:
            action()
        return read(parts)

    training_step._next = act_and_read


def fail_alone() -> None:
    """Raise an exception on this rank alone; print a line if it destroys its process groups."""
    from infini_train.parallel import layout

    leave = layout.dist.destroy_process_group
    layout.dist.destroy_process_group = lambda: print("left its groups") or leave()
    raise RuntimeError("on purpose")


def leave_with_a_hang() -> None:
    """Fail and hang at exit, as with NCCL waiting for the other ranks: the watchdog has ended, but the process has not."""
    atexit.register(time.sleep, 3600)
    cli._exit_immediately = lambda code: sys.exit(code)
    raise RuntimeError("on purpose")


def replace_data() -> None:
    """Replace the data by other documents, as a user does who thinks that the run is finished."""
    other = ["--data.max_text_mb", "0.03", "--overwrite"]
    subprocess.run([sys.executable, "-m", "infini_train", "prepare", *sys.argv[2:], *other], check=True, capture_output=True)


FAULTS: dict[str, Callable[[int], None]] = {
    "kill_before_shards": lambda step: when_writing(step, kill),
    "kill_inside_a_shard": kill_inside_a_shard,
    "kill_before_marker": lambda step: kill_instead_of("write_marker", step),
    "kill_before_retention": lambda step: kill_instead_of("retain", step),
    "no_space_once": lambda step: only_at(step, no_space, some_space),
    "no_space_from_then_on": lambda step: when_writing(step, no_space),
    # The process is alive, but its training thread waits for a file system that does not answer.
    "hang_in_data": lambda step: before_reading(step, lambda: time.sleep(3600)),
    "fail_in_data": lambda step: before_reading(step, fail_alone),
    "leave_in_data": lambda step: before_reading(step, leave_with_a_hang),
    "stall": lambda step: when_writing(step, lambda: time.sleep(3600)),
    "terminate_in_save": lambda step: when_writing(step, terminate_twice),
    "terminate_in_evaluation": lambda step: when_evaluating(step, terminate_twice),
    "replace_data_in_evaluation": lambda step: when_evaluating(step, replace_data),
}

if __name__ == "__main__":
    fault, rank, step = sys.argv[1].split("@")
    if os.environ["RANK"] == rank:
        FAULTS[fault](int(step))
    sys.argv[1:] = sys.argv[2:]
    cli.run_and_exit()
