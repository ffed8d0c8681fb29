"""On a GPU as on a CPU: of one checkpoint, score, retrieve and generate answer the same. The float build, whose numbers are the CPU's to rounding.

Runs build/cpu/train_samba (SAMBA_PROGRAM=PATH: another) and build/gpu-fp32/train_samba (SAMBA_GPU_PROGRAM=PATH: another).
"""

import json
import os

import pytest

import test_generate
import test_retrieval
import test_score
from test_cli import PROGRAM
from test_generate import checkpoint  # noqa: F401 (a fixture)
from test_parallel import GPU_PROGRAM, GPUS
from test_retrieval import world  # noqa: F401
from test_score import SENTENCES, scorer  # noqa: F401

pytestmark = pytest.mark.skipif(GPUS < 1, reason="needs a GPU and build/gpu-fp32/train_samba")
PROGRAMS = (PROGRAM, GPU_PROGRAM)


def test_scores(scorer, monkeypatch):  # noqa: F811
    folder, tokenizer = scorer
    tokens = [tokenizer.eos_id()] + tokenizer.encode(" ".join(SENTENCES))
    requests = [{"id": k, "context_tokens": tokens[:k], "continuation_tokens": tokens[k:]} for k in (1, 2, 17, len(tokens) - 1)]
    requests += [{"id": i, "context": SENTENCES[i], "continuation": " the" * (1 + i % 3)} for i in range(8)]
    answers = []
    for program in PROGRAMS:
        monkeypatch.setattr(test_score, "PROGRAM", program)
        answers.append(test_score.score(folder, requests, "--micro-batch", "3", "--seq-len", "5"))
    for cpu, gpu in zip(*answers, strict=True):
        assert gpu["logprob"] == pytest.approx(cpu["logprob"], rel=1e-4)
        assert {**gpu, "logprob": 0} == {**cpu, "logprob": 0}


def test_retrieval_answers(world, monkeypatch):  # noqa: F811
    answers = []
    for program in PROGRAMS:
        monkeypatch.setattr(test_retrieval, "PROGRAM", program)
        for options in (("--seq-len", 7, "--micro-batch", 6), ("--micro-batch", 4)):
            answers.append(test_retrieval.ask(world, *options)[0]["files"])
    rows = [[row["answered"] for file in files for row in file["rows"]] for files in answers]
    assert len(rows[0]) == 12 and all(other == rows[0] for other in rows)


@pytest.mark.parametrize("options", [["--temperature", 0], ["--seed", 7, *test_generate.SAMPLED]], ids=["greedy", "drawn"])
def test_generated_text(checkpoint, monkeypatch, options):  # noqa: F811
    several = [f"--prompt={prompt}" for prompt in ("The quick", "The quick brown fox jumps over", "lazy")]
    texts = []
    for program in PROGRAMS:
        monkeypatch.setattr(test_generate, "PROGRAM", program)
        texts.append([test_generate.text_of(checkpoint, "--prompt", "The quick brown", "--max-tokens", 40, *options),
                      test_generate.text_of(checkpoint, *several, "--max-tokens", 40, *options)])  # fmt: skip
    assert len(texts[0][1]) > 100 and texts[0] == texts[1]
