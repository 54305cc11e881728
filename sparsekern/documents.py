"""documents: the texts of files, of a dataset of the hub or of an iterable, read one by one as they are needed.

    notes.txt                       UTF-8 text, one document; a file of any name but these is read like it
    data.jsonl                      a JSON object a line, each a document; .ndjson and .json likewise
    data.parquet                    a row is a document; needs pyarrow
    "data/train-*.parquet"          several of these, in the order of their names
    data.jsonl:column               the column named, also of parquet; else "text", and without it "messages"
    name:config:split:column        a dataset of the hub, "train" unless named, streamed; needs datasets and a network

All but parquet may be compressed, .txt.gz. A column holds text, or chats: lists of {"role": ..., "content": ...}, which
become text by the tokenizer's chat template. Documents without text are passed over.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import TemplateError

COLUMNS = ("text", "messages")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
KNOWN = (".txt", *JSON_LINES, PARQUET)
# between two documents, as the texts that perplexity is published for are joined
BLANK_LINE = "\n\n"
CHUNK_BYTES = 1 << 20

Chat = Sequence[Mapping[str, Any]]
Source = str | Path | Iterable[str | Chat]


@dataclass(frozen=True)
class Documents:
    """A text in pieces.

    pieces     what they are put together is the whole text; read once
    templated  it was made by a chat template: special tokens are in it already
    """

    pieces: Iterator[str]
    templated: bool


def read_documents(source: Source, template: Callable[[Chat], str] | None = None) -> Documents:
    """The documents of a source, see above; text is joined by blank lines, chats follow each other.

    template  makes text of a chat; None refuses chats

    Raises ValueError, now or while the pieces are read, naming the file, the line and the remedy: for what is not
    there, cannot be read or is no text, and for a library that is missing.
    """
    if isinstance(source, str | Path):
        files, column = _files(source)
        if files and not _has_columns(files[0]):
            if column is not None:
                raise ValueError(f"{str(files[0])!r} is plain text and has no column {column!r}")
            texts = (_text(path) for path in files)
            return Documents(_joined(texts), templated=False)
        values = (
            itertools.chain.from_iterable(_values(path, column) for path in files) if files else _dataset(str(source))
        )
    else:
        values = ((f"document {number}", value) for number, value in enumerate(source))
    filled = ((where, value) for where, value in values if not _empty(value))
    first = next(filled, None)
    if first is None:
        return Documents(iter(()), templated=False)
    templated = isinstance(first[1], list | tuple)
    documents = (
        _encodable(where, _document(where, value, templated, template))
        for where, value in itertools.chain([first], filled)
    )
    return Documents(documents if templated else _joined((text,) for text in documents), templated)


def title(source: str | Path) -> str:
    """What a report calls a source: its name without the directories of this machine."""
    files, column = _files(source)
    if not files:
        return str(source)
    named = files[0].name if len(files) == 1 else Path(str(source)).name.removesuffix(f":{column}")
    return named if column is None else f"{named}:{column}"


def _files(source: str | Path) -> tuple[list[Path], str | None]:
    """The files that a source names and the column; no files where it can only be a dataset."""
    column = None
    path = Path(source).expanduser()
    name, colon, last = str(source).rpartition(":")
    if not path.exists() and colon and (_matches(name) or _is_local(name)):
        path, column = Path(name).expanduser(), last
    if path.is_dir():
        raise ValueError(f'{str(path)!r} is a directory; name its files with a wildcard, like "{path}/*.jsonl"')
    files = [path] if path.exists() else _matches(str(path))
    if not files and (isinstance(source, Path) or _is_local(str(path))):
        raise ValueError(f"no such file: {str(path)!r}")
    if len({_has_columns(file) for file in files}) > 1:
        raise ValueError(f"{str(source)!r} names files with columns and files of plain text; name one kind")
    return files, column


def _matches(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path))) if Path(match).is_file()] if "*" in name else []


def _is_local(name: str) -> bool:
    """Whether a name can be nothing but a file's."""
    return name.startswith((".", "/", "~")) or "*" in name or name.removesuffix(".gz").endswith(KNOWN)


def _has_columns(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((*JSON_LINES, PARQUET))


def _joined(texts: Iterable[Iterable[str]]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield BLANK_LINE
        yield from text


def _text(path: Path) -> Iterator[str]:
    """A file of UTF-8 text in pieces, its line ends as \\n, without the byte order mark."""
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with _opened(path) as file:
        while True:
            chunk = _read(path, lambda: file.read(CHUNK_BYTES))
            pending = len(decode.getstate()[0])
            try:
                text = decode.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise ValueError(f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {at}") from error
            yield newlines.decode(text, final=not chunk)
            offset += len(chunk)
            if not chunk:
                return


def _values(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Where each document stands, in words, and what its column holds."""
    return _parquet(path, column) if path.suffix == PARQUET else _json_lines(path, column)


def _json_lines(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        number = 0
        while line := _read(path, file.readline):
            number += 1
            where = f"{str(path)!r} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text: {error.reason}") from error
            if not text:
                continue
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                remedy = "; write one object a line" if text in ("[", "{") else ""
                raise ValueError(f"{where} is not JSON: {error}{remedy}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} must be a JSON object, one a line, got {type(record).__name__}")
            column = _column(where, column, list(record))
            yield where, record[column]


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{str(path)!r}: reading parquet needs pyarrow: pip install 'sparsekern[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            column = _column(repr(str(path)), column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=[column], batch_size=256):
                for value in batch.column(0):
                    number += 1
                    yield f"{str(path)!r} row {number}", value.as_py()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    name, config, split, column = (source.split(":") + [""] * 3)[:4]
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{source!r} is no local file, and datasets of the hub need the datasets library: pip install datasets"
        ) from None
    try:
        # streamed: no more is downloaded than is read
        rows = iter(datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(_no_dataset(source, error)) from error
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(_no_dataset(source, error)) from error
        if row is None:
            return
        column = _column(f"dataset {source!r}", column or None, list(row))
        yield f"dataset {source!r} row {number}", row[column]


def _no_dataset(source: str, error: Exception) -> str:
    reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"cannot load dataset {source!r}: {reason}; give a local file, or check the name and the network"


def _column(where: str, wanted: str | None, names: Sequence[str]) -> str:
    found = [name for name in ((wanted,) if wanted is not None else COLUMNS) if name in names]
    if not found:
        missing = repr(wanted) if wanted is not None else " or ".join(map(repr, COLUMNS))
        remedy = "" if wanted is not None else "; name the column after a colon"
        raise ValueError(f"{where} has no column {missing}, only {', '.join(map(repr, names)) or 'none'}{remedy}")
    return found[0]


def _document(where: str, value: Any, templated: bool, template: Callable[[Chat], str] | None) -> str:
    if isinstance(value, str) and not templated:
        return value
    chat = isinstance(value, list | tuple) and all(
        isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value
    )
    if not chat or not templated:
        wanted = 'a chat, a list of {"role": ..., "content": ...}' if templated else "text"
        raise ValueError(f"{where} must hold {wanted}, got {_kind(value)}")
    if template is None:
        raise ValueError(f"{where} holds a chat, and the tokenizer has no chat template; name a column of text")
    try:
        return template(list(value))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the chat: {error}") from error


def _encodable(where: str, text: str) -> str:
    """`text`; raises ValueError for half of a character, as JSON's "\\ud83d" is: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {text[error.start]!a} at character {error.start}: half a character") from error
    return text


def _empty(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, list | tuple) and not value)
    )


def _kind(value: Any) -> str:
    return "a chat" if isinstance(value, list | tuple) else type(value).__name__


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read(path: Path, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be unpacked: {error}") from error
