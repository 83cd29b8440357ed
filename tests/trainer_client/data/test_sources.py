"""Text from files, folders and globs: plain, JSON lines and Parquet."""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_lines import write_lines
from locked_folder import locked

from peer import settings
from peer.errors import DataError, SettingsError
from trainer_client.data import sources
from trainer_client.data.sources import find_files, find_texts, read_documents, read_text, unread_files


def text_of(*paths: Path, field: str = "text") -> str:
    return "".join(read_text(find_files([str(path) for path in paths]), field))


def write_parquet(path: Path, **columns: Sequence[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def as_strings(data: Sequence[bytes]) -> Sequence[object]:
    """A column of strings that may not be UTF-8."""
    strings: Sequence[object] = pyarrow.array(data, pyarrow.binary()).view(pyarrow.string())
    return strings


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_the_default_text_comes_with_python() -> None:
    text = "".join(read_text([]))
    assert len(text) > 200_000
    assert "import" in text


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    assert text_of(write_bytes(tmp_path / "any.md", b"\t sauna\r\n\xc3\xa4\n\n")) == "\t sauna\r\nä\n\n"


@pytest.mark.parametrize("size", [1, 3, 2**16])
def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", size)
    marked = write_bytes(tmp_path / "a.txt", "\ufeffsauna \ufeffstove".encode())
    only = write_bytes(tmp_path / "b.txt", "\ufeff".encode())
    lines = write_bytes(tmp_path / "c.jsonl", '\ufeff{"text": "towel"}\r\n'.encode())
    assert text_of(marked, only, lines) == "sauna \ufeffstove\ntowel"


def test_a_file_of_one_line_without_an_end_is_text(tmp_path: Path) -> None:
    assert text_of(write_bytes(tmp_path / "one.txt", b"one line")) == "one line"


def test_suffixes_may_be_capitals(tmp_path: Path) -> None:
    write_bytes(tmp_path / "A.TXT", b"one")
    write_lines(tmp_path / "B.JSONL", {"text": "two"})
    write_parquet(tmp_path / "C.Parquet", text=["three"])
    assert text_of(tmp_path) == "one\ntwo\nthree"


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a.txt", b"one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="a path of a text is empty: give"):
        find_files([""])


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "sub/c.md", "sub/d.jsonl", ".git/e.md", ".f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    folder, others = str(tmp_path), str(tmp_path / "sub" / "*.md")
    assert unread_files([folder]) == [tmp_path / "b.md", tmp_path / "sub" / "c.md"]
    assert unread_files([folder, others]) == [tmp_path / "b.md"]
    assert unread_files([str(tmp_path / "b.md"), others]) == []


def test_a_folder_gives_all_text_below_it_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "c.txt").write_text("five")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "notes.md").write_text("not read")
    write_lines(tmp_path / "c.jsonl", {"text": "three"}, {"text": ""}, {"text": "four", "id": 4})
    assert text_of(tmp_path) == "one\ntwo\nthree\nfour\nfive"


def test_a_document_says_where_it_is_from_and_has_the_labels_that_are_text(tmp_path: Path) -> None:
    plain = write_bytes(tmp_path / "a.txt", b"one")
    lines = write_lines(
        tmp_path / "b.jsonl", {"text": "two", "title": "T\ud800", "year": 1}, {"text": "three"}
    )
    table = write_parquet(tmp_path / "c.parquet", text=["four", None, "five"], title=["F", "X", None])
    found = [
        (document.file.name, document.number, "".join(document.pieces), document.labels)
        for document in read_documents([plain, lines, table], labels=("title", "year"))
    ]
    assert found == [
        ("a.txt", 0, "one", {}),
        ("b.jsonl", 1, "two", {"title": "T?"}),
        ("b.jsonl", 2, "three", {}),
        ("c.parquet", 1, "four", {"title": "F"}),
        ("c.parquet", 3, "five", {}),
    ]


def test_several_paths_come_in_their_order_and_each_file_once(tmp_path: Path) -> None:
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_text("first")
    second.write_text("second")
    assert text_of(first, tmp_path, first) == "first\nsecond"
    assert text_of(first, tmp_path / "?.txt") == "first\nsecond"


def test_each_path_is_a_text_of_its_own(tmp_path: Path) -> None:
    one, folder = tmp_path / "one.txt", tmp_path / "folder"
    folder.mkdir()
    for path in (one, folder / "b.txt", folder / "a.txt"):
        path.write_text("sauna")
    found = find_texts([str(folder), str(one)])
    assert found == {str(folder): [folder / "a.txt", folder / "b.txt"], str(one): [one]}
    assert find_texts([]) == {}


def test_a_text_is_given_once(tmp_path: Path) -> None:
    one, link = tmp_path / "one.txt", tmp_path / "link.txt"
    one.write_text("sauna")
    link.symlink_to(one)
    with pytest.raises(DataError, match=r"one\.txt is given twice: give each text once"):
        find_texts([str(one), str(one)])
    for other in (str(link), f"{tmp_path}/one*"):
        with pytest.raises(DataError, match=r"one\.txt and .* are the same text: give each text once"):
            find_texts([str(one), other])


def test_a_glob_reaches_into_folders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.md").write_text("found")
    (tmp_path / "a.md").write_text("also")
    assert text_of(tmp_path / "**" / "*.md") == "also\nfound"


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "what[1].txt"
    path.write_text("mine")
    assert text_of(path) == "mine"


def test_json_lines_and_parquet_give_the_field_asked_for(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", {"body": "one", "text": 1}, {"body": "two\nlines"})
    rows = write_parquet(tmp_path / "b.parquet", id=[1, 2, 3], body=["three", None, "four"])
    assert text_of(lines, rows, field="body") == "one\ntwo\nlines\nthree\nfour"


def test_half_of_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n\n')
    assert text_of(path) == "a ? b"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.integers(1, 9))
def test_pieces_add_up_to_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.NamedTemporaryFile() as file:
        patch.setattr(sources, "PIECE_BYTES", size)
        file.write(text.encode())
        file.flush()
        assert "".join(read_text([Path(file.name)])) == text


def test_pieces_end_between_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 8)
    path = write_bytes(tmp_path / "a.txt", b"four score and seven yearslongword ago")
    assert list(read_text([path])) == ["four ", "score and ", "seven ", "yearslongwo", "rd ", "ago"]


def test_a_long_document_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 4)
    path = write_lines(tmp_path / "a.jsonl", {"text": "0123456789"}, {"text": "ab"})
    assert list(read_text([path])) == ["0123", "4567", "89", "\nab"]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda folder: None, r"no file or folder .*/x.*: give one"),
    "a folder without text": (
        lambda folder: (folder / "x").mkdir(),
        r"no \.txt, \.jsonl or \.parquet file in",
    ),
    "a pipe": (lambda folder: os.mkfifo(folder / "x"), "x is not a file: write its output to a file"),
    "zeros": (lambda folder: write_bytes(folder / "x.bin", b"ab\0c"), "is not text: byte 2 is 0"),
    "latin 1": (
        lambda folder: write_bytes(folder / "x.txt", b"12345\xe4 "),
        "not text in UTF-8: byte 5 can't be read",
    ),
    "cut in a character": (
        lambda folder: write_bytes(folder / "x.txt", b"123\xc3"),
        "not text in UTF-8: byte 3",
    ),
    "no JSON": (
        lambda folder: write_bytes(folder / "x.jsonl", b'{"text": "a"}\n\nplain'),
        r"line 3 of .*x\.jsonl is not JSON: .*; give a file with an object in each line",
    ),
    "no object": (lambda folder: write_lines(folder / "x.jsonl", ["a"]), "is not a JSON object: give"),
    "binary lines": (lambda folder: write_bytes(folder / "x.jsonl", b"\xff\xfe\n"), "line 1 of .* not JSON"),
    "nested": (lambda folder: write_bytes(folder / "x.jsonl", b"[" * 10**5), "line 1 of .* is not JSON"),
    "another field": (
        lambda folder: write_lines(folder / "x.jsonl", {"text": "a"}, {"body": "b", "id": 2}),
        "line 2 of .* has no field 'text', its fields are 'body', 'id': pass --field",
    ),
    "a number": (
        lambda folder: write_lines(folder / "x.jsonl", {"text": 3}),
        "the field 'text' is not text: pass --field",
    ),
    "another column": (
        lambda folder: write_parquet(folder / "x.parquet", body=["a"]),
        "has no field 'text', its fields are 'body': pass --field",
    ),
    "a column of numbers": (
        lambda folder: write_parquet(folder / "x.parquet", text=[1]),
        "the field 'text' is not text: pass --field",
    ),
    "no Parquet": (
        lambda folder: write_bytes(folder / "x.parquet", b"PAR1 or not"),
        r"can't read .*x\.parquet: .*; give a whole Parquet file",
    ),
    "binary Parquet": (
        lambda folder: write_parquet(folder / "x.parquet", text=as_strings([*300 * [b"a"], b"\xe4"])),
        r"x\.parquet is not text in UTF-8: one of the 256 rows after row 256 can't be read",
    ),
    "empty Parquet": (lambda folder: (folder / "x.parquet").touch(), r"can't read .*x\.parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_text_is_named(tmp_path: Path, name: str) -> None:
    make, said = BROKEN[name]
    make(tmp_path)
    path = next(tmp_path.iterdir(), tmp_path / "x")
    with pytest.raises(DataError, match=said):
        text_of(path)


def test_a_line_without_an_end_is_refused_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_LONGEST_LINE", 2**20)
    path = write_bytes(tmp_path / "x.jsonl", b'"' + b"a" * 2**20)
    with pytest.raises(DataError, match=r"line 1 of .* is longer than 1.05 MB"):
        text_of(path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")
def test_what_cannot_be_read_is_named() -> None:
    # Not even root can read it.
    with pytest.raises(DataError, match=r"can't read /proc/self/mem: "):
        text_of(Path("/proc/self/mem"))


@pytest.fixture
def locked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a text, which this process can't look into while the fixture lasts. Its path is relative, since
    the folders above it may be closed to all but root.
    """
    for folder in (tmp_path, tmp_path / "locked"):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    (tmp_path / "locked" / "x.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / "locked"):
        yield Path("locked")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("path", ["locked", "locked/x.txt", "locked/*.txt"])
def test_what_is_in_a_folder_that_cannot_be_read_is_named(locked_folder: Path, path: str) -> None:
    with pytest.raises(DataError, match=f"can't read {re.escape(path)}: Permission denied; check its name"):
        find_files([path])


def test_parquet_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(SettingsError, match="pyarrow: install Talkoot with the extra parquet"):
        find_files([str(tmp_path)])
