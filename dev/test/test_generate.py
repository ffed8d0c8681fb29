"""train_samba generate: what it prints for prompts from everywhere, alone and together, and to what it says no.

Runs build/cpu/train_samba (SAMBA_PROGRAM=PATH: another build) on a model that learnt one sentence.
"""

import io
import json
import os
import re
import subprocess

import numpy as np
import pytest
import sentencepiece
from test_cli import PROGRAM, error_line, run, write_shard

TEXT = "The quick brown fox jumps over the lazy dog, and the dog — naïve — sleeps. "
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1")        # of a model this small, threads only wait for each other
SAMPLED = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--repetition-penalty", "1.1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 50), model_writer=model, vocab_size=340, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = -(-tokenizer.vocab_size() // 16) * 16
    config = {"name": "writer", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16, "intermediate_size": 48,
              "local_window": 9, "block_size": 32, "padded_vocab_size": vocab}  # fmt: skip
    (folder / "model.json").write_text(json.dumps(config))
    write_shard(folder / "train_000.bin", np.array(tokenizer.encode(TEXT * 60)), vocab)
    result = run(PROGRAM, "--model", folder / "model.json", "--data", folder / "train_000.bin", "--out", folder / "run", "--micro-batch", 4,
                 "--steps", 120, "--lr", "1e-2", "--schedule", "constant", "--log-every", 1000, "--tokenizer", folder / "tokenizer.model",
                 env=ONE_THREAD)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run"


def generate(checkpoint, *arguments, **options):
    result = run(PROGRAM, "generate", "--checkpoint", checkpoint, *arguments, env=ONE_THREAD, **options)
    assert result.returncode == 0, result.stderr
    return result


def text_of(checkpoint, *arguments, **options):
    return generate(checkpoint, *arguments, **options).stdout


def prompt_option(text):
    return [f"--prompt={text}"] if text else ["--prompt", ""]


def test_greedy_recites_what_was_learnt(checkpoint):
    result = generate(checkpoint, "--prompt", TEXT + "The quick brown", "--max-tokens", 60, "--temperature", 0)
    assert result.stdout.startswith(TEXT + "The quick brown fox jumps over the lazy dog, and the dog — naïve"), result.stdout
    speed = re.search(r"read (\d+) tokens in [\d.]+ s \(\d+ tok/s\), wrote 60 in [\d.]+ s \(\d+ tok/s, batch 1\)", result.stderr)
    assert speed and int(speed.group(1)) > 10, result.stderr


def test_chunks_of_the_prompt_do_not_matter(checkpoint):
    texts = {text_of(checkpoint, "--prompt", TEXT * 3 + "The", "--temperature", 0, "--max-tokens", 40, "--chunk", chunk) for chunk in (1, 7, 4096)}
    assert len(texts) == 1


def test_the_prompt_may_come_from_a_file_or_standard_input(checkpoint, tmp_path):
    prompt = "over the\nlazy dog — "
    (tmp_path / "prompt.txt").write_text(prompt)
    expected = text_of(checkpoint, "--prompt", prompt, *SAMPLED)
    assert expected.startswith(prompt) and len(expected) > len(prompt) + 20
    assert text_of(checkpoint, "--prompt-file", tmp_path / "prompt.txt", *SAMPLED) == expected
    assert text_of(checkpoint, "--prompt-file", "-", *SAMPLED, input=prompt) == expected


def test_a_batch_prints_what_each_prints_alone(checkpoint, tmp_path):
    prompts = ["The quick", "[dog,fox]", "", "naïve " * 9, "--- 2"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    together = text_of(checkpoint, *(word for prompt in prompts for word in prompt_option(prompt)), *SAMPLED, "--seed", 5)
    alone = [text_of(checkpoint, *prompt_option(prompt), *SAMPLED, "--seed", 5 + i) for i, prompt in enumerate(prompts)]
    assert together == "\n".join(f"--- {i + 1}\n{text}" for i, text in enumerate(alone))
    assert text_of(checkpoint, "--prompt-file", tmp_path / "prompts.txt", "--lines", *SAMPLED, "--seed", 5) == together


def test_the_seed_is_the_text(checkpoint):
    first, again, other = (text_of(checkpoint, "--prompt", "The", "--temperature", 2, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_stop_strings_end_the_text(checkpoint):
    prompt = TEXT + "The quick"
    whole = text_of(checkpoint, "--prompt", prompt, "--temperature", 0, "--max-tokens", 60)
    assert "lazy dog" in whole[len(prompt):]
    for stops in (["azy d"], ["nowhere", "azy d", "naïve"]):
        cut = text_of(checkpoint, "--prompt", prompt, "--temperature", 0, "--max-tokens", 60, *(word for stop in stops for word in ("--stop", stop)))
        assert cut == whole[:whole.index("azy d", len(prompt))] + "\n"
    # Its beginning is held back, and then shown
    assert text_of(checkpoint, "--prompt", prompt, "--temperature", 0, "--max-tokens", 60, "--stop", "dogma") == whole


def test_the_penalty_stops_repetition(checkpoint):
    words = text_of(checkpoint, "--prompt", "The", "--temperature", 0, "--max-tokens", 60, "--repetition-penalty", 100)
    assert words != text_of(checkpoint, "--prompt", "The", "--temperature", 0, "--max-tokens", 60)


def test_every_write_is_whole_characters(checkpoint):
    command = [PROGRAM, "generate", "--checkpoint", checkpoint, "--prompt", "—", "--temperature", "50", "--max-tokens", "150"]
    foreign = 0
    for seed in range(3):                                 # near random tokens: many single bytes of characters
        with subprocess.Popen([*map(str, command), "--seed", str(seed)], stdout=subprocess.PIPE, env=ONE_THREAD) as process:
            while piece := os.read(process.stdout.fileno(), 1 << 16):
                foreign += sum(ord(character) > 127 for character in piece.decode())     # strict: fails on half a character
        assert process.returncode == 0
    assert foreign > 20


def test_a_conversation_keeps_the_state(checkpoint):
    lines = [TEXT + "The quick brown", "jumps"]
    answers = text_of(checkpoint, "--interactive", "--temperature", 0, "--max-tokens", 12, input="\n".join(lines) + "\n")
    first = text_of(checkpoint, "--prompt", lines[0], "--temperature", 0, "--max-tokens", 12)[len(lines[0]):]
    assert answers.startswith(first)
    second = answers[len(first):]
    whole = text_of(checkpoint, "--prompt", lines[0] + first + lines[1], "--temperature", 0, "--max-tokens", 12)
    assert second.strip() and second == whole[len(lines[0] + first + lines[1]):]


@pytest.mark.parametrize("arguments, expected", [
    (["--prompt-file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
    (["--prompt", "x", "--stop", ""], "--stop"),
    (["--prompt", "x", "--max-tokens", "0"], "--max-tokens 0"),
    (["--prompt", "x", "--top-k", "-3"], "--top-k -3"),
    (["--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty"),
    (["--prompt", "x", "--chunk", "0"], "--chunk 0"),
    (["--prompt", "x"] * 17, "17 prompts: up to 16"),
    (["--lines"], "--lines needs --prompt-file"),
    (["--interactive", "--prompt", "x"], "--interactive"),
    (["--prompt-file", "-", "--lines"], "there is no line in it"),
])
def test_bad_options_get_one_clear_line(checkpoint, arguments, expected):
    assert expected in error_line(run(PROGRAM, "generate", "--checkpoint", checkpoint, *arguments))
