"""Documents of files, datasets and iterables: read as needed, and refused with the file, the line and the remedy."""

import gzip
import json
import sys
import types

import pytest

from sparsekern.documents import CHUNK_BYTES, read_documents, title

CHATS = [
    [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}],
    [{"role": "user", "content": "three?"}],
]


def template(chat):
    return "".join(f"<{message['role']}>{message['content']}" for message in chat)


def text_of(source, template=None):
    return "".join(read_documents(source, template).pieces)


def write_lines(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a b.txt", "notes.md", "no suffix", "a:b.txt"])
def test_any_other_file_is_text_as_it_stands(tmp_path, name):
    (tmp_path / name).write_text("grüße\n\nzwei \n", encoding="utf-8")
    assert text_of(tmp_path / name) == text_of(str(tmp_path / name)) == "grüße\n\nzwei \n"


def test_line_ends_are_one_character_and_the_byte_order_mark_is_none(tmp_path):
    (tmp_path / "windows.txt").write_bytes("\ufeffone\r\ntwo\rthree".encode())
    assert text_of(tmp_path / "windows.txt") == "one\ntwo\nthree"


def test_a_long_text_comes_in_pieces_that_break_no_character_and_no_line_end(tmp_path):
    text = "ü€\r\n" * (CHUNK_BYTES // 4)
    (tmp_path / "long.txt").write_bytes(text.encode())
    pieces = list(read_documents(tmp_path / "long.txt").pieces)
    assert len(pieces) > 1
    assert "".join(pieces) == text.replace("\r\n", "\n")


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json", "data.jsonl.gz"])
def test_the_texts_of_json_lines_are_joined_by_blank_lines(tmp_path, name):
    records = [{"text": "one", "id": 1}, {"text": ""}, {"id": 3, "text": "two\nlines"}, {"text": None}, {"text": " "}]
    assert text_of(write_lines(tmp_path / name, records)) == "one\n\ntwo\nlines"


def test_empty_lines_and_the_byte_order_mark_are_no_documents(tmp_path):
    (tmp_path / "data.jsonl").write_bytes('\ufeff{"text": "one"}\r\n\r\n  \n{"text": "two"}'.encode())
    assert text_of(tmp_path / "data.jsonl") == "one\n\ntwo"


def test_a_column_is_named_after_a_colon(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", [{"text": "one", "prompt": "two"}])
    assert text_of(f"{source}:prompt") == "two"
    with pytest.raises(ValueError, match=r"line 1 has no column 'answer', only 'text', 'prompt'$"):
        text_of(f"{source}:answer")


def test_chats_become_text_by_the_template_and_follow_each_other(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", [{"messages": chat} for chat in CHATS])
    documents = read_documents(source, template)
    assert documents.templated
    assert "".join(documents.pieces) == "<user>one?<assistant>two<user>three?"
    with pytest.raises(ValueError, match=r"line 1 holds a chat, and the tokenizer has no chat template; name a column"):
        text_of(source)


def test_a_template_that_refuses_a_chat_is_named_with_the_line(tmp_path):
    from jinja2 import TemplateError

    def strict(chat):
        raise TemplateError("roles must alternate")

    source = write_lines(tmp_path / "data.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(
        ValueError, match="line 1: the tokenizer's chat template refuses the chat: roles must alternate"
    ):
        text_of(source, strict)


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name, "other": name * 2}])
        (tmp_path / f"{name}.txt").write_text(name.upper())
    assert text_of(f"{tmp_path}/*.jsonl") == "a\n\nb"
    assert text_of(f"{tmp_path}/*.jsonl:other") == "aa\n\nbb"
    assert text_of(f"{tmp_path}/*.txt") == "A\n\nB"
    with pytest.raises(ValueError, match="files with columns and files of plain text"):
        text_of(f"{tmp_path}/*")


def test_no_more_is_read_than_is_asked_for():
    asked = []

    def endless():
        while True:
            asked.append("text")
            yield "text"

    pieces = read_documents(endless()).pieces
    assert [next(pieces) for _ in range(3)] == ["text", "\n\n", "text"]
    assert len(asked) == 2


def test_an_iterable_holds_texts_or_chats():
    assert text_of(["one", "", "two"]) == "one\n\ntwo"
    assert text_of(CHATS, template) == "<user>one?<assistant>two<user>three?"
    assert text_of([]) == ""
    for bad, message in (
        ([3], "^document 0 must hold text, got int$"),
        (["one", CHATS[0]], "^document 1 must hold text, got a chat$"),
        ([CHATS[0], "one"], "^document 1 must hold a chat, .*, got str$"),
        ([[{"from": "human", "value": "one?"}]], r'must hold a chat, a list of {"role": \.\.\., "content": \.\.\.}'),
    ):
        with pytest.raises(ValueError, match=message):
            text_of(bad, template)


def bad_files(directory):
    (directory / "binary.txt").write_bytes(b"a" * CHUNK_BYTES + b"b\xff\xfe")
    (directory / "cut.txt").write_bytes("ü".encode()[:1])
    (directory / "bytes.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    (directory / "broken.jsonl").write_text('{"text": "one"}\n{"text": ')
    (directory / "indented.json").write_text(json.dumps([{"text": "one"}], indent=1))
    (directory / "array.json").write_text(json.dumps([{"text": "one"}]))
    (directory / "number.jsonl").write_text('{"text": 7}')
    (directory / "half.jsonl").write_text('{"text": "one"}\n{"text": "\\ud83d\\ude00 \\ud83d"}')
    (directory / "other.jsonl").write_text('{"label": 7}')
    (directory / "no.gz").write_bytes(b"not compressed")
    (directory / "half.txt.gz").write_bytes(gzip.compress(b"text" * 99)[:-20])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("binary.txt", f"is not UTF-8 text: invalid start byte at byte {CHUNK_BYTES + 1}$"),
        ("cut.txt", "is not UTF-8 text: unexpected end of data at byte 0$"),
        ("bytes.jsonl", "bytes.jsonl' line 2 is not UTF-8 text: invalid start byte$"),
        ("broken.jsonl", "line 2 is not JSON: Expecting value"),
        ("indented.json", "line 1 is not JSON: .*; write one object a line$"),
        ("array.json", "line 1 must be a JSON object, one a line, got list$"),
        ("number.jsonl", "line 1 must hold text, got int$"),
        ("half.jsonl", r"line 2 holds '\\ud83d' at character 2: half a character$"),
        ("other.jsonl", "line 1 has no column 'text' or 'messages', only 'label'; name the column after a colon$"),
        ("no.gz", "no.gz' cannot be unpacked: Not a gzipped file"),
        ("half.txt.gz", "cannot be unpacked: Compressed file ended"),
        ("missing.jsonl", "^no such file: "),
        ("missing.jsonl:prompt", "^no such file: "),
        ("missing/*.jsonl", "^no such file: "),
        ("number.jsonl/x", "^no such file: "),
        ("cut.txt:text", "is plain text and has no column 'text'$"),
        (".", 'is a directory; name its files with a wildcard, like ".*/\\*.jsonl"$'),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        text_of(f"{tmp_path}/{name}" if name != "." else tmp_path)


def test_a_parquet_file_gives_its_column_row_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": ["one", None, "two"], "chat": [CHATS[0], None, CHATS[1]], "id": [1, 2, 3]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + b"x" * 99)
    source = str(tmp_path / "data.parquet")
    assert text_of(source) == "one\n\ntwo"
    assert text_of(f"{source}:chat", template) == "<user>one?<assistant>two<user>three?"
    with pytest.raises(ValueError, match=r"row 1 must hold text, got int$"):
        text_of(f"{source}:id")
    with pytest.raises(ValueError, match=r"has no column 'label', only 'text', 'chat', 'id'$"):
        text_of(f"{source}:label")
    with pytest.raises(ValueError, match=r"broken\.parquet' cannot be read: "):
        text_of(tmp_path / "broken.parquet")


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"reading parquet needs pyarrow: pip install 'sparsekern\[parquet\]'$"):
        text_of(tmp_path / "data.parquet")


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the datasets library that records what it was asked for."""
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist on the Hub or cannot be accessed.")
        return rows(name)

    def rows(name):
        yield {"label": 1} if name == "labels" else {"text": "one", "title": "eins"}
        if name == "breaks":
            raise ConnectionError("the connection was reset. Try again")
        yield {"text": "two", "title": "zwei"}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_datasets_rows_are_streamed(datasets):
    assert text_of("org/wiki:small:test") == text_of("wiki") == "one\n\ntwo"
    assert text_of("wiki:::title") == "eins\n\nzwei"
    assert datasets == [
        ("org/wiki", "small", "test", True),
        ("wiki", None, "train", True),
        ("wiki", None, "train", True),
    ]


@pytest.mark.usefixtures("datasets")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "^cannot load dataset 'missing': Dataset 'missing' doesn't exist .*; give a local file, or check"),
        ("breaks", "^cannot load dataset 'breaks': the connection was reset; give a local file"),
        (
            "labels",
            "^dataset 'labels' has no column 'text' or 'messages', only 'label'; name the column after a colon$",
        ),
        ("wiki:::body", "^dataset 'wiki:::body' has no column 'body', only 'text', 'title'$"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused_in_one_line(source, message):
    with pytest.raises(ValueError, match=message):
        text_of(source)


def test_without_the_datasets_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="^'wiki' is no local file, and .* pip install datasets$"):
        text_of("wiki")


def test_a_title_names_no_directory_of_this_machine(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("{}")
    assert title(f"{tmp_path}/a.txt") == "a.txt"
    assert title(f"{tmp_path}/b.jsonl:prompt") == "b.jsonl:prompt"
    assert title(f"{tmp_path}/*.jsonl:prompt") == "*.jsonl:prompt"
    assert title("org/wiki:small:test") == "org/wiki:small:test"
