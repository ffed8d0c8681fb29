"""Documents that hide something to be found: made from a seed, written as token shards for training and as prompts for evaluation.

    python -m data.retrieval passkey train   --out DIR --documents 20000 --length 4096
    python -m data.retrieval passkey prompts --out DIR --lengths 4k,8k,...,256k
    python -m data.retrieval phonebook train   --out DIR --documents 20000 --length 4096
    python -m data.retrieval phonebook prompts --out DIR --entries 20,40,...,480

A passkey document is filler that repeats itself, a statement of a five-digit key at some depth of it, and the question at the
end. A phone book is lines of a name and a ten-digit number, then a few of them asked for again. Each begins with the end-of-text
token and has exactly the length asked for. `train` packs samples of --length tokens, one document each or, with --min-length,
several whose lengths
are spread evenly on a logarithmic scale. `prompts` writes what `train_samba retrieve` reads:

    prompts.json   {"task": ..., "vocabulary": ..., "files": [{"file", "length", "rows": [{"answer": tokens, ...labels}]}]}
    *.bin          a shard each: rows of `length` tokens, every one a prompt and behind it its `answer` last tokens; then EOS

--vocabulary words is built in: one token a word, digit or sign of these documents, for models trained from nothing. Any file
that data.prepare takes as tokenizer does as well; a checkpoint has its own as tokenizer.model.
"""

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

import numpy as np

from data.shards import MAX_VOCAB_SIZE, PrepareError, make_header, sync_folder, write_synced

FILLER = (
    "Rain fell on the low hills all day. A cart of hay stood by the mill. The baker swept his floor and sang. Two crows sat on the garden wall. "
    "Smoke rose from a far house. Nobody was in a hurry. The river ran slow and brown under the bridge. An old dog slept in the shade of the "
    "barn. "
)
PASSKEY_INTRO = "Somewhere in this long story a pass key is told. Find it and keep it in mind, because it will be asked for at the end. "
PASSKEY_FACT = "The pass key is {key}. Do not forget that {key} is the pass key. "
PASSKEY_QUERY = "Now the story is over. What is the pass key? The pass key is"

PHONEBOOK_INTRO = "This is a phone book.\n"
PHONEBOOK_QUERY = "Now find these people in the phone book.\n"
FIRST_NAMES = (
    "Ada Alma Anton Arno Astrid Basil Bea Boris Bruno Carla Cecil Clara Cyril Dana Dora Edgar Elsa Emil Enid Erik Esther Felix Flora Frida Gita "
    "Greta Gustav Hana Hector Heidi Hugo Ida Igor Ingrid Iris Ivan Jana Joris Jutta Karin Kasper Lars Leah Lena Linus Lotte Magda Marek Mina "
    "Moritz Nadia Nils Nora Olga Oscar Otto Petra Quentin Rhea Rolf Rosa Selma Silas Sven"
).split()
LAST_NAMES = (
    "Abel Adler Amsel Arnt Barlow Bexley Birk Bolt Brandt Carver Cole Crane Dahl Decker Drake Ebner Ekman Ellis Faber Falk Fenn Garner Gold "
    "Grimm Haas Halder Hollis Ibsen Jansen Keller Kern Kling Lark Lindt Lorne Marsh Moss Munk Nagel Norden Oakes Olsen Pike Plum Quist Rask "
    "Reed Roth Sands Sommer Stone Tamm Thorne Ulm Vance Voss Wade Weber Winter Wolf Yates Zander Zeller Zorn"
).split()


# ----------------------------------------------------------------------------------------------------------- vocabularies


class Words:
    """One token a word, digit, sign or line end of the documents below; spaces are not tokens. Id 0 ends a text."""

    name, eos_id, fingerprint = "words", 0, 0
    pattern = re.compile(r"[A-Za-z]+|\d|[^\w ]")

    def __init__(self):
        texts = [FILLER, PASSKEY_INTRO, PASSKEY_FACT.format(key=""), PASSKEY_QUERY, PHONEBOOK_INTRO, PHONEBOOK_QUERY, "0123456789:.\n"]
        texts += FIRST_NAMES + LAST_NAMES
        self.words = ["<eos>", *sorted({word for text in texts for word in self.pattern.findall(text)})]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def encode(self, text: str) -> np.ndarray:
        return np.array([self.ids[word] for word in self.pattern.findall(text)], dtype="<u2")

    def decode(self, ids) -> str:
        return " ".join(self.words[i] for i in ids)


class TokenizerFile:
    """A tokenizer of data.prepare. Texts are encoded piece by piece: a key is the same tokens wherever it stands."""

    def __init__(self, name: str):
        from data.shards import fingerprint
        from data.tokenizer import load_tokenizer

        self.tokenizer = load_tokenizer(name)
        self.name, self.vocab_size, self.eos_id = name, self.tokenizer.vocab_size, self.tokenizer.eos_id
        self.fingerprint = fingerprint(self.tokenizer.model)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode_ids([text], True)[0], dtype="<u2")

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(i) for i in ids])


def vocabulary_of(name: str) -> Words | TokenizerFile:
    return Words() if name == "words" else TokenizerFile(name)


# -------------------------------------------------------------------------------------------------------------- documents


def draw(rng: random.Random, n: int) -> int:
    """From 0 to n - 1. Python promises that random() gives the same numbers in every version, and nothing else of the module."""
    return int(rng.random() * n)


class Filler:
    """The filler without end: its tokens, and where in them a sentence begins."""

    def __init__(self, vocabulary):
        sentences = [vocabulary.encode(sentence + ". ") for sentence in FILLER.strip().rstrip(".").split(". ")]
        self.tokens = np.concatenate(sentences)
        self.begins = np.cumsum([0, *map(len, sentences)])  # the last one is where it begins again

    def last(self, n: int) -> np.ndarray:
        """The n tokens before a beginning: they end with a whole sentence and start wherever they must."""
        return np.resize(np.roll(self.tokens, n % len(self.tokens)), n)

    def boundary(self, n: int, wanted: float) -> int:
        """Of the places between sentences in last(n), 0 and n among them, the one nearest to `wanted`."""
        size = len(self.tokens)
        turns = int(n - wanted) // size  # whole cycles between there and the end
        places = {0, n, *(int(n - turn * size + begin) for turn in (turns, turns + 1) for begin in self.begins)}
        return min((place for place in places if 0 <= place <= n), key=lambda place: (abs(place - wanted), place))


class Passkey:
    """EOS, what is to come, filler with the key at a depth, the question. The answer is the key."""

    name = "passkey"

    def __init__(self, vocabulary):
        self.vocabulary, self.filler = vocabulary, Filler(vocabulary)
        self.intro = np.concatenate([[vocabulary.eos_id], vocabulary.encode(PASSKEY_INTRO)])
        self.query, self.stop = vocabulary.encode(PASSKEY_QUERY), vocabulary.encode(".")
        self.shortest = self.room_for("99999")

    @staticmethod
    def new_key(rng: random.Random) -> str:
        return str(10000 + draw(rng, 90000))

    def room_for(self, key: str) -> int:
        """Tokens of a document without filler"""
        return len(self.intro) + len(self.fact(key)) + len(self.query) + len(self.answer(key)) + len(self.stop)

    def fact(self, key: str) -> np.ndarray:
        return self.vocabulary.encode(PASSKEY_FACT.format(key=key))

    def answer(self, key: str) -> np.ndarray:
        return self.vocabulary.encode(" " + key)

    def document(self, length: int, depth: float, key: str, ended: bool) -> np.ndarray:
        """length tokens, of which the last are the answer or, if ended, the full stop behind it."""
        tail = [self.query, self.answer(key), self.stop[: len(self.stop) * ended]]
        fact = self.fact(key)
        n = length - len(self.intro) - len(fact) - sum(map(len, tail))
        if n < 0:
            raise PrepareError(f"a passkey document of {length} tokens: with this vocabulary it has at least {length - n}")
        filler, at = self.filler.last(n), self.filler.boundary(n, depth * n)
        return np.concatenate([self.intro, filler[:at], fact, filler[at:], *tail])

    def training_document(self, length: int, rng: random.Random) -> np.ndarray:
        depth = rng.random()
        return self.document(length, depth, self.new_key(rng), True)


class Phonebook:
    """EOS, filler to the exact length, lines "Name Surname: 7xxxxxxxxx", the request, some of them again. The answer is the last number."""

    name = "phonebook"

    def __init__(self, vocabulary, queries: int = 3):
        self.vocabulary, self.filler, self.queries = vocabulary, Filler(vocabulary), queries
        self.intro, self.query, self.line_end = vocabulary.encode(PHONEBOOK_INTRO), vocabulary.encode(PHONEBOOK_QUERY), vocabulary.encode("\n")
        self.names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
        self.tokens_of_name: dict[str, np.ndarray] = {}
        widest = max(len(vocabulary.encode(f"{name}:")) for name in self.names)
        self.widest_line = widest + len(vocabulary.encode(" 9876543210")) * (1 if isinstance(vocabulary, Words) else 2) + len(self.line_end)
        self.shortest = 1 + len(self.intro) + len(self.query) + self.widest_line * (queries + max(1, queries))

    def new_entries(self, count: int, rng: random.Random) -> list[tuple[str, str]]:
        """Names that are all different, with numbers of ten digits of which the first is 6 to 9."""
        if count > len(self.names):
            raise PrepareError(f"a phone book of {count} entries: there are {len(self.names)} names")
        chosen, moved = [], {}  # the first `count` of a shuffle of all names: what lies where it has moved something
        for i in range(count):
            j = i + draw(rng, len(self.names) - i)
            chosen.append(moved.get(j, j))
            moved[j] = moved.get(i, i)
        return [(self.names[i], str(6000000000 + draw(rng, 4000000000))) for i in chosen]

    def name_tokens(self, entry) -> np.ndarray:
        name = entry[0]
        if name not in self.tokens_of_name:
            self.tokens_of_name[name] = self.vocabulary.encode(f"{name}:")
        return self.tokens_of_name[name]

    def answer(self, entry) -> np.ndarray:
        return self.vocabulary.encode(" " + entry[1])

    def line(self, entry) -> np.ndarray:
        return np.concatenate([self.name_tokens(entry), self.answer(entry), self.line_end])

    def parts(self, entries, asked, ended: bool) -> list[np.ndarray]:
        """All but EOS and filler"""
        last = self.line(asked[-1]) if ended else np.concatenate([self.name_tokens(asked[-1]), self.answer(asked[-1])])
        return [self.intro, *map(self.line, entries), self.query, *map(self.line, asked[:-1]), last]

    def document(self, length: int, parts: list[np.ndarray]) -> np.ndarray:
        n = length - 1 - sum(map(len, parts))
        if n < 0:
            raise PrepareError(f"a phone book of {length} tokens: its entries alone have {length - n}")
        return np.concatenate([[self.vocabulary.eos_id], self.filler.last(n), *parts]).astype("<u2")

    def ask(self, entries, rng: random.Random) -> list:
        """`queries` different entries, in random order"""
        left = list(entries)
        return [left.pop(draw(rng, len(left))) for _ in range(min(self.queries, len(left)))]

    def training_document(self, length: int, rng: random.Random) -> np.ndarray:
        """As many entries as fit"""
        most = (length - 1 - len(self.intro) - len(self.query) - self.queries * self.widest_line) // self.widest_line
        if most < 1:
            raise PrepareError(f"a phone book of {length} tokens with {self.queries} questions: it has at least {self.shortest}")
        entries = self.new_entries(min(most, len(self.names)), rng)
        return self.document(length, self.parts(entries, self.ask(entries, rng), True))


# ----------------------------------------------------------------------------------------------------------------- output


def document_lengths(total: int, shortest: int, longest: int, rng: random.Random) -> list[int]:
    """Lengths that add up to total, each log-uniform from shortest to longest; a rest too short for a document joins the last."""
    lengths, left = [], total
    while left:
        length = min(left, int(shortest * (longest / shortest) ** rng.random()))
        if left - length < shortest:
            length = left
        lengths.append(length)
        left -= length
    return lengths


def write_shard(path: Path, pieces, vocabulary) -> int:
    """Pieces of tokens as one shard, written aside, synced and renamed: its number of tokens."""
    aside, tokens = path.with_name(path.name + ".tmp"), 0
    identity = (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.fingerprint)
    try:
        with open(aside, "wb") as file:
            file.write(make_header(0, *identity))
            for piece in pieces:
                file.write(piece.astype("<u2", copy=False).tobytes())
                tokens += len(piece)
            file.seek(0)
            file.write(make_header(tokens, *identity))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return tokens


def write_training(out: Path, task, documents: int, length: int, min_length: int, max_length: int, seed: int) -> int:
    """`documents` samples of `length` tokens: one document each, or several of min_length to max_length."""
    rng = random.Random(f"{task.name} train {seed}")

    def pieces():
        for _ in range(documents):
            for part in document_lengths(length, min_length, max_length, rng) if min_length else [length]:
                yield task.training_document(part, rng)
        yield np.array([task.vocabulary.eos_id], dtype="<u2")  # the last sample's last target

    return write_shard(out / "train_000.bin", pieces(), task.vocabulary)


def write_prompts(out: Path, task, groups) -> None:
    """groups: (file name, rows as (tokens, labels with "answer")), the rows of a group all of one length"""
    files = []
    for name, rows in groups:
        write_shard(out / name, [*(tokens for tokens, _ in rows), np.array([task.vocabulary.eos_id], dtype="<u2")], task.vocabulary)
        files.append({"file": name, "length": len(rows[0][0]), "rows": [labels for _, labels in rows]})
    manifest = {"task": task.name, "vocabulary": task.vocabulary.name, "files": files}
    write_synced(out / "prompts.json.tmp", json.dumps(manifest, indent=1).encode())
    os.replace(out / "prompts.json.tmp", out / "prompts.json")
    sync_folder(out)


def passkey_prompts(task: Passkey, lengths: list[int], depths: int, keys: int, seed: int):
    rng = random.Random(f"passkey prompts {seed}")
    for length in lengths:
        rows = []
        for depth in [i / max(1, depths - 1) for i in range(depths)]:
            for _ in range(keys):
                key = task.new_key(rng)
                labels = {"answer": len(task.answer(key)), "length": length, "depth": round(depth, 6), "key": key}
                rows.append((task.document(length, depth, key, False), labels))
        yield f"length_{length:08d}.bin", rows


def phonebook_prompts(task: Phonebook, counts: list[int], books: int, seed: int):
    rng = random.Random(f"phonebook prompts {seed}")
    for count in counts:
        drawn = []
        for _ in range(books):
            entries = task.new_entries(count, rng)
            asked = task.ask(entries, rng)
            drawn.append((task.parts(entries, asked, False), entries.index(asked[-1]), asked[-1]))
        length = 1 + max(sum(map(len, parts)) for parts, _, _ in drawn)
        rows = []
        for parts, place, entry in drawn:
            labels = {"answer": len(task.answer(entry)), "entries": count, "place": place, "name": entry[0], "number": entry[1]}
            rows.append((task.document(length, parts), labels))
        yield f"entries_{count:05d}.bin", rows


# ------------------------------------------------------------------------------------------------------------ command line


def count_of(text: str) -> int:
    """4096, 4k (4096: lengths are powers of two here), 1m"""
    match = re.fullmatch(r"(\d+)([km]?)", text.strip().lower())
    if not match or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count; write 4096, 4k (4,096) or 1m (1,048,576)")
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2]]


def counts_of(text: str) -> list[int]:
    return [count_of(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m data.retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("task", choices=("passkey", "phonebook"))
    top.add_argument("purpose", choices=("train", "prompts"))
    top.add_argument("--out", required=True, type=Path, help="folder to write to")
    top.add_argument("--vocabulary", default="words", metavar="FILE", help="words, or a tokenizer as data.prepare takes it")
    top.add_argument("--seed", type=int, default=1)
    top.add_argument("--documents", type=count_of, default=1024, help="train: samples to make")
    top.add_argument("--length", type=count_of, default=4096, help="train: tokens in a sample")
    top.add_argument("--min-length", type=count_of, default=0, help="train: pack several documents of at least this length into a sample")
    top.add_argument("--max-length", type=count_of, default=0, help="train: the longest of them; default: --length")
    top.add_argument("--queries", type=count_of, default=3, help="phonebook: entries asked for; all but the last are answered in the prompt")
    top.add_argument("--lengths", type=counts_of, default=counts_of("4k,8k,16k,32k,64k,128k,256k"), help="passkey prompts: tokens, answer included")
    top.add_argument("--depths", type=count_of, default=11, help="passkey prompts: depths from 0 to 1")
    top.add_argument("--keys", type=count_of, default=5, help="passkey prompts: keys at each length and depth")
    top.add_argument("--entries", type=counts_of, default=list(range(20, 481, 20)), help="phonebook prompts: sizes of the book")
    top.add_argument("--books", type=count_of, default=20, help="phonebook prompts: books of each size")
    return top


def run(options: argparse.Namespace) -> str:
    vocabulary = vocabulary_of(options.vocabulary)
    if vocabulary.vocab_size > MAX_VOCAB_SIZE:
        raise PrepareError(f"{options.vocabulary}: vocabulary of {vocabulary.vocab_size}, but shards store uint16 tokens")
    task = Passkey(vocabulary) if options.task == "passkey" else Phonebook(vocabulary, options.queries)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.purpose == "train":
        if options.min_length and not task.shortest <= options.min_length <= options.length:
            shortest = f"{task.shortest} (a {task.name} with nothing else in it)"
            raise PrepareError(f"--min-length {options.min_length}: must be from {shortest} to --length {options.length}")
        max_length = options.max_length or options.length
        if not options.min_length <= max_length <= options.length or (options.max_length and not options.min_length):
            allowed = f"from --min-length {options.min_length}, which goes with it, to --length {options.length}"
            raise PrepareError(f"--max-length {max_length}: must be {allowed}")
        tokens = write_training(options.out, task, options.documents, options.length, options.min_length, max_length, options.seed)
        samples = f"{options.documents} samples of {options.length} tokens"
        return f"{options.out}/train_000.bin: {samples}, {tokens} tokens, vocabulary {vocabulary.vocab_size}"
    groups = passkey_prompts(task, options.lengths, options.depths, options.keys, options.seed) if task.name == "passkey" else \
        phonebook_prompts(task, options.entries, options.books, options.seed)  # fmt: skip
    write_prompts(options.out, task, groups)
    return f"{options.out}/prompts.json: {task.name} prompts, vocabulary {vocabulary.vocab_size}"


def main(arguments=None) -> int:
    try:
        print(run(parser().parse_args(arguments)))
    except (PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
