"""Files: globs name what there is, and a file is replaced whole or not at all."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from gptchat.artifacts import file_digest, input_states, lock_folder, read_manifest, write_manifest
from gptchat.console import UserError
from gptchat.files import atomic_write, expand, matching_files


def test_globs_name_files_in_order_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.tsv"):
        (tmp_path / name).touch()
    paths = expand([f"{tmp_path}/*.txt", f"{tmp_path}/c.tsv"], "data.train")
    assert [path.name for path in paths] == ["a.txt", "b.txt", "c.tsv"]
    with pytest.raises(UserError, match="no such file, named by data.train"):
        expand([f"{tmp_path}/*.md"], "data.train")


def test_the_true_reason_is_told_for_a_name_that_matches_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a[1].txt").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, reason in (
        ("folder", "is a folder"),
        ("fold*", "no such file"),
        ("pipe", "is no regular file"),
        ("dangling", "is no regular file"),
        ("a[1].txt", "is read as a pattern"),
        ("nothing", "no such file, named by data.train"),
        ("folder/*.txt", "no such file"),
    ):
        with pytest.raises(UserError) as error:
            expand([f"{tmp_path}/{name}"], "data.train")
        line = str(error.value)
        assert reason in line and "\n" not in line and "gptchat corpora" not in line
    with pytest.raises(UserError, match="gptchat corpora"):
        expand(["data/nowhere/train.txt"], "data.train")


def test_a_file_with_several_names_is_taken_once_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    paths = expand([f"{tmp_path}/*.txt", f"{tmp_path}/b.txt"], "data.train")
    assert [path.name for path in paths] == ["a.txt", "b.txt"]
    warning = capsys.readouterr().err
    assert warning == "warning: data.train: 4 names of 2 files; each file is read once\n"
    expand([f"{tmp_path}/a.txt"], "data.train")
    assert not capsys.readouterr().err


def test_a_pattern_leaves_out_what_gptchat_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["mine.txt", "data/mine.txt", "talks/prompts.tsv", "notes/out.txt"]
    written = ["out/lm/test.txt", "elsewhere/run/test.txt", "elsewhere/run/model/a.txt"]
    written.append("configs/mine/prompts.tsv")
    for name in [*own, *written, "configs/mine/chatlm.toml"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("text")
    write_manifest(Path("elsewhere/run"), {"settings": {}})
    Path("manifest.json").write_text('{"name": "somebody else\'s"}')
    assert sorted(map(str, expand(["**/*.t[xs][tv]"], "[data] train"))) == sorted(own)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "[data] train: gptchat wrote 4 files that match" in line
    assert matching_files(["data/*.txt"]) == [Path("data/mine.txt")]
    assert expand([*written], "--text") == list(map(Path, written))  # named one by one
    with pytest.raises(UserError, match="elsewhere/.*: matches only files that gptchat wrote"):
        expand(["elsewhere/**/*.txt"], "[data] train")
    Path("out/own").mkdir()
    Path("out/own/a.txt").touch()
    assert matching_files(["out/own/*.txt"]) == [Path("out/own/a.txt")]


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run", "somebody writes"):
        with pytest.raises(UserError, match="run: somebody writes; wait for it"):
            lock_folder(tmp_path / "run", "somebody writes")
    lock_folder(tmp_path / "run", "somebody writes").close()


def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_folder(tmp_path, "busy").close()
    assert f"warning: {tmp_path}: this file system has no locks" in capsys.readouterr().err


def test_a_record_that_was_changed_counts_as_missing(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"settings": {"a": 1}})
    assert read_manifest(tmp_path) == {"settings": {"a": 1}}
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("1", "2", 1))
    assert read_manifest(tmp_path) is None and read_manifest(tmp_path / "none") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing: cannot be read: there is no such file"):
        input_states([tmp_path / "nothing"])
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        file_digest(tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise KeyError
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["file"]


def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("one")
            temporary.chmod(0o600)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
