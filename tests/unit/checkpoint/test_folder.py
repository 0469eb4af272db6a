"""Commit protocol, safe reading, and the checkpoint command, on real folders in one process."""

from __future__ import annotations

import errno
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from infini_train.checkpoint import folder, writer
from infini_train.checkpoint.reader import read_whole
from infini_train.checkpoint.remote import copy_to_url
from infini_train.checkpoint.weights_file import read_weights_facts
from infini_train.cli.main import main
from infini_train.runtime.errors import UserError

WEIGHTS = {
    "model.a.weight": torch.arange(12.0).view(3, 4),
    "model.fc1.weight.0": torch.ones(2, 3),
    "model.fc1.weight.1": torch.zeros(2, 3),
    "exp_avg.a.weight": torch.zeros(3, 4),
}


def write(run_dir: Path, step: int) -> Path:
    partial = folder.start_folder(run_dir, step)
    dcp.save(dict(WEIGHTS), storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    facts = {"step": step, "tokens": 7, "config": {"model": {}}, "tokenizer_fingerprint": "f00d", "versions": {"torch": "2"}}
    folder.write_durably(partial / folder.STATE_FILE, json.dumps(facts))
    return folder.commit(partial, {path.name: folder.describe_file(path) for path in partial.iterdir()})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped byte": (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp does not have the checksum"),
    "truncated shard": (lambda path: (path / "__0_0.distcp").write_bytes(b"x"), "__0_0.distcp has 1 bytes instead of"),
    "deleted shard": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp cannot be read: No such file"),
    "empty metadata": (lambda path: (path / ".metadata").write_bytes(b""), ".metadata has 0 bytes instead of"),
    "changed state": (lambda path: flip(path / "state.json"), "state.json does not have the checksum"),
    "changed manifest": (lambda path: flip(path / "manifest.json"), "COMMITTED does not fit manifest.json"),
    "no marker": (lambda path: (path / "COMMITTED").unlink(), "COMMITTED is missing: it was never finished"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_reported(name, tmp_path, capsys):
    path = write(tmp_path, 5)
    assert folder.damage(path) == []
    assert main(["checkpoint", "verify", "--path", str(path)]) == 0
    harm, words = DAMAGE[name]
    harm(path)
    assert words in "; ".join(folder.damage(path))
    capsys.readouterr()
    assert main(["checkpoint", "verify", "--path", str(path)]) == 1
    assert words in capsys.readouterr().out
    assert main(["checkpoint", "inspect", "--path", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_only_committed_folders_are_checkpoints(tmp_path):
    """Unfinished folders, remains of an interrupted commit and broken links are not listed."""
    write(tmp_path, 5)
    folder.start_folder(tmp_path, 10)
    (write(tmp_path, 15) / "COMMITTED").unlink()
    (folder.checkpoint_root(tmp_path) / "latest").symlink_to("step_00000099")
    (folder.checkpoint_root(tmp_path) / "step_00000099").symlink_to("nowhere")
    assert [path.name for path in folder.list_checkpoints(tmp_path)] == ["step_00000005"]


def test_list_shows_folders_in_every_state(tmp_path, capsys):
    write(tmp_path, 5)
    (write(tmp_path, 10) / "state.json").write_text("{")
    (write(tmp_path, 15) / "COMMITTED").unlink()
    assert main(["checkpoint", "list", "--run_dir", str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "step_" in line]
    assert [word in row for row, word in zip(rows, ("committed", "damaged", "not"), strict=True)] == [True, True, True]


def test_list_compares_names_and_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    (write(tmp_path, 5) / "__0_0.distcp").unlink()
    (write(tmp_path, 10) / "__0_0.distcp").write_bytes(b"x")
    write(tmp_path, 15)
    monkeypatch.setattr(folder, "damaged_file", None)  # list computes no checksums
    assert main(["checkpoint", "list", "--run_dir", str(tmp_path)]) == 0
    missing, short, whole = (line for line in capsys.readouterr().out.splitlines() if "step_" in line)
    assert "damaged: __0_0.distcp is missing; it will not be used" in missing and " 5 " in missing
    assert "damaged: __0_0.distcp has 1 bytes instead of" in short
    assert "committed" in whole


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("weights.bin", "give it a name that ends in .safetensors"),
        ("nowhere/weights.safetensors", "there is no folder"),
        ("there.safetensors", "exists; name another file"),
    ],
)
def test_unwritable_output_is_refused_before_weights_are_read(output, words, tmp_path, capsys):
    path = write(tmp_path, 5)
    (tmp_path / "there.safetensors").touch()
    assert main(["checkpoint", "consolidate", "--path", str(path), "--output", str(tmp_path / output)]) == 2
    assert words in capsys.readouterr().err


def test_retention(tmp_path):
    for step in (10, 20, 25, 30, 40):
        write(tmp_path, step)
    folder.start_folder(tmp_path, 35)
    folder.retain(tmp_path, newest=40, keep=2, keep_every=20)
    assert sorted(path.name[5:] for path in folder.checkpoint_root(tmp_path).iterdir()) == ["00000020", "00000030", "00000040"]


def test_retention_sets_aside_checkpoints_newer_than_the_resumed_one(tmp_path):
    """The run resumed from step 20, because 30 and 40 could not be read, and saved step 25.

    The files of 30 and 40 are kept, because the storage may have failed.
    """
    for step in (10, 20, 25, 30, 40):
        write(tmp_path, step)
    for _ in range(2):  # the second time, a folder of that name was set aside before
        folder.retain(tmp_path, newest=25, keep=2, keep_every=10)
        names = sorted(path.name[5:] for path in folder.checkpoint_root(tmp_path).iterdir())
        assert names == ["00000010", "00000020", "00000025", "00000030.damaged", "00000040.damaged"]
        assert [path.name for path in folder.list_checkpoints(tmp_path)][-1] == "step_00000025"
        write(tmp_path, 40)


@pytest.mark.parametrize("seconds", [1, 1000])
def test_checkpoint_with_unreadable_marker_is_not_deleted(seconds, tmp_path, monkeypatch):
    """The storage fails for the given seconds while retention deletes an older checkpoint."""
    paths, now, real = [write(tmp_path, step) for step in (10, 20, 30)], [0], Path.read_text

    def failing_read(path: Path, *arguments, **options) -> str:
        if path == paths[1] / "COMMITTED" and now[0] < seconds:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", failing_read)
    monkeypatch.setattr(time, "sleep", lambda waited: now.__setitem__(0, now[0] + waited))
    folder.retain(tmp_path, newest=30, keep=2, keep_every=0)
    assert folder.list_checkpoints(tmp_path) == paths[1:]
    monkeypatch.undo()
    assert folder.damage(paths[1]) == []


def test_list_shows_checkpoints_that_were_set_aside(tmp_path, capsys):
    write(tmp_path, 10)
    folder.set_aside(write(tmp_path, 20))
    assert main(["checkpoint", "list", "--run_dir", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "set aside" in said and said.count("committed") == 1


def test_writer_does_not_use_the_gpu(tmp_path):
    """Copy-ahead would use GPU 0 in every process."""
    assert writer._Files(tmp_path, writer.Save(1, 0.0)).per_thread_copy_ahead == 0


def test_error_line_prefers_the_os_error():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904
    except RuntimeError as error:
        assert writer._one_line(error) == "[Errno 28] No space left on device"
    assert writer._one_line(RuntimeError("first\nlast")) == "last"


def test_interrupted_deletion_leaves_no_committed_checkpoint(tmp_path, monkeypatch):
    path = write(tmp_path, 5)
    monkeypatch.setattr(folder.shutil, "rmtree", lambda *_, **__: None)
    folder.delete(path)
    assert path.is_dir() and folder.list_checkpoints(tmp_path) == []


def recommit(path: Path) -> None:
    """Commit a tampered folder again, as an attacker would."""
    (path / "COMMITTED").unlink()
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    manifest = {"format_version": folder.FORMAT_VERSION, "files": {file.name: folder.describe_file(file) for file in files}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    folder.write_marker(path)


class Evil:
    """A payload that creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_malicious_metadata_is_refused(tmp_path):
    path = write(tmp_path, 5)
    (path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    recommit(path)
    assert folder.damage(path) == []
    with pytest.raises(UserError, match=r"\.metadata is refused: it refers to "):
        read_whole(path, ["model.a.weight"])
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "the payload does not work, so the test proves nothing"


def test_malicious_shard_and_bytes_entries_are_refused(tmp_path):
    """torch loads tensors with weights_only=True, but would unpickle entries of bytes without it."""
    path = write(tmp_path, 5)
    partial = folder.start_folder(tmp_path, 6)
    dcp.save({"model.a.weight": Evil(tmp_path / "ran")}, storage_writer=dcp.FileSystemWriter(partial), no_dist=True)
    other = folder.commit(partial, {file.name: folder.describe_file(file) for file in partial.iterdir()})
    with pytest.raises(UserError, match=r"it refers to .*BytesStorageMetadata"):
        read_whole(other, ["model.a.weight"])
    shard = path / "__0_0.distcp"
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    planted = (tmp_path / "evil.pt").read_bytes()
    shard.write_bytes(planted + bytes(max(0, shard.stat().st_size - len(planted))))
    recommit(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_whole(path, ["model.a.weight"])
    assert not (tmp_path / "ran").exists()


def test_files_outside_the_manifest_are_refused(tmp_path):
    path = write(tmp_path, 5)
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    recommit(path)
    with pytest.raises(UserError, match=r"\.\./\.\./elsewhere is not in the manifest"):
        read_whole(path, ["model.a.weight"])


def test_list_inspect_consolidate(tmp_path, capsys):
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    folder.start_folder(tmp_path, 15)
    assert main(["checkpoint", "list", "--run_dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step_00000010" in shown and "not committed" in shown
    assert main(["checkpoint", "inspect", "--run_dir", str(tmp_path)]) == 0
    assert "24 parameters" in capsys.readouterr().out
    output = tmp_path / "weights.safetensors"
    assert main(["checkpoint", "consolidate", "--run_dir", str(tmp_path), "--output", str(output)]) == 0
    weights = load_file(output)
    assert weights.keys() == {"a.weight", "fc1.weight"}
    assert torch.equal(weights["a.weight"], WEIGHTS["model.a.weight"])
    assert torch.equal(weights["fc1.weight"], torch.cat([torch.ones(2, 3), torch.zeros(2, 3)]))
    facts = read_weights_facts(output)
    assert facts == {"step": 10, "config": {"model": {}}, "tokenizer_fingerprint": "f00d"}
    assert main(["checkpoint", "consolidate", "--path", str(newest), "--output", str(output)]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_invalid_weights_file_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="there is no such file"):
        read_weights_facts(path)
    path.write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"weights\.safetensors: .*; write it again"):
        read_weights_facts(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match="does not say which tokenizer"):
        read_weights_facts(path)


def test_copy_to_url_is_a_valid_checkpoint(tmp_path):
    path = write(tmp_path / "run", 5)
    copy_to_url(path, f"file://{tmp_path}/archive")
    assert folder.damage(tmp_path / "archive" / "step_00000005") == []
