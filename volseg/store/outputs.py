"""Output folders: one run at a time writes to a folder and never touches the user's files in it.

`.volseg/ledger.jsonl` lists each output with its SHA-256 before it appears under its name. A file
is volseg's as long as the ledger lists its current hash for its path; every other file is the
user's. Files appear in commits: volseg writes them to a temporary folder, lists them in the ledger
and renames them together. A commit happens entirely or not at all, however the process ends.

The ledger does not list two kinds of files. Of a work folder it lists the folder; volseg deletes
only files there whose names volseg uses. volseg never replaces or deletes the TensorBoard events in
`tensorboard/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, Self

from filelock import FileLock, Timeout

from volseg import __version__
from volseg.errors import EnvironmentProblem, VolsegError
from volseg.inputs import open_regular, parse_json, read_json
from volseg.io.files import (
    RECORDS,
    environment_problem,
    make_folder,
    read_back_problem,
    refuse_file,
    sha256_of,
    sync_file,
    sync_folder,
)
from volseg.words import format_list

LEDGER, LOCK = "ledger.jsonl", "lock"
MANIFEST = "manifest.json"
MODEL = "a model"
SAME_KIND = {  # command → content of its folder; commands with the same content may share a folder
    "infer": "the results of infer",
    "infer-images": "predictions of images",
    "measure": "the results of measure",
    "compare": "a comparison",
    "evaluate": "an evaluation",
    "explain": "explained images",
    "check": "a check of scans",
    "preprocess": "a prepared dataset",
    "train": MODEL,
    "import-nnunet": MODEL,
    "quantise": MODEL,
    "attach": MODEL,
    "candidates": "a dataset of predicted lesions",
}
BUFFER_BYTES = 2**20
MAX_LINE_BYTES = 2**16  # in the ledger
MAX_LISTED = 5  # paths in a message


class OutputFolder:
    """A folder that one run locks and writes to; use it in a `with` statement.

    Args:
        path: the folder; created if missing.
        command: the command that writes it, a key of `SAME_KIND`; None accepts any volseg folder.
        inputs: files and folders that the run reads; outputs must not replace or lie in them.
    """

    def __init__(self, path: Path, command: str | None, inputs: Iterable[Path] = ()) -> None:
        self.path = path
        self.command = command
        self.inputs = tuple(inputs)
        self.run_id = secrets.token_hex(8)
        self._records = path / RECORDS
        self._lock = FileLock(self._records / LOCK, timeout=0)
        self._guard = threading.Lock()  # the writer thread and the main thread both commit
        self._hashes: dict[str, set[str]] = {}
        self._commits = 0
        self._work: list[Path] = []
        # Folders that this run created; deleted again if it writes nothing.
        self._created: list[Path] = []

    # ---- locking

    def __enter__(self) -> Self:
        """Lock the folder, and finish or discard the commits of a killed run.

        Raises:
            VolsegError: the folder holds something else (`E_EXISTS`).
            EnvironmentProblem: another run uses it, or it is not writable.
        """
        self._check_kind()
        self._created = [folder for folder in (self._records, self.path) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._records.mkdir(exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise EnvironmentProblem(
                f"{self.path}: in use by another run",
                fix="wait until that run ends, or give another --out",
                code="E_LOCKED",
            ) from error
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path}: not writable ({error.strerror})",
                fix="give a folder that you may write to",
                code="E_PERM",
            ) from error
        try:
            self._check_kind()
            self._open_ledger()
            self._recover()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            shutil.rmtree(self._scratch, ignore_errors=True)
            for folder in self._work:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # fails unless empty
            has_outputs = bool(self._hashes) or any(map(os.path.lexists, self._work))
            if self._records in self._created and not has_outputs:
                (self._records / LEDGER).unlink(missing_ok=True)
                (self._records / LOCK).unlink(missing_ok=True)
                for folder in self._created:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # fails unless empty
        finally:
            self._lock.release()

    @property
    def _scratch(self) -> Path:
        """Temporary folder of this run."""
        return self._records / f"tmp-{self.run_id}"

    def _check_kind(self) -> None:
        """Check that the folder is new, or volseg's and of a command of the same kind."""
        refuse_file(self.path)
        if os.path.lexists(self._records) and not _is_ours(self._records):
            fix = "move it away, or give another folder"
            raise _exists([self._records], "was not made by volseg", fix)
        content = folder_content(self.path)
        if content is not None and self.command is not None and content != SAME_KIND[self.command]:
            raise VolsegError(
                f"{self.path}: holds {content}", fix="give another folder to --out", code="E_EXISTS"
            )

    def _open_ledger(self) -> None:
        path = self._records / LEDGER
        self._hashes = {name: set(hashes) for name, hashes in _read_hashes(path).items()}
        with self._written(path):
            line = {"run": self.run_id, "volseg": __version__}
            self._append([line if self.command is None else line | {"command": self.command}])

    def _recover(self) -> None:
        """Finish the decided commits of killed runs and delete their temporary files."""
        runs = _read_texts(self._records / LEDGER, "run")
        for ready in sorted(self._records.glob("ready-*")):
            if ready.name.split("-")[1] in runs and ready.is_dir() and not ready.is_symlink():
                self._apply(ready)
        for scratch in self._records.glob("tmp-*"):
            if scratch.name.removeprefix("tmp-") in runs and not scratch.is_symlink():
                shutil.rmtree(scratch, ignore_errors=True)

    # ---- existing files

    def is_own(self, name: str) -> bool:
        """Check whether the file `name` in the folder exists and is as volseg wrote it."""
        path = self._confined(name)
        try:
            is_file = stat.S_ISREG(os.lstat(path).st_mode)
            return is_file and name in self._hashes and sha256_of(path) in self._hashes[name]
        except OSError:
            return False

    def check_overwrites(self, names: Iterable[str]) -> None:
        """Check, before any work, that outputs with these names would replace no user's file.

        Raises:
            VolsegError: `E_EXISTS`; names the files in the way, or the output that is an input.
        """
        names = list(dict.fromkeys(names))
        self._check_inputs(names)
        blocked = [self.path / name for name in names if self._is_blocked(name)]
        if blocked:
            fix = "move or rename it, or give another folder to --out"
            problem = "already exists, and volseg did not write it or it was changed since"
            raise _exists(blocked, problem, fix)

    def _is_blocked(self, name: str) -> bool:
        """Check whether a user's file is in the way of an output or of a folder for it."""
        path = self._confined(name)
        if os.path.lexists(path):
            return not self.is_own(name)
        parents = [self.path / part for part in path.relative_to(self.path).parents]
        return any(os.path.lexists(parent) and not parent.is_dir() for parent in parents)

    def _check_inputs(self, names: Sequence[str]) -> None:
        """Check that no output would replace an input or lie in a folder of inputs."""
        files = {_identity(path) for path in self.inputs if not path.is_dir()}
        folders = self._input_folders()
        for name in names:
            output = self.path / name
            if _identity(output) in files or output.parent.resolve() in folders:
                raise VolsegError(
                    f"{output}: would overwrite an input of this run or lie in a folder of inputs",
                    fix="give another folder to --out",
                    code="E_EXISTS",
                )

    def _input_folders(self) -> set[Path]:
        """Return the folders given as inputs, and those of scans and masks below them or a table.

        The folder of a table itself may take results.
        """
        folders = {path.resolve() for path in self.inputs if path.is_dir()}
        tables = {path.resolve().parent for path in self.inputs if path.suffix == ".csv"}
        parents = {path.resolve().parent for path in self.inputs if not path.is_dir()}
        listed = {path for path in parents if not (folders | tables).isdisjoint(path.parents)}
        return folders | listed

    def _confined(self, name: str) -> Path:
        """Return the path of an output, checked because a record may come from a stranger."""
        return confined_path(self.path, name)

    # ---- writing

    @contextmanager
    def staged(self) -> Iterator[Commit]:
        """Yield a commit: its files appear together, or not at all unless it is finished."""
        with self._guard:
            self._commits += 1
            number = self._commits
        folder = self._scratch / str(number)
        with self._written(folder):
            folder.mkdir(parents=True)
        try:
            yield Commit(self, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write(self, name: str, content: bytes | str | Callable[[BinaryIO], None]) -> None:
        """Write one file, entirely or not at all."""
        with self.staged() as commit:
            commit.write(name, content)
            commit.finish()

    def work_folder(self, name: str) -> Path:
        """Create or reopen a folder in this one for intermediate files.

        Raises:
            VolsegError: volseg did not make the folder, or it is a link (`E_EXISTS`).
        """
        path = self._confined(name)
        is_listed = name in _read_texts(self._records / LEDGER, "folder")
        if path.is_symlink() or (os.path.lexists(path) and not is_listed):
            fix = "move or rename it, or give another folder"
            raise _exists([path], "was not made by volseg", fix)
        with self._written(path):
            self._append([{"folder": name}])
            path.mkdir(exist_ok=True)
        self._work.append(path)
        return path

    def remove(self, name: str) -> None:
        """Delete a file if it is as volseg wrote it."""
        if self.is_own(name):
            self._confined(name).unlink(missing_ok=True)

    def publish(self, folder: Path, hashes: Mapping[str, str], removed: Sequence[str]) -> None:
        """Rename the files of a commit into place.

        Args:
            folder: the temporary folder of the commit.
            hashes: path → SHA-256 of each file in `folder`.
            removed: files to delete if they are as volseg wrote them.
        """
        with self._guard:
            shown = [name for name in hashes if not _is_hidden(name)]
            blocked = [self.path / name for name in shown if self._is_blocked(name)]
            if blocked:
                fix = "move or rename it, then run again"
                raise _exists(blocked, "was changed during this run", fix)
            removed = [name for name in removed if name not in hashes and self.is_own(name)]
            ready = self._records / f"ready-{self.run_id}-{folder.name}"
            with self._written(self._records):
                self._announce(hashes)
                manifest = json.dumps({"files": list(hashes), "removed": removed})
                _write_synced(folder / MANIFEST, manifest)
                os.rename(folder, ready)  # from now on the commit is decided
                sync_folder(self._records)
            self._apply(ready)

    def _announce(self, hashes: Mapping[str, str]) -> None:
        """List files in the ledger before they appear."""
        self._append([{"path": name, "sha256": digest} for name, digest in hashes.items()])
        for name, digest in hashes.items():
            self._hashes.setdefault(name, set()).add(digest)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        path = self._records / LEDGER
        # A full disk or a power loss can truncate a line; the files that it lists never appeared.
        is_torn = path.is_file() and path.stat().st_size > 0 and not _ends_in_newline(path)
        with path.open("ab") as file:
            file.write(b"\n" * is_torn)
            file.writelines(map(_line, lines))
            file.flush()
            os.fsync(file.fileno())

    def _apply(self, ready: Path) -> None:
        """Carry out a decided commit; safe to repeat."""
        try:
            manifest = read_json(ready / MANIFEST)
            names = [str(name) for name in manifest["files"]]
            removed = [str(name) for name in manifest["removed"]]
        except (OSError, ValueError, KeyError, TypeError):
            names, removed = [], []
        for name in names:
            source, target = confined(ready, name), self._confined(name)
            if source is None or not source.is_file():
                continue  # renamed before the process was killed
            if self._is_blocked(name):
                if not _is_hidden(name):
                    problem = f"in the way of the finished {source}"
                    raise _exists([target], problem, "move it, then run again")
                os.rename(target, target.with_name(f"{target.name}.damaged-{self.run_id}"))
            with self._written(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
                sync_folder(target.parent)
        for name in removed:
            self.remove(name)
        shutil.rmtree(ready, ignore_errors=True)

    @contextmanager
    def _written(self, path: Path) -> Iterator[None]:
        """Convert an OSError into an EnvironmentProblem for this path."""
        try:
            yield
        except OSError as error:
            raise environment_problem(path, error) from error


class Commit:
    """Files that appear together, made by `OutputFolder.staged`."""

    def __init__(self, outputs: OutputFolder, folder: Path) -> None:
        self._outputs = outputs
        self._hashes: dict[str, str] = {}
        self.folder = folder

    def path(self, name: str) -> Path:
        """Return the temporary path of the output `name`, and create its folder.

        Raises:
            VolsegError: the name leads out of the folder, as a record from a stranger may do.
        """
        path = confined_path(self.folder, name)
        make_folder(path.parent)
        return path

    def write(self, name: str, content: bytes | str | Callable[[BinaryIO], None]) -> None:
        """Write one file: bytes, UTF-8 text, or what a function writes into the open file."""
        path = self.path(name)
        try:
            digest = _write_synced(path, content)
        except OSError as error:
            raise environment_problem(self._outputs.path / name, error) from error
        if sha256_of(path) != digest:
            raise read_back_problem(self._outputs.path / name)
        self._hashes[name] = digest

    def write_all(self, files: Mapping[str, bytes | str]) -> None:
        """Write files, given by name."""
        for name, content in files.items():
            self.write(name, content)

    def hashes(self) -> dict[str, str]:
        """Return path → SHA-256 of the files so far, and sync those not written by `write`."""
        for name in _files_below(self.folder):
            if name not in self._hashes:
                try:
                    with open(self.folder / name, "rb+") as file:
                        sync_file(file)
                except OSError as error:
                    raise environment_problem(self._outputs.path / name, error) from error
                self._hashes[name] = sha256_of(self.folder / name)
        return dict(self._hashes)

    def finish(self, *, last: str = "", removed: Iterable[str] = ()) -> None:
        """Make the files appear.

        Args:
            last: the file that appears last; its presence tells readers that all files exist.
            removed: files to delete if they are as volseg wrote them.

        Raises:
            VolsegError: a user's file is in the way (`E_EXISTS`); then no file appears.
            EnvironmentProblem: the disk is full; then no file appears.
        """
        hashes = self.hashes()
        if last in hashes:
            hashes[last] = hashes.pop(last)
        if hashes or removed:
            self._outputs.publish(self.folder, hashes, list(removed))


def trace_name(item: str) -> str:
    """Return the path, relative to the folder, of an item's traceback after a bug."""
    return f"{RECORDS}/{item}.traceback.txt"


def folder_content(path: Path) -> str | None:
    """Return the content of a volseg folder, such as `the results of infer`, else None."""
    lines = _read_lines(path / RECORDS / LEDGER)
    commands = [line["command"] for line in lines if "command" in line]
    return next((SAME_KIND[name] for name in commands if name in SAME_KIND), None)


def confined(folder: Path, name: str) -> Path | None:
    """Return `folder / name` if it lies in the folder after following links, else None."""
    parts = PurePosixPath(name).parts
    if not parts or any(part in ("..", "/") or "\0" in part or "\\" in part for part in parts):
        return None
    path = folder.joinpath(*parts)
    try:
        is_inside = path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):
        return None
    return path if is_inside else None


def confined_path(folder: Path, name: str) -> Path:
    """Return `folder / name`, which must lie in the folder.

    Raises:
        VolsegError: the path leads out of the folder (`E_EXISTS`).
    """
    path = confined(folder, name)
    if path is None:
        raise VolsegError(
            f"{folder / name}: leads out of the output folder",
            fix="replace the link with a folder, or give another folder to --out",
            code="E_EXISTS",
        )
    return path


def delete_written(
    folder: Path, is_intermediate: Callable[[str], bool] = lambda name: False
) -> None:
    """Delete volseg's files in a folder, its `.volseg`, and the folder if nothing else is in it.

    Args:
        is_intermediate: tells whether a path in the folder is a file of volseg that the ledger does
            not list.
    """
    if not folder.is_dir() or folder.is_symlink():
        return
    hashes = _read_hashes(folder / RECORDS / LEDGER)
    for name in _files_below(folder):
        path = confined(folder, name)
        if path is None or path.is_symlink():
            continue
        is_own = name in hashes and sha256_of(path) in hashes[name]
        if is_own or is_intermediate(name):
            path.unlink(missing_ok=True)
    if _is_ours(folder / RECORDS):
        shutil.rmtree(folder / RECORDS, ignore_errors=True)
    _delete_empty_folders(folder)


def _delete_empty_folders(folder: Path) -> None:
    """Delete a folder and its subfolders, except those that hold a file."""
    below = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for path in (*below, folder):
        with contextlib.suppress(OSError):
            path.rmdir()


def _is_hidden(name: str) -> bool:
    return name.startswith(f"{RECORDS}/")


def _is_ours(records: Path) -> bool:
    """Check whether volseg made a folder `.volseg`: its ledger lists a run, or it is empty."""
    if records.is_symlink() or not records.is_dir():
        return False
    ledger = records / LEDGER
    if ledger.is_symlink() or (ledger.exists() and not ledger.is_file()):
        return False
    if ledger.is_file() and ledger.stat().st_size:
        return any("run" in line for line in _read_lines(ledger))
    lock = records / LOCK
    return {path.name for path in records.iterdir()} <= {LOCK, LEDGER} and not (
        lock.exists() and lock.stat().st_size
    )


def _read_lines(ledger: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a ledger, without damaged ones: their files count as the user's."""
    try:
        with open_regular(ledger) as file:
            while text := file.readline(MAX_LINE_BYTES):
                with contextlib.suppress(ValueError):
                    line = parse_json(text)
                    if isinstance(line, dict):
                        yield line
    except OSError:
        return


def _read_hashes(ledger: Path) -> Mapping[str, set[str]]:
    hashes: defaultdict[str, set[str]] = defaultdict(set)
    for line in _read_lines(ledger):
        if isinstance(line.get("path"), str) and isinstance(line.get("sha256"), str):
            hashes[line["path"]].add(line["sha256"])
    return hashes


def _read_texts(ledger: Path, key: str) -> set[str]:
    """Return the values of `folder` or of `run` in all lines."""
    return {line[key] for line in _read_lines(ledger) if isinstance(line.get(key), str)}


def _files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder and its subfolders, relative to it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _identity(path: Path) -> tuple[int, int] | Path:
    """Return a value that is equal for two paths to the same file, also through links."""
    try:
        status = os.stat(path)
        return (status.st_dev, status.st_ino)
    except OSError:
        return path.resolve()


class _Hashing(io.RawIOBase):
    """A file that hashes the written bytes."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        n = self._file.write(data) or 0
        self.digest.update(memoryview(data)[:n])
        return n


def _write_synced(path: Path, content: bytes | str | Callable[[BinaryIO], None]) -> str:
    """Write a file and sync it to disk; return the SHA-256 of the bytes passed to the disk."""
    with open(path, "wb", buffering=0) as file:
        hashing = _Hashing(file)
        buffered = io.BufferedWriter(hashing, BUFFER_BYTES)
        if isinstance(content, str):
            # UTF-8 cannot encode a lone surrogate, which a label's name may contain.
            content = content.encode("utf-8", "replace")
        if callable(content):
            content(buffered)
        else:
            buffered.write(content)
        buffered.flush()
        os.fsync(file.fileno())
    return hashing.digest.hexdigest()


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode("ascii") + b"\n"


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _exists(paths: Sequence[Path], problem: str, fix: str) -> VolsegError:
    listed = format_list(list(map(str, paths)), MAX_LISTED)
    return VolsegError(f"{listed}: {problem}", fix=fix, code="E_EXISTS")
