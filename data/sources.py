"""Readers: from a file of some form, or a part of one, to the texts of its documents.

A reader is a generator `read(piece, tally)` that yields texts and reports in the tally what it had to leave out and how many
lines (rows, for parquet) it has seen. A file whose form allows it is cut into pieces that are read on their own: byte ranges
of .jsonl and of .txt with a separator, row groups of .parquet. A piece owns the lines that begin in it. How a file is cut
depends on sizes alone, never on how many processes there are.

To add a form, write a reader and enter it in FORMS.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from data.shards import PrepareError

MAX_DOCUMENT = 32 << 20  # bytes of one line or file; what is longer is left out by name, so that memory is bounded


class Piece(NamedTuple):
    source: str  # the name to report
    path: str
    form: str
    start: int  # bytes, or row groups
    end: int
    bytes: int  # share of the input, for progress
    field: str  # of jsonl and parquet
    separator: str | None  # of txt


@dataclass
class Tally:
    """What a reader reports beside the texts. Lines are counted from 1 at the piece's start; 0 is the file as a whole."""

    NAMED = 100  # a part names so many; beyond, they are only counted

    lines: int = 0
    count: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)

    def leave_out(self, what: str, line: int | None = None) -> None:
        self.count += 1
        if len(self.problems) < self.NAMED:
            self.problems.append((self.lines if line is None else line, what))


Reader = Callable[[Piece, Tally], Iterator[str]]


# ---------------------------------------------------------------------------------------------------------------- text


def decode(raw: bytes, tally: Tally, line: int | None = None) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        tally.leave_out(f"not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})", line)
        return None


def read_txt(piece: Piece, tally: Tally) -> Iterator[str]:
    """The whole file is one document, exactly as it stands; or, with a separator, what is between lines that equal it."""
    if piece.separator is not None:
        yield from read_separated(piece, tally)
        return
    size = os.path.getsize(piece.path)
    if size > MAX_DOCUMENT:
        tally.leave_out(f"a document of {size} bytes, over {MAX_DOCUMENT}; split it, or give --separator", 0)
        return
    with open(piece.path, "rb") as file:
        text = decode(file.read(), tally, 0)
    if text is not None:
        yield text


def read_separated(piece: Piece, tally: Tally) -> Iterator[str]:
    """A piece owns the documents whose separator line, the one before them, begins in it, and the file's first."""
    separator = piece.separator.encode()
    lines, size, inside = [], 0, piece.start == 0
    with open(piece.path, "rb") as file:
        position = seek_to_line(file, piece.start)
        while inside or position < piece.end:
            raw = file.readline(MAX_DOCUMENT)
            at, position = position, position + len(raw)
            if raw and raw.rstrip(b"\r\n") != separator:
                if inside and size <= MAX_DOCUMENT:
                    lines.append(raw)
                tally.lines += inside
                size += inside * len(raw)
                continue
            if size > MAX_DOCUMENT:
                tally.leave_out(f"the document before this line is over {MAX_DOCUMENT} bytes")
            elif lines and (text := decode(b"".join(lines), tally)) is not None:
                yield text
            lines, size, inside = [], 0, at < piece.end
            if not raw:
                return
            if inside:
                tally.lines += 1


# --------------------------------------------------------------------------------------------------------------- jsonl


def seek_to_line(file: BinaryIO, start: int) -> int:
    """To the first line that begins at start or after it."""
    if start == 0:
        return 0
    file.seek(start - 1)
    while (skipped := file.readline(1 << 20)) and not skipped.endswith(b"\n"):
        pass
    return file.tell()


def read_jsonl(piece: Piece, tally: Tally) -> Iterator[str]:
    with open(piece.path, "rb") as file:
        yield from json_texts(file, piece.field, tally, seek_to_line(file, piece.start), piece.end)


def json_texts(file: BinaryIO, name: str, tally: Tally, position: int = 0, end: int = 1 << 62) -> Iterator[str]:
    """One JSON object a line, its field of that name is the document."""
    while position < end and (raw := file.readline(MAX_DOCUMENT)):
        position += len(raw)
        tally.lines += 1
        if len(raw) == MAX_DOCUMENT and not raw.endswith(b"\n"):
            while (rest := file.readline(MAX_DOCUMENT)) and not rest.endswith(b"\n"):
                position += len(rest)
            position += len(rest)
            tally.leave_out(f"a line of over {MAX_DOCUMENT} bytes")
            continue
        text = json_text(raw, name, tally)
        if text is not None:
            yield text


def json_text(raw: bytes, name: str, tally: Tally) -> str | None:
    if not raw.strip():
        return None
    try:
        text = json.loads(raw.decode("utf-8-sig"))[name]
        text.encode("utf-8")  # "\ud800" is legal JSON but no text
        return text
    except UnicodeDecodeError:
        tally.leave_out("not UTF-8")
    except json.JSONDecodeError as error:
        tally.leave_out(f"not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        tally.leave_out("JSON nested too deeply")
    except UnicodeEncodeError:
        tally.leave_out(f'field "{name}" holds half a surrogate pair')
    except (KeyError, TypeError, AttributeError, ValueError):
        tally.leave_out(f'no field "{name}" holding a string')
    return None


# ---------------------------------------------------------------------------------------------------------- compressed


class ZstdFile(io.RawIOBase):
    """All frames of a .zst file, one after the other. The library's own reader takes a file that is cut off for a whole one."""

    def __init__(self, path: str):
        import zstandard

        self._file = open(path, "rb")
        self._new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._frame, self._input, self._output = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self._output:
            data = self._input or self._file.read(1 << 15)
            if not data:
                if self._frame is not None:
                    raise EOFError("it is cut off")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output = memoryview(self._frame.decompress(data))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._output))
        buffer[:n], self._output = self._output[:n], self._output[n:]
        return n


def read_compressed(piece: Piece, tally: Tally) -> Iterator[str]:
    """A compressed file is read in one go. What comes before damage counts; the damage is reported with the line it was met at."""
    import zstandard

    opened = gzip.open(piece.path, "rb") if piece.form == ".jsonl.gz" else io.BufferedReader(ZstdFile(piece.path), 1 << 20)
    try:
        with opened as file:
            yield from json_texts(file, piece.field, tally)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        tally.leave_out(f"damaged after this line, the rest is lost ({' '.join(str(error).split())})")


# ------------------------------------------------------------------------------------------------------------- parquet


def parquet_groups(path: str) -> list[int] | None:
    """Bytes of each row group; None where the file is no parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        return None


def read_parquet(piece: Piece, tally: Tally) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(piece.path, buffer_size=1 << 20, pre_buffer=False) as file:
            schema = file.schema_arrow
            if piece.field not in schema.names:
                tally.leave_out(f"no column '{piece.field}' (it has {', '.join(schema.names)}); give --field", 0)
                return
            kind = schema.field(piece.field).type
            text_types = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
            if not any(test(kind) for test in text_types):
                tally.leave_out(f"column '{piece.field}' holds {kind}, not text", 0)
                return
            groups = range(piece.start, min(piece.end, file.num_row_groups))
            for batch in file.iter_batches(batch_size=512, row_groups=list(groups), columns=[piece.field], use_threads=False):
                # As bytes, so that a row that is not UTF-8 is one bad row
                for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    tally.lines += 1
                    if raw is None:
                        tally.leave_out("no text (null)")
                    elif len(raw) > MAX_DOCUMENT:
                        tally.leave_out(f"a document of {len(raw)} bytes, over {MAX_DOCUMENT}")
                    elif (text := decode(raw, tally)) is not None:
                        yield text
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        tally.leave_out(f"damaged after this row, the rest is lost ({' '.join(str(error).split())[:150]})")


# --------------------------------------------------------------------------------------------------------------- forms

FORMS: dict[str, Reader] = {
    ".txt": read_txt, ".jsonl": read_jsonl, ".jsonl.gz": read_compressed, ".jsonl.zst": read_compressed, ".parquet": read_parquet,
}  # fmt: skip


def form_of(name: str) -> str | None:
    return next((form for form in FORMS if name.endswith(form)), None)


def cut(source: str, path: str, form: str, target: int, field: str, separator: str | None) -> list[Piece]:
    """A file's pieces, of about `target` bytes where its form can be cut."""
    size = os.path.getsize(path)
    whole = Piece(source, path, form, 0, 1 << 62, size, field, separator)
    if size <= target:
        return [whole]
    if form == ".parquet" and (groups := parquet_groups(path)):
        ends, filled = [], 0
        for index, bytes_of_group in enumerate(groups):
            filled += bytes_of_group
            if filled >= target or index + 1 == len(groups):
                ends.append(index + 1)
                filled = 0
    elif form == ".jsonl" or (form == ".txt" and separator is not None):
        ends = [*range(target, size, target), size]
    else:
        return [whole]
    share = size // len(ends)
    return [whole._replace(start=start, end=end, bytes=share) for start, end in zip([0, *ends], ends)]


def read_piece(piece: Piece, tally: Tally) -> Iterator[str]:
    try:
        yield from FORMS[piece.form](piece, tally)
    except ImportError as error:
        raise PrepareError(f"{piece.source}: Python module '{error.name}' is missing; run scripts/setup.sh") from None
