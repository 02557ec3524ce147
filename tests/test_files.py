"""Files: globs name what there is, and a file is replaced whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from gptchat.artifacts import lock_folder
from gptchat.console import UserError
from gptchat.files import atomic_write, expand


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
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, reason in (
        ("folder", "is a folder"),
        ("fold*", "is a folder"),
        ("pipe", "is a pipe or a device"),
        ("loop", "symbolic links"),
        ("dangling", "is a link to nothing"),
        ("a[1].txt", "is read as a pattern"),
        ("nothing", "no such file, named by data.train"),
        ("folder/*.txt", "no such file"),
    ):
        with pytest.raises(UserError) as error:
            expand([f"{tmp_path}/{name}"], "data.train")
        line = str(error.value)
        assert reason in line and "\n" not in line and "gptchat corpora" not in line
    with pytest.raises(UserError, match="`~` is no home folder"):
        expand(["~/mine.txt"], "data.train")
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
    assert warning.count("\n") == 1 and "link.txt was named before" in warning
    assert "2 of 4 names" in warning
    expand([f"{tmp_path}/a.txt"], "data.train")
    assert not capsys.readouterr().err


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run", "somebody writes"):
        with pytest.raises(UserError, match="run: somebody writes; wait for it"):
            lock_folder(tmp_path / "run", "somebody writes")
    lock_folder(tmp_path / "run", "somebody writes").close()


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
