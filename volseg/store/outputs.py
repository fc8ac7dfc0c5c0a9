"""An output folder: held by one run, and nothing in it that volseg did not write is ever replaced or deleted.

`.volseg/ledger.jsonl` lists every file before it appears under its name, with the SHA-256 of its bytes. A file is volseg's own
while its bytes still have a hash that the ledger lists for its path; anything else belongs to the user. Files appear in
commits: they are written whole in a folder of the run, listed, and then renamed together, so that a commit happens
entirely or not at all, whatever ends the process.

Two kinds of files are not listed: those in a work folder, which the ledger names as a whole and of which only files
with a name that volseg gives are deleted, and TensorBoard's events in `tensorboard/`, which are never replaced or deleted.
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
    environment_problem,
    make_folder,
    read_back_problem,
    refuse_file,
    sha256_of,
    sync_file,
    sync_folder,
)

RECORDS = ".volseg"
LEDGER, LOCK = "ledger.jsonl", "lock"
MANIFEST = "manifest.json"
SAME_KIND = {  # command → what its folder holds; commands with the same words may share a folder
    "infer": "the results of infer",
    "measure": "the results of measure",
    "compare": "a comparison",
    "evaluate": "an evaluation",
    "preprocess": "a prepared dataset",
    "train": "a model",
    "import-nnunet": "a model",
    "quantise": "a model",
}
BUFFER_BYTES = 2**20
MAX_LINE_BYTES = 2**16  # of the ledger
MAX_LISTED = 5  # paths in one message


class OutputFolder:
    """A folder that one run holds and writes into. Use it with `with`.

    Args:
        path: the folder; made if it is not there.
        command: the verb that writes it, a key of `SAME_KIND`; None takes a folder of any command.
        inputs: files and folders that the run reads: no output may be one of them or lie in one of them.
    """

    def __init__(self, path: Path, command: str | None, inputs: Iterable[Path] = ()) -> None:
        self.path = path
        self.command = command
        self.inputs = tuple(inputs)
        self.run_id = secrets.token_hex(8)
        self._records = path / RECORDS
        self._lock = FileLock(self._records / LOCK, timeout=0)
        self._guard = (
            threading.Lock()
        )  # commits come from the thread that writes and from the one that loops
        self._hashes: dict[str, set[str]] = {}
        self._commits = 0
        self._work: list[Path] = []
        self._created: list[
            Path
        ] = []  # folders that this run made, removed again if it writes nothing

    # ---- holding

    def __enter__(self) -> Self:
        """Hold the folder, and finish or forget what a killed run left there.

        Raises:
            VolsegError: it holds something else (`E_EXISTS`).
            EnvironmentProblem: another run holds it, or it cannot be written.
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
                fix="wait for it, or give another --out",
                code="E_LOCKED",
            ) from error
        except OSError as error:
            raise EnvironmentProblem(
                f"{self.path}: cannot write there ({error.strerror})",
                fix="give a folder you may write to",
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
                    folder.rmdir()  # only if it is empty
            if (
                self._records in self._created
                and not self._hashes
                and not any(map(os.path.lexists, self._work))
            ):
                (self._records / LEDGER).unlink(missing_ok=True)
                (self._records / LOCK).unlink(missing_ok=True)
                for folder in self._created:
                    with contextlib.suppress(OSError):
                        folder.rmdir()  # only if it is empty
        finally:
            self._lock.release()

    @property
    def _scratch(self) -> Path:
        """The run's own temporary folder."""
        return self._records / f"tmp-{self.run_id}"

    def _check_kind(self) -> None:
        """That what is there is a folder of volseg's, of a command of the same kind."""
        refuse_file(self.path)
        if os.path.lexists(self._records) and not _is_ours(self._records):
            raise _exists(
                [self._records], "was not made by volseg", "move it away, or give another folder"
            )
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
        """Finish commits of a killed run that had been decided, and delete the temporary files of such runs."""
        runs = _read_runs(self._records / LEDGER)
        for ready in sorted(self._records.glob("ready-*")):
            if ready.name.split("-")[1] in runs and ready.is_dir() and not ready.is_symlink():
                self._apply(ready)
        for scratch in self._records.glob("tmp-*"):
            if scratch.name.removeprefix("tmp-") in runs and not scratch.is_symlink():
                shutil.rmtree(scratch, ignore_errors=True)

    # ---- what is there

    def is_own(self, name: str) -> bool:
        """Whether the file of that path in the folder is there and just as volseg wrote it."""
        path = self._confined(name)
        try:
            is_file = stat.S_ISREG(os.lstat(path).st_mode)
            return is_file and name in self._hashes and sha256_of(path) in self._hashes[name]
        except OSError:
            return False

    def refuse_foreign(self, names: Iterable[str]) -> None:
        """Check, before any work, that outputs of these paths in the folder would replace nothing of the user's.

        Raises:
            VolsegError: `E_EXISTS`, naming the files in the way, or the output that is an input.
        """
        names = list(dict.fromkeys(names))
        self._refuse_inputs(names)
        foreign = [self.path / name for name in names if self._is_foreign(name)]
        if foreign:
            raise _exists(
                foreign,
                "already there, and not as volseg wrote it",
                "move or rename it, or give another folder to --out",
            )

    def _is_foreign(self, name: str) -> bool:
        """Whether something that volseg did not write is where the output, or a folder for it, has to be."""
        path = self._confined(name)
        if os.path.lexists(path):
            return not self.is_own(name)
        between = path.relative_to(self.path).parents
        return any(
            os.path.lexists(self.path / part) and not (self.path / part).is_dir()
            for part in between
        )

    def _refuse_inputs(self, names: Sequence[str]) -> None:
        files = {_identity(path) for path in self.inputs if not path.is_dir()}
        folders = {path.resolve() for path in self.inputs if path.is_dir()}
        for name in names:
            output = self.path / name
            if _identity(output) in files or output.parent.resolve() in folders:
                raise VolsegError(
                    f"{output}: would overwrite an input of this run or lie in a folder of inputs",
                    fix="give another folder to --out",
                    code="E_EXISTS",
                )

    def _confined(self, name: str) -> Path:
        """The path of an output, which lies in this folder also where its parts are links: a record may come from a stranger."""
        return confined_path(self.path, name)

    # ---- writing

    @contextmanager
    def staged(self) -> Iterator[Commit]:
        """Files to be written and to appear together. What is not committed leaves nothing behind."""
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
        """Write one file, whole or not at all."""
        with self.staged() as commit:
            commit.write(name, content)
            commit.finish()

    def work_folder(self, name: str) -> Path:
        """A folder in this one for intermediate files of the run, or of one that it goes on with.

        Raises:
            VolsegError: what is there under this name was not made by volseg, such as a link (`E_EXISTS`).
        """
        path = self._confined(name)
        is_listed = name in _read_folders(self._records / LEDGER)
        if path.is_symlink() or (os.path.lexists(path) and not is_listed):
            raise _exists(
                [path], "was not made by volseg", "move or rename it, or give another folder"
            )
        with self._written(path):
            self._append([{"folder": name}])
            path.mkdir(exist_ok=True)
        self._work.append(path)
        return path

    def remove(self, name: str) -> None:
        """Delete a file if it is volseg's own."""
        if self.is_own(name):
            self._confined(name).unlink(missing_ok=True)

    def publish(self, folder: Path, hashes: Mapping[str, str], removed: Sequence[str]) -> None:
        """Rename the files of a commit into place. `hashes`: path → SHA-256 of each file in `folder`."""
        with self._guard:
            foreign = [
                self.path / name
                for name in hashes
                if not _is_hidden(name) and self._is_foreign(name)
            ]
            if foreign:
                raise _exists(
                    foreign, "was changed during this run", "move or rename it, then run again"
                )
            removed = [name for name in removed if name not in hashes and self.is_own(name)]
            ready = self._records / f"ready-{self.run_id}-{folder.name}"
            with self._written(self._records):
                self._announce(hashes)
                _write_synced(
                    folder / MANIFEST, json.dumps({"files": list(hashes), "removed": removed})
                )
                os.rename(folder, ready)  # from here on the commit will happen
                sync_folder(self._records)
            self._apply(ready)

    def _announce(self, hashes: Mapping[str, str]) -> None:
        """List files in the ledger before they appear."""
        self._append([{"path": name, "sha256": digest} for name, digest in hashes.items()])
        for name, digest in hashes.items():
            self._hashes.setdefault(name, set()).add(digest)

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        path = self._records / LEDGER
        # A line that was torn, by a full disk or a power loss: what it announced had not happened.
        is_torn = path.is_file() and path.stat().st_size > 0 and not _ends_in_newline(path)
        with path.open("ab") as file:
            file.write(b"\n" * is_torn)
            file.writelines(map(_line, lines))
            file.flush()
            os.fsync(file.fileno())

    def _apply(self, ready: Path) -> None:
        """Do what a decided commit says; safe to repeat."""
        try:
            manifest = read_json(ready / MANIFEST)
            names, removed = (
                [str(name) for name in manifest["files"]],
                [str(name) for name in manifest["removed"]],
            )
        except (OSError, ValueError, KeyError, TypeError):
            names = []
            removed = []
        for name in names:
            source, target = confined(ready, name), self._confined(name)
            if source is None or not source.is_file():
                continue  # moved before the process was killed
            if self._is_foreign(name):
                if not _is_hidden(name):
                    raise _exists(
                        [target], f"in the way of the finished {source}", "move it, then run again"
                    )
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
        """Turn what the disk says into one line."""
        try:
            yield
        except OSError as error:
            raise environment_problem(path, error) from error


class Commit:
    """Files that appear together. Made by `OutputFolder.staged`."""

    def __init__(self, outputs: OutputFolder, folder: Path) -> None:
        self._outputs = outputs
        self._hashes: dict[str, str] = {}
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where to write the output `name` for now; its folder is there.

        Raises:
            VolsegError: it leads out of the folder: the name of a case in a record may come from a stranger.
        """
        path = confined_path(self.folder, name)
        make_folder(path.parent)
        return path

    def write(self, name: str, content: bytes | str | Callable[[BinaryIO], None]) -> None:
        """Write one file: bytes, text in UTF-8, or what a function writes into the open file."""
        path = self.path(name)
        try:
            digest = _write_synced(path, content)
        except OSError as error:
            raise environment_problem(self._outputs.path / name, error) from error
        if sha256_of(path) != digest:
            raise read_back_problem(self._outputs.path / name)
        self._hashes[name] = digest

    def hashes(self) -> dict[str, str]:
        """Path → SHA-256 of the files that were written so far; those that others wrote are durable from here on."""
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
        """Let the files appear.

        Args:
            last: the file that appears after all others, by which a reader knows that they are there.
            removed: files that go if they are volseg's own.

        Raises:
            VolsegError: a file of the user's is in the way (`E_EXISTS`); then nothing appears.
            EnvironmentProblem: the disk is full; then nothing appears.
        """
        hashes = self.hashes()
        if last in hashes:
            hashes[last] = hashes.pop(last)
        if hashes or removed:
            self._outputs.publish(self.folder, hashes, list(removed))


def trace_name(item: str) -> str:
    """Path in the folder of the traceback of a bug that an item met."""
    return f"{RECORDS}/{item}.traceback.txt"


def folder_content(path: Path) -> str | None:
    """What the folder of a volseg command holds, such as `the results of infer`; None for another folder."""
    commands = [
        line["command"] for line in _read_lines(path / RECORDS / LEDGER) if "command" in line
    ]
    return next((SAME_KIND[name] for name in commands if name in SAME_KIND), None)


def confined(folder: Path, name: str) -> Path | None:
    """`folder / name` if that lies in the folder, links in its parents followed; else None."""
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
    """`confined`, where another path is an error.

    Raises:
        VolsegError: it leads out of the folder (`E_EXISTS`).
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
    """Delete what volseg wrote into a folder and what lies in its `.volseg`; everything else stays, and so does the folder then.

    Args:
        is_intermediate: whether a path below the folder is a file that volseg writes there without listing it.
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
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_hidden(name: str) -> bool:
    return name.startswith(f"{RECORDS}/")


def _is_ours(records: Path) -> bool:
    """Whether a folder called `.volseg` was made by volseg: its ledger begins with a run, or nothing was written yet."""
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
    """The lines of a ledger; damaged ones are skipped, so that what they listed counts as the user's."""
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


def _read_folders(ledger: Path) -> set[str]:
    return {line["folder"] for line in _read_lines(ledger) if isinstance(line.get("folder"), str)}


def _read_runs(ledger: Path) -> set[str]:
    return {line["run"] for line in _read_lines(ledger) if isinstance(line.get("run"), str)}


def _files_below(folder: Path) -> list[str]:
    """Paths of all files in a folder and below, relative to it."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _identity(path: Path) -> tuple[int, int] | Path:
    """What tells whether two paths mean one file, also through links and hard links."""
    try:
        status = os.stat(path)
        return (status.st_dev, status.st_ino)
    except OSError:
        return path.resolve()


class _Hashing(io.RawIOBase):
    """A file that hashes what is written into it."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data, /) -> int:
        n = self._file.write(data) or 0
        self.digest.update(memoryview(data)[:n])
        return n


def _write_synced(path: Path, content: bytes | str | Callable[[BinaryIO], None]) -> str:
    """Write a file, durable once this returns; the SHA-256 of what was meant to be written."""
    with open(path, "wb", buffering=0) as file:
        hashing = _Hashing(file)
        buffered = io.BufferedWriter(hashing, BUFFER_BYTES)
        if callable(content):
            content(buffered)
        else:
            # A lone surrogate, of which a label's name may hold one, has no bytes in UTF-8.
            buffered.write(
                content.encode("utf-8", "replace") if isinstance(content, str) else content
            )
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
    listed = ", ".join(map(str, paths[:MAX_LISTED]))
    more = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
    return VolsegError(f"{listed}{more}: {problem}", fix=fix, code="E_EXISTS")
