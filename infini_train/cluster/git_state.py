"""Record the git state of the project at submission."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from infini_train.cluster.secrets import redact


def _git(project: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(project), *arguments], capture_output=True, text=True, check=False, errors="replace"
        )
    except OSError:
        return None
    return result.stdout if result.returncode == 0 else None


def git_state(project: Path) -> dict[str, object]:
    """Return the commit, the branch, the changed files, and the remote URL without user name and password."""
    commit = _git(project, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "reason": "the project is not in a git repository, or git is not on this machine"}
    remote = (_git(project, "remote", "get-url", "origin") or "").strip()
    return {
        "commit": commit.strip(),
        "branch": (_git(project, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "remote": re.sub(r"(?<=://)[^/@]*@", "", remote),
        "changed_files": (_git(project, "status", "--porcelain") or "").splitlines(),
    }


def write_git_state(project: Path, folder: Path) -> None:
    """Write git.json, and git.diff with the uncommitted changes. Secrets from the environment are redacted."""
    (folder / "git.json").write_text(redact(json.dumps(git_state(project), indent=1)) + "\n", encoding="utf-8")
    (folder / "git.diff").write_text(redact(_git(project, "diff", "HEAD") or ""), encoding="utf-8")
