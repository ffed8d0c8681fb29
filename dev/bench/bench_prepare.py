"""Tokenizing throughput and memory of data.prepare: .venv/bin/python dev/bench/bench_prepare.py [--gb 1] [--tokenizer FILE] [--work DIR]

Makes a synthetic corpus (documents of lines drawn from the standard library's text, about 4 KB each, as .jsonl), prepares it
with one process a core, and compares with a plain loop: json.loads, SentencePiece encode, count. Without --tokenizer a model of
Llama 2's form is trained: 32,000 BPE pieces, byte fallback, split digits, dummy prefix. The loop is timed before and after, in
one process and in as many at once as data.prepare has, which meet the same competition for the cores as it does. CPU seconds
are stated too, because they do not feel who else uses the cores.
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
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=32000, byte_fallback=True, split_digits=True, character_coverage=0.9995,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=4192, minloglevel=2)  # fmt: skip
    path.write_bytes(model.getvalue())


def synthetic(path: Path, size: int) -> None:
    lines = [line + "\n" for text in stdlib().texts() for line in text.splitlines() if line.strip()]
    chance, written = random.Random(1), 0
    with open(path, "wb") as file:
        while written < size:
            text = "".join(chance.choices(lines, k=chance.randrange(10, 200)))
            written += file.write(json.dumps({"text": text, "meta": {"set": "synthetic"}}).encode() + b"\n")


def plain_loop(corpus: Path, model: Path, limit: int) -> tuple[float, float]:
    """Tokens per second and per CPU second"""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = read = 0
    start, cpu = time.time(), time.process_time()
    with open(corpus, "rb") as file:
        for line in file:
            tokens += len(processor.encode(json.loads(line)["text"])) + 1
            read += len(line)
            if read >= limit:
                break
    return tokens / (time.time() - start), tokens / (time.process_time() - cpu)


def loops_at_once(corpus: Path, model: Path, limit: int, processes: int) -> float:
    """Tokens per second of all together"""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return sum(rate for rate, _ in pool.starmap(plain_loop, [(corpus, model, limit)] * processes))


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
    shutil.rmtree(options.work / "out", ignore_errors=True)
    load = os.getloadavg()[0]
    loops, together = [plain_loop(corpus, model, options.loop_mb << 20)], [loops_at_once(corpus, model, options.loop_mb << 20, options.processes)]
    result = prepare(corpus, model, options.work / "out", options.processes)
    together.append(loops_at_once(corpus, model, options.loop_mb << 20, options.processes))
    loops.append(plain_loop(corpus, model, options.loop_mb << 20))
    wall, cpu = (sum(loop[i] for loop in loops) / 2 for i in (0, 1))
    print(json.dumps({
        "corpus_bytes": corpus.stat().st_size, "processes": options.processes, "load_before": load, "prepare": result,
        "plain_loop_tokens_per_second": [loop[0] for loop in loops], "plain_loop_tokens_per_cpu_second": [loop[1] for loop in loops],
        "plain_loops_at_once_tokens_per_second": together,
        "speed_in_single_loops": result["tokens_per_second"] / wall, "speed_in_loops_at_once": 2 * result["tokens_per_second"] / sum(together),
        "tokens_per_cpu_second_in_loops": result["tokens_per_cpu_second"] / cpu,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
