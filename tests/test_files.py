"""Files: globs name what there is, and a file is replaced whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from gptchat.console import UserError
from gptchat.files import atomic_write, expand


def test_globs_name_files_in_order_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.tsv"):
        (tmp_path / name).touch()
    paths = expand([f"{tmp_path}/*.txt", f"{tmp_path}/c.tsv"], "data.train")
    assert [path.name for path in paths] == ["a.txt", "b.txt", "c.tsv"]
    with pytest.raises(UserError, match="no such file, named by data.train"):
        expand([f"{tmp_path}/*.md"], "data.train")


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
