"""Tokenizing throughput and memory of data.prepare: .venv/bin/python dev/bench/bench_prepare.py [--gb 1] [--tokenizer FILE] [--work DIR]

Makes a synthetic corpus (documents of lines drawn from the standard library's text, about 4 KB each, as .jsonl), prepares it
with one process a core, and compares with a plain loop: json.loads, SentencePiece encode, count. Without --tokenizer a model of
Llama 2's form is trained: 32,000 BPE pieces, byte fallback, split digits, dummy prefix. On a machine that others use too, wall
clock alone says little. So the corpus is prepared twice: once alone, and once beside as many plain loops as it has processes,
on the same cores at the same time, which meet the same competition; and tokens per CPU second are stated.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import sentencepiece

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.corpus import stdlib  # noqa: E402


def llama_form(path: Path) -> None:
    model = io.BytesIO()
    lines = (line for text in stdlib(with_tests=True).texts() for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=32000, byte_fallback=True, split_digits=True,
        character_coverage=0.9995, normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        max_sentence_length=4192, minloglevel=2)  # fmt: skip
    path.write_bytes(model.getvalue())


def synthetic(path: Path, size: int) -> None:
    lines = [line + "\n" for text in stdlib().texts() for line in text.splitlines() if line.strip()]
    chance, written = random.Random(1), 0
    with open(path, "wb") as file:
        while written < size:
            text = "".join(chance.choices(lines, k=chance.randrange(10, 200)))
            written += file.write(json.dumps({"text": text, "meta": {"set": "synthetic"}}).encode() + b"\n")


def plain_loop(corpus: Path, model: Path, stop=None, limit: int = 1 << 62) -> tuple[float, float]:
    """Tokens per second and per CPU second, over `limit` bytes or until told to stop"""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = read = 0
    start, cpu = time.time(), time.process_time()
    while read < limit and not (stop and stop.is_set()):
        with open(corpus, "rb") as file:
            for number, line in enumerate(file):
                tokens += len(processor.encode(json.loads(line)["text"])) + 1
                read += len(line)
                if read >= limit or (stop and number % 64 == 0 and stop.is_set()):
                    break
    return tokens / (time.time() - start), tokens / (time.process_time() - cpu)


def beside_loops(corpus: Path, model: Path, out: Path, processes: int) -> tuple[dict, list]:
    with multiprocessing.get_context("spawn").Manager() as manager, multiprocessing.get_context("spawn").Pool(processes) as pool:
        stop = manager.Event()
        loops = pool.starmap_async(plain_loop, [(corpus, model, stop)] * processes)
        result = prepare(corpus, model, out, processes)
        stop.set()
        return result, loops.get()


def watch(mark: str, stop: threading.Event) -> dict[int, tuple[int, float]]:
    """Of each process whose environment holds the mark: largest resident size in bytes, and CPU seconds when last seen"""
    seen, tick = {}, os.sysconf("SC_CLK_TCK")
    while not stop.wait(0.1):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    size = next(int(line.split()[1]) << 10 for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
                    times = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                    seen[int(folder.name)] = size, (int(times[11]) + int(times[12])) / tick
            except (OSError, StopIteration):
                pass
    return seen


def prepare(corpus: Path, model: Path, out: Path, processes: int) -> dict:
    mark, stop, result = f"SAMBA_BENCH={out}", threading.Event(), {}
    watcher = threading.Thread(target=lambda: result.update(watch(mark, stop)))
    watcher.start()
    start = time.time()
    command = [sys.executable, "-m", "data.prepare", "--text", corpus, "--tokenizer", model, "--processes", processes, "--out", out]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, env=os.environ | {"SAMBA_BENCH": str(out)})
    seconds = time.time() - start
    stop.set()
    watcher.join()
    meta = json.loads((out / "meta.json").read_text())
    tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
    cpu = sum(seconds for _, seconds in result.values())
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "cpu_seconds": cpu, "tokens_per_cpu_second": tokens / cpu,
            "peak_bytes_of_each_process": sorted((size for size, _ in result.values()), reverse=True)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_prepare"))
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loop-mb", type=int, default=64)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    corpus, model = options.work / f"{options.gb:g}gb.jsonl", options.tokenizer or options.work / "llama_form.model"
    if not model.exists():
        llama_form(model)
    if not corpus.exists():
        synthetic(corpus, int(options.gb * 1e9))
    for name in ("alone", "beside"):
        shutil.rmtree(options.work / name, ignore_errors=True)
    load = os.getloadavg()[0]
    single = plain_loop(corpus, model, None, options.loop_mb << 20)
    alone = prepare(corpus, model, options.work / "alone", options.processes)
    beside, loops = beside_loops(corpus, model, options.work / "beside", options.processes)
    print(json.dumps({
        "corpus_bytes": corpus.stat().st_size, "processes": options.processes, "load_before": load,
        "one_plain_loop": {"tokens_per_second": single[0], "tokens_per_cpu_second": single[1]},
        "prepare_alone": alone, "speed_in_plain_loops": alone["tokens_per_second"] / single[0],
        "prepare_beside_loops": beside,
        "loops_beside": {"tokens_per_second": [loop[0] for loop in loops], "tokens_per_cpu_second": [loop[1] for loop in loops]},
        "speed_of_a_process_in_loops_beside": beside["tokens_per_second"] / sum(loop[0] for loop in loops),
        "tokens_per_cpu_second_in_loops_beside": beside["tokens_per_cpu_second"] / (sum(loop[1] for loop in loops) / len(loops)),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
