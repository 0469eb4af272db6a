"""Cluster profiles: partition, GPUs and environment of a cluster, one YAML file each, in slurm/profiles/ or elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from infini_train.cluster.environment import is_secret, read_environment
from infini_train.config.messages import describe_parser_error
from infini_train.runtime.errors import UserError

PROFILES = Path(__file__).parents[2] / "slurm" / "profiles"


@dataclass(kw_only=True)
class ClusterProfile:
    """The settings of a cluster, or of one of its partitions."""

    partition: str | None = None
    """Partition or comma-separated partitions; null uses the cluster's default."""
    account: str | None = None
    """Account that the job is charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, in SLURM's syntax."""
    gpus_per_node: int = 8
    """GPUs that a job requests on each node, with one process per GPU; 0 for a cluster without GPUs."""
    gpu: str | None = None
    """GPU model by its name in `infini-train plan`. `submit` then refuses a job that does not fit in its GPU memory."""
    gpu_directive: str = "gpus-per-node"
    """Option that requests GPUs: gpus-per-node, or gres for older clusters."""
    processes_per_node: int | None = None
    """Processes on each node. null starts one per GPU; required if gpus_per_node is 0."""
    cpus_per_process: int = 8
    """CPU cores per process."""
    memory_per_node: str | None = None
    """Host memory on each node, such as 900G. 0 requests all of it; null uses the cluster's default."""
    exclusive: bool = True
    """Do not share nodes with other jobs."""
    time_limit: str = "24:00:00"
    """Time limit of one job, as HH:MM:SS or D-HH:MM:SS. Longer runs are requeued at the limit."""
    signal_seconds: int = 300
    """Seconds before the time limit at which a job is told to save. Must exceed the time of one step and one checkpoint."""
    max_restarts: int = 100
    """Requeues of a job for any reason, after which it stops."""
    max_failures: int = 3
    """Consecutive failures without a new checkpoint, after which it stops."""
    preflight: bool = True
    """Check every node (GPUs, disks, clock, bandwidth) before training, and exclude bad ones."""
    minimum_gigabytes_per_second: float = 0.0
    """Bandwidth between nodes in GB/s below which the preflight marks a node as bad; 0 only reports the bandwidth."""
    setup: list[str] = field(default_factory=list)
    """Shell commands that the job script runs first, on the host, such as `module load cuda/12.4`; without secrets."""
    python: str | None = None
    """Path of the ranks' Python interpreter: in the image with a container_image, else on the nodes. null uses the path of
    the interpreter that runs `submit`."""
    container_image: str | None = None
    """Image for the pyxis plugin's --container-image. Only the ranks run in it; the job script runs on the host."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts for --container-mounts. They must include the run directory, the data, this project and the folder in which
    `submit` is called, each under the same path as on the host."""
    environment_preset: str = "single_node"
    """NCCL and torch settings: a preset of launch/environments/ (see docs/launching.md), or the path of a file."""
    environment: dict[str, str] = field(default_factory=dict)
    """Additional variables, which override those of the preset."""

    @property
    def processes(self) -> int:
        """Number of processes on each node."""
        return self.processes_per_node if self.processes_per_node is not None else self.gpus_per_node

    def variables(self) -> dict[str, str]:
        """Return the environment of a job: the preset, overridden by the profile's own variables.

        Raises:
            UserError: see `read_environment`.
        """
        return {**read_environment(self.environment_preset), **self.environment}


def load_profile(name: str) -> ClusterProfile:
    """Load a profile by its name in slurm/profiles/, or by its path.

    Raises:
        UserError: the profile is unknown or unreadable, or has a value that SLURM or the shell would interpret.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in PROFILES.glob("*.yaml")))
        raise UserError(f"--profile {name}: there is no file {path}; known are {known}, or give a path that ends in .yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ClusterProfile)
    try:
        parsed = parser.instantiate_classes(parser.parse_path(path))
    except ArgumentError as error:
        if "Unexpected config" in str(error):
            raise UserError(f"--profile {path} holds no keys with values; slurm/profiles/ has files to start from") from error
        raise UserError(f"--profile {path}: {describe_parser_error(error).removeprefix('--config: ')}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--profile {path} is not text in UTF-8; slurm/profiles/ has files to start from") from error
    for key, kind in get_type_hints(ClusterProfile).items():
        if parsed[key] is None and type(None) not in get_args(kind):
            raise UserError(f"--profile {path}: {key} has no value; give it one, or leave it out")
    profile = ClusterProfile(**{key: parsed[key] for key in ClusterProfile.__dataclass_fields__})
    validate_profile(profile, str(path))
    return profile


# Values allowed in an #SBATCH line: no blank, no quote, no end of line, and no leading dash.
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+-]*")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:&|*()\[\]+-]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def time_seconds(key: str, value: str) -> int:
    """Convert a time limit to seconds.

    Raises:
        UserError: the value is not HH:MM:SS or D-HH:MM:SS.
    """
    found = _TIME.fullmatch(value)
    if found is None:
        raise UserError(f"{key} is {value!r}; write HH:MM:SS or D-HH:MM:SS, for example 24:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def validate_directive(key: str, value: str | None, pattern: re.Pattern[str] = _WORD) -> None:
    """Refuse a value that SLURM or a shell would interpret.

    Raises:
        UserError: the message names the key and the value.
    """
    if value is not None and pattern.fullmatch(value) is None:
        raise UserError(f"{key} is {value!r}; a job's options may contain only letters, digits and _ . , : @ / + -")


def validate_profile(profile: ClusterProfile, name: str) -> None:
    """Refuse a profile that cannot work or that contains a secret.

    Raises:
        UserError: the message names the file, the key, its value and the remedy.
    """
    for key in ("partition", "account", "qos", "memory_per_node"):
        validate_directive(f"{name}: {key}", getattr(profile, key))
    validate_directive(f"{name}: constraint", profile.constraint, _CONSTRAINT)
    if profile.gpu_directive not in ("gpus-per-node", "gres"):
        raise UserError(f"{name}: gpu_directive is {profile.gpu_directive!r}; it must be gpus-per-node or gres")
    if profile.processes < 1:
        raise UserError(f"{name}: gpus_per_node is {profile.gpus_per_node}; give processes_per_node, at least 1")
    if 0 < profile.gpus_per_node < profile.processes:
        raise UserError(
            f"{name}: processes_per_node is {profile.processes}, but gpus_per_node is {profile.gpus_per_node}, one for each "
            "process; lower it, or leave it out"
        )
    for key in ("cpus_per_process", "signal_seconds", "max_failures"):
        if getattr(profile, key) < 1:
            raise UserError(f"{name}: {key} is {getattr(profile, key)}; it must be at least 1")
    for key in ("gpus_per_node", "max_restarts", "minimum_gigabytes_per_second"):
        if getattr(profile, key) < 0:
            raise UserError(f"{name}: {key} is {getattr(profile, key)}; it must not be negative")
    time_seconds(f"{name}: time_limit", profile.time_limit)
    for key, value in profile.environment.items():
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) is None:
            raise UserError(f"{name}: environment has the name {key!r}; names are letters, digits and _")
        if is_secret(key):
            raise UserError(
                f"{name}: environment has {key}, which looks like a secret; set it where you call `submit`: jobs inherit it"
            )
        if "\n" in value or "\0" in value:
            raise UserError(f"{name}: environment.{key} has more than one line; write one")
