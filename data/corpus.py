"""Where text comes from: a Corpus is a list of files and one reader for each, and gives documents in a fixed order.

To add a kind of file, write a reader and enter it in READERS; to add a built-in corpus, write a function that
returns a Corpus and enter it in DATASETS.
"""

import glob
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.shards import PrepareError


class Document(NamedTuple):
    name: str
    text: str
    source_bytes: int  # how much of the input was read for it; these add up to Corpus.size, for progress


class Problems:
    """Inputs that had to be left out: all are counted, the first few are named."""

    NAMED = 10

    def __init__(self):
        self.count, self.named = 0, []

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if self.count <= self.NAMED:
            self.named.append(f"{where}: {what}; left out")

    def lines(self) -> list[str]:
        more = self.count - len(self.named)
        return self.named + ([f"... and {more} more"] if more else [])


Reader = Callable[[Path, str, Problems], Iterator[Document]]


@dataclass
class Corpus:
    description: str
    root: Path  # names of documents are relative to it
    files: list[tuple[str, Reader]]  # name, reader
    problems: Problems = field(default_factory=Problems)

    @property
    def size(self) -> int:
        return sum(os.path.getsize(self.root / name) for name, _ in self.files)

    def identity(self) -> list:
        """Changes when a file does, without reading any: name, size and time of last change."""
        stats = [(name, os.stat(self.root / name)) for name, _ in self.files]
        return [str(self.root), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]

    def documents(self) -> Iterator[Document]:
        """All documents, from the start; problems holds those of the last pass."""
        self.problems = Problems()
        for name, reader in self.files:
            yield from reader(self.root / name, name, self.problems)


# ------------------------------------------------------------------------------------------------------------- readers


def read_text(path: Path, name: str, problems: Problems) -> Iterator[Document]:
    """The whole file is one document, exactly as it stands: no newline is translated."""
    raw = path.read_bytes()
    try:
        yield Document(name, raw.decode("utf-8"), len(raw))
    except UnicodeDecodeError as error:
        problems.add(name, f"not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})")


def read_jsonl(path: Path, name: str, problems: Problems) -> Iterator[Document]:
    """One JSON object a line, its field "text" is the document."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{name}:{number}"
            if not raw.strip():
                continue
            try:
                text = json.loads(raw.decode("utf-8-sig"))["text"]
                text.encode("utf-8")  # "\ud800" is legal JSON but no text
            except UnicodeDecodeError:
                problems.add(where, "not UTF-8")
            except json.JSONDecodeError as error:
                problems.add(where, f"not JSON ({error.msg} at column {error.colno})")
            except RecursionError:
                problems.add(where, "JSON nested too deeply")
            except UnicodeEncodeError:
                problems.add(where, 'field "text" holds half a surrogate pair')
            except (KeyError, TypeError, AttributeError):
                problems.add(where, 'no field "text" holding a string')
            else:
                yield Document(where, text, len(raw))


READERS: dict[str, Reader] = {".txt": read_text, ".jsonl": read_jsonl}


# ------------------------------------------------------------------------------------------------------------- corpora


def stdlib(with_tests: bool = False) -> Corpus:
    """The Python standard library of the running interpreter: every machine that runs this has one."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"} | (set() if with_tests else {"test", "tests", "idle_test"})
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [subfolder for subfolder in subfolders if subfolder not in skipped]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    if not names:
        raise PrepareError(f"{root}: holds no *.py files (a Python without its sources); use --text FILES instead")
    description = f"Python {platform.python_version()} standard library" + (" with its tests" if with_tests else "")
    return Corpus(description, root, [(name, read_text) for name in sorted(names)])


def text_files(patterns: list[str]) -> Corpus:
    """The files that the patterns name, sorted, each once; the ending of a name chooses its reader."""
    names = set()
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [name for name in found if os.path.isfile(name)]
        if not files:
            reason = "is a folder; write a pattern of files, such as 'FOLDER/*.txt'" if found else "no such file; check the path"
            raise PrepareError(f"--text {pattern}: {reason}")
        names.update(os.path.normpath(name) for name in files)
    for name in sorted(names):
        if Path(name).suffix not in READERS:
            raise PrepareError(f"--text {name}: cannot read '{Path(name).suffix}' files; give one of {', '.join(READERS)}")
    return Corpus(f"{len(names)} text files", Path("."), [(name, READERS[Path(name).suffix]) for name in sorted(names)])


DATASETS: dict[str, Callable[..., Corpus]] = {"stdlib": stdlib}
