"""Files are written whole or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from volseg.errors import EnvironmentProblem
from volseg.io.files import (
    TEMPORARY_PREFIX,
    atomic_write,
    sha256_of,
    write_bytes_atomic,
    write_json_atomic,
)


@pytest.fixture
def target(tmp_path) -> Path:
    path = tmp_path / "result.csv"
    path.write_bytes(b"old")
    return path


def failing(error: BaseException):
    def write(file):
        file.write(b"half of the n")
        raise error

    return write


def untouched(target: Path) -> bool:
    return target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]


def test_verify_reads_new_contents_under_another_name_before_they_replace_the_old(target):
    calls = []

    def verify(path):
        calls.append((path, path.read_bytes()))

    atomic_write(target, lambda file: file.write(b"new") and None, verify)
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]
    ((temporary, contents),) = calls
    assert contents == b"new"
    assert temporary.parent == target.parent  # os.replace is atomic only inside one file system
    assert temporary.name.startswith(TEMPORARY_PREFIX)
    assert TEMPORARY_PREFIX == ".tmp-"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyboardInterrupt(), SystemExit(3), MemoryError()]
)
@pytest.mark.parametrize("moment", ["write", "verify"])
def test_any_exception_passes_through_and_leaves_nothing(error, moment, target):
    def verify(_):
        raise error

    with pytest.raises(type(error)):
        if moment == "write":
            atomic_write(target, failing(error))
        else:
            atomic_write(target, lambda file: None, verify)
    assert untouched(target)


@pytest.mark.parametrize(
    "number, code",
    [
        (errno.ENOSPC, "E_DISK"),
        (errno.EDQUOT, "E_DISK"),
        (errno.EFBIG, "E_DISK"),
        (errno.EIO, "E_DISK"),
        (errno.EACCES, "E_PERM"),
        (errno.EROFS, "E_PERM"),
    ],
)
def test_a_failing_disk_is_an_environment_problem(number, code, target):
    with pytest.raises(EnvironmentProblem) as caught:
        atomic_write(target, failing(OSError(number, os.strerror(number))))
    assert (caught.value.code, caught.value.exit_code) == (code, 5)
    assert str(target) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert untouched(target)


def test_failing_rename_leaves_nothing(tmp_path):
    (tmp_path / "result.csv").mkdir()
    with pytest.raises(EnvironmentProblem) as caught:
        write_bytes_atomic(tmp_path / "result.csv", b"x")
    assert caught.value.code == "E_PERM"
    assert [path.name for path in tmp_path.iterdir()] == ["result.csv"]


@pytest.mark.parametrize("place", ["missing/result.csv", "file/result.csv"])
def test_missing_folder(place, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem) as caught:
        write_bytes_atomic(tmp_path / place, b"x")
    assert (caught.value.code, caught.value.exit_code) == ("E_MISSING", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bytes_that_read_back_differently_are_refused(target, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"damaged by the disk")
    with pytest.raises(EnvironmentProblem, match="read back differ"):
        write_bytes_atomic(target, b"new")
    monkeypatch.undo()
    assert untouched(target)


def test_contents_are_synced_before_the_rename_and_the_rename_before_the_return(
    target, monkeypatch
):
    calls = []
    for name, call in (("fsync", os.fsync), ("replace", os.replace)):

        def recorded(*arguments, name=name, call=call):
            calls.append(name)
            return call(*arguments)

        monkeypatch.setattr(os, name, recorded)
    write_bytes_atomic(target, b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_killed_process_leaves_the_old_file(target):
    code = f"""
import os, pathlib
from volseg.io.files import atomic_write
def write(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
atomic_write(pathlib.Path({str(target)!r}), write)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == -9
    assert target.read_bytes() == b"old"
    (temporary,) = (path for path in target.parent.iterdir() if path != target)
    assert temporary.name.startswith(TEMPORARY_PREFIX)  # hidden; the next run deletes it


def test_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes_atomic(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_text_is_utf8(tmp_path):
    write_bytes_atomic(tmp_path / "a.csv", "volume_mm³\n")
    assert (tmp_path / "a.csv").read_bytes() == b"volume_mm\xc2\xb3\n"


def test_json_round_trip_and_no_nan(target):
    value = {"z": [1, 2.5, None], "a": "mm³ – Größe"}
    write_json_atomic(target, value)
    text = target.read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert list(json.loads(text)) == ["z", "a"]
    assert "mm³" in text and text.endswith("}\n")
    before = target.read_bytes()
    with pytest.raises(ValueError):
        write_json_atomic(target, {"dice": float("nan")})
    assert target.read_bytes() == before


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "a") == expected
