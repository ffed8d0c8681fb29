"""What to prepare: a Corpus is a list of files in a fixed order, or a stream that can only be read from its start.

To add a named recipe, enter it in RECIPES.
"""

import glob
import io
import os
import platform
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.shards import PrepareError, ResumableError
from data.sources import FORMS, MAX_DOCUMENT, Piece, Tally, cut, form_of, json_texts, read_piece


PART_BYTES = 4 << 20  # of input that one process takes at a time; twice that and more for a corpus that would have too many parts


class Source(NamedTuple):
    name: str  # relative to the corpus's root
    form: str


@dataclass
class Corpus:
    description: str
    root: Path
    sources: list[Source]
    field: str = "text"
    separator: str | None = None

    stream = None

    @property
    def size(self) -> int:
        return sum(os.path.getsize(self.root / name) for name, _ in self.sources)

    def identity(self) -> list:
        """Changes when a file does, without reading any: name, size and time of last change."""
        stats = [(name, os.stat(self.root / name)) for name, _ in self.sources]
        return [str(self.root), self.field, self.separator, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]

    def parts(self) -> list[list[Piece]]:
        """The whole corpus in order, cut for processes to share: pieces of large files, several small files together."""
        target, size = PART_BYTES, self.size
        while size // target > 1 << 15:
            target *= 2
        parts, filled = [[]], 0
        for name, form in self.sources:
            for piece in cut(name, str(self.root / name), form, target, self.field, self.separator):
                if filled and filled + piece.bytes > target:
                    parts.append([])
                    filled = 0
                parts[-1].append(piece)
                filled += piece.bytes
        return parts

    def texts(self, parts: list[list[Piece]] | None = None, tally: Tally | None = None) -> Iterator[str]:
        for part in self.parts() if parts is None else parts:
            for piece in part:
                yield from read_piece(piece, tally or Tally())


# -------------------------------------------------------------------------------------------------------------- streams


@dataclass
class Stream:
    """Documents that come one after the other: read(skip) gives texts, or None for one that was left out, from item `skip` on.

    The tally's lines are the items given so far by that call.
    """

    description: str
    name: str
    read: Callable[[int, Tally], Iterator[str | None]]
    can_reread: bool
    root: Path = Path(".")

    size = 0

    @property
    def stream(self) -> "Stream":
        return self

    def identity(self) -> list:
        return [self.name]


def standard_input(field: str) -> Stream:
    def read(skip: int, tally: Tally) -> Iterator[str | None]:
        file = sys.stdin.buffer if hasattr(sys.stdin, "buffer") else io.BufferedReader(io.FileIO(0))
        for text in json_texts(file, field, tally):
            yield text

    return Stream("standard input", "standard input", read, can_reread=False)


def hub(name: str, config: str | None, split: str, field: str) -> Stream:
    """A dataset of the Hugging Face hub, or a folder that its client understands, streamed: nothing is kept on disk."""

    def read(skip: int, tally: Tally) -> Iterator[str | None]:
        try:
            import datasets
        except ImportError:
            raise PrepareError(f"--dataset {name}: Python module 'datasets' is missing; run scripts/setup.sh") from None
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            for row in rows.skip(skip) if skip else rows:
                tally.lines += 1
                text = row.get(field)
                problem = problem_of(text, field)
                if problem:
                    tally.leave_out(problem)
                yield None if problem else text
        except PrepareError:
            raise
        except Exception as error:  # the client raises its own, its file systems' and its HTTP library's
            reason = " ".join(str(error).split())[:300]
            raise ResumableError(f"--dataset {name}: the hub's client failed ({type(error).__name__}: {reason}); "
                                 "check name, configuration, split and network, and run again to go on") from None  # fmt: skip

    description = f"{name}{f' ({config})' if config else ''}, split {split}, streamed"
    return Stream(description, f"{name}/{config or ''}/{split}/{field}", read, can_reread=True)


def problem_of(text: object, field: str) -> str | None:
    if not isinstance(text, str):
        return f'no field "{field}" holding a string'
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return f'field "{field}" holds half a surrogate pair'
    return f"a document of {size} bytes, over {MAX_DOCUMENT}" if size > MAX_DOCUMENT else None


# ---------------------------------------------------------------------------------------------------------------- files


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
    return Corpus(description, root, [Source(name, ".txt") for name in sorted(names)])


def text_files(patterns: list[str], field: str = "text", separator: str | None = None) -> Corpus:
    """The files that the patterns name, sorted, each once; the ending of a name chooses its reader."""
    names, ignored = set(), 0
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [name for name in found if os.path.isfile(name)]
        for folder in (name for name in found if os.path.isdir(name)):
            inside = [os.path.join(where, name) for where, _, some in os.walk(folder) for name in some]
            readable = [name for name in inside if form_of(name)]
            ignored += len(inside) - len(readable)
            files += readable
        if not files:
            reason = f"holds no file ending in {', '.join(FORMS)}" if found else "no such file; check the path"
            raise PrepareError(f"--text {pattern}: {reason}")
        names.update(os.path.normpath(name) for name in files)
    for name in sorted(names):
        if not form_of(name):
            raise PrepareError(f"--text {name}: cannot read '{Path(name).suffix}' files; give one of {', '.join(FORMS)}")
    if ignored:
        print(f"{ignored} files in folders are not read: their names end in none of {', '.join(FORMS)}", file=sys.stderr)
    return Corpus(f"{len(names)} text files", Path("."), [Source(name, form_of(name)) for name in sorted(names)], field, separator)


# -------------------------------------------------------------------------------------------------------------- recipes


class Recipe(NamedTuple):
    what: str
    hub: str = ""
    config: str | None = None
    files: tuple[str, ...] = ()  # in a local clone, {split} and {config} filled in; the first pattern that matches counts
    field: str = "text"
    separator: str | None = None
    url: str = ""


RECIPES: dict[str, Recipe] = {
    "slimpajama": Recipe("SlimPajama-627B, the reference's corpus", "cerebras/SlimPajama-627B", files=("{split}/chunk*/*.jsonl.zst",)),
    "fineweb-edu": Recipe("FineWeb-Edu, 10B sample (others: --config)", "HuggingFaceFW/fineweb-edu", "sample-10BT",
                          ("sample/10BT/*.parquet", "data/**/*.parquet", "**/*.parquet")),
    "tinystories": Recipe("TinyStories", "roneneldan/TinyStories", files=("TinyStories-{split}.txt", "data/{split}-*.parquet", "**/*.parquet"),
                          separator="<|endoftext|>"),
    "tinyshakespeare": Recipe("1 MB of Shakespeare, a speech a document", files=("input.txt", "*.txt"), separator="",
                              url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
    "starcoder": Recipe("StarCoder's source code", "bigcode/starcoderdata", files=("{config}/*.parquet", "**/*.parquet"), field="content"),
}  # fmt: skip


def download(url: str, path: Path) -> None:
    """Beside its place first, so that a file under its own name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(f"{path}.part", "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
    except (OSError, ValueError) as error:
        raise ResumableError(f"{url}: cannot be downloaded ({error}); check the network, or download it elsewhere and give --from FOLDER") from None
    os.replace(f"{path}.part", path)


def open_recipe(name: str, clone: str | None, config: str | None, split: str, field: str | None, downloads: Path) -> Corpus | Stream:
    recipe = RECIPES[name]
    field, config = field or recipe.field, config or recipe.config
    if not clone and not recipe.url:
        return hub(recipe.hub, config, split, field)
    root = Path(clone) if clone else downloads
    if not clone and not (root / "input.txt").exists():
        download(recipe.url, root / "input.txt")
    for pattern in recipe.files:
        pattern = pattern.format(split=split, config=config or "*")
        names = sorted(Path(path).relative_to(root).as_posix() for path in glob.glob(f"{glob.escape(str(root))}/{pattern}", recursive=True))
        if names:
            return Corpus(f"{name}, split {split}: {len(names)} files", root, [Source(n, form_of(n)) for n in names], field, recipe.separator)
    raise PrepareError(f"--from {root}: holds none of {', '.join(recipe.files)} for split {split}; give a clone of {recipe.hub or recipe.url}")
