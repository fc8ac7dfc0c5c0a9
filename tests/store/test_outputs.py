"""volseg replaces and deletes only its own files, and they appear entirely or not at all."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from volseg.errors import EnvironmentProblem, VolsegError
from volseg.store.outputs import OutputFolder, delete_written


def tree(folder):
    """Return path → bytes of every file outside `.volseg`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".volseg" not in path.parts
    }


def test_what_was_written_may_be_written_again_until_it_is_changed(tmp_path):
    with OutputFolder(tmp_path, "evaluate") as outputs:
        outputs.write("a.csv", "1")
    with OutputFolder(tmp_path, "evaluate") as outputs:
        outputs.check_overwrites(["a.csv"])
        outputs.write("a.csv", "2")
    (tmp_path / "a.csv").write_text("by hand")
    with OutputFolder(tmp_path, "evaluate") as outputs:
        with pytest.raises(VolsegError, match=r"a\.csv: already exists") as refusal:
            outputs.check_overwrites(["a.csv"])
        assert (refusal.value.code, refusal.value.exit_code) == ("E_EXISTS", 2)
        with pytest.raises(VolsegError, match=r"a\.csv"):
            outputs.write("a.csv", "3")
        outputs.remove("a.csv")
    assert tree(tmp_path) == {"a.csv": b"by hand"}


@pytest.mark.parametrize(
    "make", [lambda p: p.write_text("x"), lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere")]
)
def test_anything_in_the_way_of_an_output_is_refused(make, tmp_path):
    make(tmp_path / "a.csv")
    make(tmp_path / "masks") if not (tmp_path / "a.csv").is_dir() else (
        tmp_path / "masks"
    ).write_text("x")
    with OutputFolder(tmp_path, "infer") as outputs:
        for name in ("a.csv", "masks/c.nii.gz"):
            with pytest.raises(VolsegError, match="already exists"):
                outputs.check_overwrites([name])


def test_a_folder_that_leads_out_is_not_written_through(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "masks").symlink_to(elsewhere)
    with OutputFolder(out, "infer") as outputs, pytest.raises(VolsegError, match="leads out"):
        outputs.check_overwrites(["masks/c.nii.gz"])
    assert not list(elsewhere.iterdir())


def test_a_refused_run_leaves_a_folder_as_it_was(tmp_path):
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(VolsegError), OutputFolder(tmp_path, "infer") as outputs:
        outputs.check_overwrites(["a.csv"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    with (
        pytest.raises(VolsegError),
        OutputFolder(tmp_path / "new", "infer", inputs=[tmp_path / "new"]) as outputs,
    ):
        outputs.check_overwrites(["a.csv"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
def test_an_input_is_never_overwritten_even_through_a_link(link, tmp_path):
    source, out = tmp_path / "scan.nii.gz", tmp_path / "out"
    source.write_bytes(b"scan")
    (out / "masks").mkdir(parents=True)
    target = out / "masks" / "c.nii.gz"
    if link is not None:
        link(source, target)
    else:
        source = target
        target.write_bytes(b"scan")
    with OutputFolder(out, "infer", inputs=[source]) as outputs:
        with pytest.raises(VolsegError) as refusal:
            outputs.check_overwrites(["masks/c.nii.gz"])
        assert refusal.value.code == "E_EXISTS"


def test_nothing_is_written_into_a_folder_of_inputs(tmp_path):
    with OutputFolder(tmp_path, "infer", inputs=[tmp_path / "masks", tmp_path]) as outputs:
        (tmp_path / "masks").mkdir()
        for name in ("masks/c.nii.gz", "cases.csv"):
            with pytest.raises(VolsegError, match="input"):
                outputs.check_overwrites([name])
        outputs.check_overwrites(["lesion_ids/c.nii.gz"])


@pytest.mark.parametrize(
    "name", [".tmp-anything", "masks/.tmp-0123456789abcdef", ".volseg/tmp-mine/notes.txt"]
)
def test_temporary_files_of_the_user_stay(name, tmp_path):
    with OutputFolder(tmp_path, "infer") as outputs:
        outputs.write("a.csv", "1")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with OutputFolder(tmp_path, "infer") as outputs:
        outputs.write("a.csv", "2")
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["folder", "ledger"])
def test_a_hidden_folder_that_volseg_did_not_make_is_refused(content, tmp_path):
    (tmp_path / ".volseg").mkdir()
    (tmp_path / ".volseg" / ("notes.txt" if content == "folder" else "ledger.jsonl")).write_text(
        "mine"
    )
    with pytest.raises(VolsegError, match="not made by volseg"), OutputFolder(tmp_path, "infer"):
        pass
    assert len(list(tmp_path.rglob("*"))) == 2


def test_a_commit_that_cannot_be_written_leaves_what_was_there(tmp_path):
    with OutputFolder(tmp_path, "infer") as outputs:
        outputs.write("a.csv", "old")

        def fail(file):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        with pytest.raises(EnvironmentProblem) as problem, outputs.staged() as commit:
            commit.write("a.csv", "new")
            commit.write("b.csv", fail)
            commit.finish()
        assert problem.value.code == "E_DISK"
    assert tree(tmp_path) == {"a.csv": b"old"}
    assert not list((tmp_path / ".volseg").glob("tmp-*"))


def test_a_file_that_something_else_wrote_into_a_commit_is_on_the_disk_before_it_appears(
    tmp_path, monkeypatch
):
    happened, fsync, rename = [], os.fsync, os.rename

    def keep_sync(descriptor):
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def keep_rename(source, target):
        happened.append("commit")
        rename(source, target)

    with OutputFolder(tmp_path, "preprocess") as outputs, outputs.staged() as commit:
        commit.path("cases/a/image.npy").write_bytes(b"array")
        monkeypatch.setattr(os, "fsync", keep_sync)
        monkeypatch.setattr(os, "rename", keep_rename)
        commit.finish()
    assert happened.index("image.npy") < happened.index("commit")


def test_a_file_that_the_user_makes_meanwhile_is_not_replaced(tmp_path):
    with OutputFolder(tmp_path, "infer") as outputs, outputs.staged() as commit:
        commit.write("a.csv", "new")
        commit.write("b.csv", "new")
        (tmp_path / "b.csv").write_text("mine")
        with pytest.raises(VolsegError, match=r"b\.csv"):
            commit.finish()
    assert tree(tmp_path) == {"b.csv": b"mine"}


def test_files_of_an_earlier_call_go_only_if_they_are_as_they_were(tmp_path):
    with OutputFolder(tmp_path, "infer") as outputs:
        for name in ("a.png", "b.png"):
            outputs.write(name, "old")
        (tmp_path / "b.png").write_text("by hand")
        (tmp_path / "c.png").write_text("mine")
        with outputs.staged() as commit:
            commit.write("a.csv", "new")
            commit.finish(removed=["a.png", "b.png", "c.png", "never-there.png"])
    assert tree(tmp_path) == {"a.csv": b"new", "b.png": b"by hand", "c.png": b"mine"}


KILLED_AT = [
    "os.fsync",
    "os.rename",
    "os.replace",
    "volseg.store.outputs.sync_folder",
    "shutil.rmtree",
]


@pytest.mark.parametrize("function", KILLED_AT)
@pytest.mark.parametrize("call", range(1, 8))
def test_a_commit_happens_entirely_or_not_at_all_whenever_the_process_is_killed(
    function, call, tmp_path
):
    module, name = function.rsplit(".", 1)
    script = f"""
        import importlib, os, signal, sys
        from pathlib import Path
        from volseg.store.outputs import OutputFolder
        module = importlib.import_module({module!r})
        original, calls = getattr(module, {name!r}), 0
        def killing(*args, **kwargs):
            global calls
            calls += 1
            if calls == {call}:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        with OutputFolder(Path({str(tmp_path)!r}), "infer") as outputs:
            with outputs.staged() as commit:
                for file in ("a", "b", "c"):
                    commit.write(file, "old")
                commit.finish()
            setattr(module, {name!r}, killing)
            with outputs.staged() as commit:
                for file in ("a", "b", "d"):
                    commit.write(file, "new")
                commit.finish(last="d", removed=["c"])
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert ended.returncode in (0, -signal.SIGKILL)
    with OutputFolder(tmp_path, "infer"):
        pass
    old, new = dict.fromkeys("abc", b"old"), dict.fromkeys("abd", b"new")
    assert tree(tmp_path) in ([new] if ended.returncode == 0 else [old, new])
    assert not list((tmp_path / ".volseg").glob("tmp-*")) + list(
        (tmp_path / ".volseg").glob("ready-*")
    )


def test_a_ledger_that_was_cut_off_goes_on_at_a_new_line(tmp_path):
    with OutputFolder(tmp_path, "infer") as outputs:
        outputs.write("a.csv", "1")
    ledger = tmp_path / ".volseg" / "ledger.jsonl"
    with ledger.open("a") as file:
        file.write('{"path": "b.csv", "sha2')
    for number in range(2):
        with OutputFolder(tmp_path, "infer") as outputs:
            outputs.write("b.csv", f"{number}")
    assert tree(tmp_path) == {"a.csv": b"1", "b.csv": b"1"}
    damaged = [line for line in ledger.read_text().splitlines() if not _is_json(line)]
    assert damaged == ['{"path": "b.csv", "sha2']


def test_a_line_of_the_ledger_torn_by_a_full_disk_does_not_swallow_the_next(tmp_path, monkeypatch):
    def torn(file):
        """Write half a line, as on a full disk."""
        with (tmp_path / ".volseg" / "ledger.jsonl").open("ab") as other:
            other.write(b'{"path": "a.csv", "sh')
        raise OSError(28, "No space left on device")

    with OutputFolder(tmp_path, "infer") as outputs:
        monkeypatch.setattr(os, "fsync", lambda file: None)
        monkeypatch.setattr(
            "volseg.store.outputs._line", lambda line: torn(line) if "path" in line else b""
        )
        with pytest.raises(EnvironmentProblem):
            outputs.write("a.csv", "1")
        monkeypatch.undo()
        outputs.write("b.csv", "2")
    with OutputFolder(tmp_path, "infer") as outputs:
        outputs.check_overwrites(["a.csv", "b.csv"])
    assert tree(tmp_path) == {"b.csv": b"2"}


@pytest.mark.parametrize("name", ["../victim.html", "viewer/../../victim.html", "/victim.html"])
def test_a_commit_writes_nothing_outside_of_itself(name, tmp_path):
    with (
        OutputFolder(tmp_path / "a" / "b", "infer") as outputs,
        outputs.staged() as commit,
        pytest.raises(VolsegError, match="leads out"),
    ):
        commit.write(name, "gotcha")
    assert not list(tmp_path.rglob("*victim*"))


def _is_json(line):
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def test_of_a_work_folder_only_what_was_written_is_deleted(tmp_path):
    with OutputFolder(tmp_path / "model", "train") as outputs:
        work = outputs.work_folder(".training")
        (work / "last.safetensors").write_text("state")
        (work / "notes.txt").write_text("mine")
        with OutputFolder(work / "prepared", "preprocess") as prepared:
            prepared.write("cases/a/image.npy", "array")
            prepared.write("cases/b/image.npy", "array")
        (work / "prepared" / "cases" / "b" / "image.npy").write_text("by hand")
        delete_written(work / "prepared")
        delete_written(work, lambda name: name == "last.safetensors")
    assert tree(tmp_path / "model") == {
        ".training/notes.txt": b"mine",
        ".training/prepared/cases/b/image.npy": b"by hand",
    }


@pytest.mark.parametrize("is_used", [True, False])
def test_a_work_folder_is_known_again_after_a_run_that_wrote_nothing_else(is_used, tmp_path):
    for _ in range(2):
        with OutputFolder(tmp_path / "model", "train") as outputs:
            work = outputs.work_folder(".training")
            if is_used:
                (work / "recipe.json").write_text("{}")
    assert (tmp_path / "model").exists() == is_used


def test_a_work_folder_that_volseg_did_not_make_is_refused(tmp_path):
    (tmp_path / ".training").mkdir()
    with (
        OutputFolder(tmp_path, "train") as outputs,
        pytest.raises(VolsegError, match="not made by volseg"),
    ):
        outputs.work_folder(".training")


def test_a_link_in_place_of_a_work_folder_is_refused_and_nothing_is_written_through_it(tmp_path):
    out, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with OutputFolder(out, "train") as outputs:
        (outputs.work_folder(".training") / "recipe.json").write_text("{}")
    (out / ".training").rename(tmp_path / "moved")
    (out / ".training").symlink_to(elsewhere)
    with (
        OutputFolder(out, "train") as outputs,
        pytest.raises(VolsegError, match="not made by volseg") as refusal,
    ):
        outputs.work_folder(".training")
    assert refusal.value.code == "E_EXISTS"
    assert not list(elsewhere.iterdir())


def test_a_file_that_the_lock_links_to_stays_as_it_was(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with OutputFolder(tmp_path / "out", "infer") as outputs:
        outputs.write("a.csv", "1")
    lock = tmp_path / "out" / ".volseg" / "lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(tmp_path / "mine.txt")
    with pytest.raises(VolsegError), OutputFolder(tmp_path / "out", "infer"):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"
