"""train_samba score: log-likelihoods against those of train_samba eval, and lm-evaluation-harness with a task of our own."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from test_cli import PROGRAM, ROOT, error_line, run, write_shard

SENTENCES = ["the cat sat on the mat", "the dog ran in the park", "a bird sang in the tree", "the cat ran to the dog", "a dog sat in the park",
             "the bird ran on the mat", "a cat sang to the bird", "the mat sat on the cat"]  # fmt: skip


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A model that has learnt a few sentences, with its tokenizer."""
    folder = tmp_path_factory.mktemp("scorer")
    rng = np.random.default_rng(1)
    lines = [SENTENCES[i] for i in rng.integers(0, len(SENTENCES), 800)]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=60,
                                             hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokens = [t for line in lines for t in [tokenizer.eos_id(), *tokenizer.encode(line)]]
    write_shard(folder / "text.bin", tokens, vocab=tokenizer.vocab_size())
    (folder / "model.json").write_text(json.dumps({"name": "scorer", "blocks": "MS", "n_embd": 32, "n_head": 2, "n_query_groups": 1, "head_size": 16,
        "intermediate_size": 48, "local_window": 9, "block_size": 32, "padded_vocab_size": 64}))  # fmt: skip
    result = run(PROGRAM, "--model", folder / "model.json", "--data", folder / "text.bin", "--out", folder / "run", "--micro-batch", "4",
                 "--steps", "120", "--lr", "1e-2", "--tokenizer", folder / "tokenizer.model")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder, tokenizer


def score(folder, requests, *options):
    text = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in requests)
    result = run(PROGRAM, "score", "--checkpoint", folder / "run", *options, input=text)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_scores_are_what_eval_says(scorer):
    """The rolling log-likelihood of a text is minus the sum of its losses, whatever the chunk and the company in the batch."""
    folder, tokenizer = scorer
    tokens = [tokenizer.eos_id()] + tokenizer.encode(" ".join(SENTENCES))
    write_shard(folder / "one.bin", tokens, vocab=tokenizer.vocab_size())
    out = folder / "one.json"
    evaluate = [PROGRAM, "eval", "--checkpoint", folder / "run", "--data", folder / "one.bin"]
    assert run(*evaluate, "--lengths", str(len(tokens) - 1), "--json", out).returncode == 0
    want = -json.load(open(out))["results"][0]["loss"] * (len(tokens) - 1)
    whole = {"id": "whole", "context_tokens": [], "continuation_tokens": tokens[1:]}
    parts = [{"id": k, "context_tokens": tokens[:k], "continuation_tokens": tokens[k:]} for k in (1, 2, 17, len(tokens) - 1)]
    text = {"context": "", "continuation": " ".join(SENTENCES)}
    for options in ((), ("--micro-batch", "1"), ("--micro-batch", "3", "--seq-len", "5"), ("--seq-len", "1")):
        answers = score(folder, [whole, *parts, text], *options)
        assert [a["id"] for a in answers] == ["whole", 1, 2, 17, len(tokens) - 1, None]
        for answer in (answers[0], answers[1], answers[5]):
            assert answer["logprob"] == pytest.approx(want, rel=1e-4) and answer["tokens"] == len(tokens) - 1 and answer["context_tokens"] == 1
        head = score(folder, [{"context_tokens": tokens[:1], "continuation_tokens": tokens[1:17]}], *options)[0]
        assert head["logprob"] + answers[3]["logprob"] == pytest.approx(want, rel=1e-4)


def test_greedy_and_counts(scorer):
    folder, tokenizer = scorer
    requests = [{"context": "the cat sat on", "continuation": " the"}, {"context": "the cat sat on", "continuation": " bird"},
                {"context": "the cat", "continuation": ""}]  # fmt: skip
    likely, unlikely, empty = score(folder, requests)
    assert likely["greedy"] and not unlikely["greedy"] and likely["logprob"] > -0.7 > unlikely["logprob"]
    assert likely["context_tokens"] == len(tokenizer.encode("the cat sat on"))
    assert likely["context_tokens"] + likely["tokens"] == len(tokenizer.encode("the cat sat on the"))
    assert (empty["logprob"], empty["greedy"], empty["tokens"]) == (0, True, 0)
    trailing = score(folder, [{"context": "the cat sat on ", "continuation": "the"}])[0]   # the space moves to the continuation
    assert trailing["logprob"] == pytest.approx(likely["logprob"], rel=1e-5)


def test_files_and_rounds(scorer, tmp_path):
    folder, _ = scorer
    requests = [{"id": i, "context": SENTENCES[i % 8], "continuation": " the" * (1 + i % 3)} for i in range(11)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in requests))
    result = run(PROGRAM, "score", "--checkpoint", folder / "run", "--requests", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl",
                 "--micro-batch", "4")  # fmt: skip
    assert result.returncode == 0 and result.stdout == "", result.stderr
    answers = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert [a["id"] for a in answers] == list(range(11))
    process = subprocess.Popen([PROGRAM, "score", "--checkpoint", folder / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for r in requests[:2]:
        process.stdin.write(json.dumps(r) + "\n\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["logprob"] == pytest.approx(answers[r["id"]]["logprob"], rel=1e-4)
    assert process.communicate()[0] == "" and process.returncode == 0


@pytest.mark.parametrize("line,expected", [
    ("{not json}\n", "standard input, line 2: not a JSON object"),
    ("[1, 2]\n", "line 2: not a JSON object"),
    ('{"context": "x"}\n', "line 2: needs \"context\" and \"continuation\""),
    ('{"context_tokens": ["a"], "continuation_tokens": [1]}\n', "line 2: needs"),
    ('{"context_tokens": [1], "continuation_tokens": [64]}\n', "line 2: token 64 is outside the model's vocabulary of 64"),
])
def test_bad_requests_get_one_clear_line(scorer, line, expected):
    first = json.dumps({"context": "the", "continuation": " cat"}) + "\n"
    assert expected in error_line(run(PROGRAM, "score", "--checkpoint", scorer[0] / "run", input=first + line))


def test_the_harness_evaluates_a_local_task(scorer, tmp_path):
    """lm-evaluation-harness itself, with a multiple-choice task and a perplexity task in files of ours."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-evaluation-harness: pip install lm-eval")
    folder, tokenizer = scorer
    questions = [{"start": "the cat sat on", "choices": ["the mat", "bird tree the"], "answer": 0},
                 {"start": "the dog ran in", "choices": ["mat a", "the park"], "answer": 1},
                 {"start": "a bird sang in", "choices": ["the tree", "cat cat"], "answer": 0}]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": " ".join(SENTENCES)}) + "\n")
    task = lambda name: f"task: {name}\ndataset_path: json\ntest_split: test\n"  # noqa: E731
    data = lambda name: f"dataset_kwargs: {{data_files: {{test: {tmp_path}/{name}}}}}\n"  # noqa: E731
    (tmp_path / "choice.yaml").write_text(
        task("choice") + data("questions.jsonl") + "output_type: multiple_choice\n"
        "doc_to_text: '{{start}}'\ndoc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n")  # fmt: skip
    (tmp_path / "rolling.yaml").write_text(
        task("rolling") + data("texts.jsonl") + "output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n")  # fmt: skip
    command = [sys.executable, os.path.join(ROOT, "scripts/lm_eval_samba.py"), "--model", "samba",
        "--model_args", f"checkpoint={folder}/run,program={PROGRAM}", "--tasks", "choice,rolling",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **offline})
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.load(open(next((tmp_path / "results").rglob("*.json"))))["results"]
    assert report["choice"]["acc,none"] == 1.0
    logprob = score(folder, [{"context": "", "continuation": " ".join(SENTENCES)}])[0]["logprob"]
    words = len(" ".join(SENTENCES).split())
    assert report["rolling"]["word_perplexity,none"] == pytest.approx(np.exp(-logprob / words), rel=1e-3)
