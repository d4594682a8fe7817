"""The output folder: what may be replaced or continued, and that nothing else is ever touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from gru_core.config import RunConfig
from gru_core.errors import InputError
from pipelines import settings
from pipelines.journal import Journal
from pipelines.output import LOCK, claim, examine, hold, is_result


def result(folder: Path) -> Path:
    """A folder as a run leaves it."""
    (folder / "checkpoints" / "step-20").mkdir(parents=True)
    (folder / "config.yaml").write_text(settings.to_yaml(RunConfig()))
    (folder / "checkpoints" / "step-20" / "state").write_text("old")
    return folder


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_made(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "runs" / "one"
    if exists:
        folder.mkdir(parents=True)
    for overwrite in (False, True):
        assert claim(folder, overwrite=overwrite, resume=False) == folder
        assert folder.is_dir()


def test_examine_changes_nothing(tmp_path: Path) -> None:
    examine(tmp_path / "runs" / "one", overwrite=False, resume=False)
    assert list(tmp_path.iterdir()) == []
    folder = result(tmp_path / "run")
    before = everything(folder)
    examine(folder, overwrite=True, resume=False)
    assert everything(folder) == before


def test_a_result_needs_an_option(tmp_path: Path) -> None:
    folder = result(tmp_path / "run")
    before = everything(folder)
    with pytest.raises(InputError, match="is not empty; --overwrite replaces it, --resume continues it"):
        claim(folder, overwrite=False, resume=False)
    with pytest.raises(InputError, match="one of them"):
        claim(folder, overwrite=True, resume=True)
    assert claim(folder, overwrite=False, resume=True) == folder
    assert everything(folder) == before
    claim(folder, overwrite=True, resume=False)
    assert list(folder.iterdir()) == []


def test_a_journal_marks_a_result_too(tmp_path: Path) -> None:
    with Journal(tmp_path / "run") as journal:
        journal.run("one")
    assert is_result(tmp_path / "run")
    claim(tmp_path / "run", overwrite=True, resume=False)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thesis.tex", "years"),
        ("config.yaml", "rectify: {strength: 2}\n# Resolved configuration, written by gru\n"),
        ("journal.jsonl", '{"kind":"diary"}\n'),
        ("model.safetensors", ""),
    ],
)
def test_what_is_no_result_is_never_deleted(tmp_path: Path, name: str, text: str) -> None:
    """A config.yaml that a user wrote is no mark of ours: their data may lie beside it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(text)
    for overwrite, resume in ((True, False), (False, True), (False, False)):
        with pytest.raises(InputError, match="is not empty, and holds no result of gru"):
            claim(tmp_path / "mine", overwrite=overwrite, resume=resume)
    assert everything(tmp_path / "mine") == {name: text}


def test_home_and_working_folder_are_never_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = result(tmp_path / "home"), result(tmp_path / "deep") / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    result(work)
    link = tmp_path / "link"
    link.symlink_to(home)
    for folder in (home, Path("~"), work, Path(), Path(".."), link):
        with pytest.raises(InputError, match="--overwrite does not empty it"):
            claim(folder, overwrite=True, resume=False)
    assert (home / "config.yaml").exists()
    assert (work / "config.yaml").exists()


def test_links_inside_a_result_are_removed_and_not_followed(tmp_path: Path) -> None:
    folder, outside = result(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "data").write_text("kept")
    (folder / "link").symlink_to(outside)
    claim(folder, overwrite=True, resume=False)
    assert everything(outside) == {"data": "kept"}
    assert list(folder.iterdir()) == []


def test_resume_wants_something_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds nothing to resume"):
        claim(tmp_path / "new", overwrite=False, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="file"):
            claim(folder, overwrite=True, resume=False)
    assert (tmp_path / "file").read_text() == "x"


# ------------------------------------------------------------------------------------------ one at a time


def test_a_folder_is_held_by_one_and_not_emptied_by_another(tmp_path: Path) -> None:
    folder = result(tmp_path / "run")
    before = everything(folder)
    with hold(folder) as path:
        assert path == folder
        link = tmp_path / "link"
        link.symlink_to(folder)
        for name in (folder, link):
            with pytest.raises(InputError, match="another process is working in the output folder"), hold(name):
                claim(name, overwrite=True, resume=False)
        assert everything(folder) == before | {LOCK: ""}
        claim(folder, overwrite=True, resume=False)
        assert [entry.name for entry in folder.iterdir()] == [LOCK]  # emptied, and still held
        with pytest.raises(InputError, match="another process"), hold(folder):
            pass
    with hold(folder):
        pass


def test_what_holding_made_is_taken_away_where_nothing_came_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    with hold(folder):
        assert claim(folder, overwrite=False, resume=False) == folder  # the lock alone is no content
    assert list(tmp_path.iterdir()) == []
    with hold(folder):
        (folder / "kept").write_text("x")
    assert everything(tmp_path) == {"runs/one/kept": "x"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be locked"), hold(tmp_path / "file" / "below"):
        pass
