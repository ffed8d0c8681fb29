#!/usr/bin/env python3
"""lm-evaluation-harness with a checkpoint of train_samba: the harness's own command line, with one model more, `samba`.

    pip install lm-eval                      (no PyTorch needed)
    scripts/lm_eval_samba.py --model samba --model_args checkpoint=out/421m --tasks lambada_openai,piqa

Arguments of the model: checkpoint (required), program (./train_samba), batch_size (16), gpu (0), tokenizer. Log-likelihood tasks are
answered by `train_samba score`; contexts may be of any length. Tasks that generate text are refused.
"""

import json
import os
import subprocess
import sys
import threading

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    sys.exit(f"lm_eval_samba: Python module '{error.name}' is missing; run: pip install lm-eval")

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train_samba")


@register_model("samba")
class Samba(LM):
    """One `train_samba score` process for the whole evaluation: a request a line, a blank line ends a round."""

    def __init__(self, checkpoint, program=PROGRAM, batch_size=16, gpu=0, tokenizer=None, **_):
        super().__init__()
        command = [str(program), "score", "--checkpoint", str(checkpoint), "--micro-batch", str(batch_size or 16), "--gpu", str(gpu)]
        command = command + (["--tokenizer", str(tokenizer)] if tokenizer else [])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def score(self, pairs):
        """(log-likelihood, greedy) of each (context, continuation)"""
        # From a thread, because the process answers while it still reads: two full pipes would wait for each other
        writer = threading.Thread(target=self.write, args=(pairs,))
        writer.start()
        answers = []
        for _ in pairs:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"train_samba score ended with status {self.process.wait()}; its last line above says why")
            answer = json.loads(line)
            answers.append((answer["logprob"], answer["greedy"]))
        writer.join()
        return answers

    def write(self, pairs):
        try:
            for context, continuation in pairs:
                self.process.stdin.write(json.dumps({"context": context, "continuation": continuation}) + "\n")
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the reader says so

    def loglikelihood(self, requests, disable_tqdm=False):
        return self.score([request.args for request in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Of whole documents, each read in one pass from its beginning."""
        return [logprob for logprob, _ in self.score([("", request.args[0]) for request in requests])]

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError("the samba model answers log-likelihood tasks only; choose tasks that do not generate text")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
