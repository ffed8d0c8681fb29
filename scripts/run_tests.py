"""Builds and runs every test that this machine can run, and says what was skipped and why.

Variants: the CPU build always; with nvcc also the GPU builds in bf16 and float, which without a GPU are compiled and whose
GPU tests skip themselves by name; then pytest for the Python side and the command line. The last line is
"N passed, N failed, N skipped"; the exit status is 1 if anything failed or did not build.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import defaultdict

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Totals:
    def __init__(self):
        self.passed = self.failed = 0
        self.skipped = []   # (suite, test, reason)
        self.failures = []  # (suite, test)

    def fail(self, suite, test):
        self.failed += 1
        self.failures.append((suite, test))


def has_gpu():
    return bool(shutil.which("nvidia-smi")) and b"GPU " in subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout


def variants():
    """(name, make variables) of the builds to test"""
    builds = [("cpu", ["CPU=1"])]
    if shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc"):
        # Without a GPU this only proves that they compile: bf16 for every architecture, float for one
        no_gpu = subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0 if shutil.which("nvidia-smi") else True
        builds += [("gpu-bf16", ["PRECISION=BF16"]), ("gpu-fp32", ["PRECISION=FP32", *(["ARCH=80"] if no_gpu else [])])]
    return builds


def build(name, arguments, targets, totals):
    print(f"== {name}: build", flush=True)
    started = time.time()
    command = ["make", "--no-print-directory", f"-j{os.cpu_count() or 1}", *arguments, *[f"build/{name}/{t}" for t in targets]]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        totals.fail(name, "build")
        return False
    print(f"   {time.time() - started:.0f} s", flush=True)
    return True


def run_googletest(name, totals):
    """Runs build/NAME/test_samba. A crash counts as one failure, named after the test that was running."""
    report = os.path.join(ROOT, "build", name, "tests.json")
    if os.path.exists(report):
        os.remove(report)
    print(f"== {name}: tests", flush=True)
    code, running, reasons = watch_googletest([os.path.join(ROOT, "build", name, "test_samba"), f"--gtest_output=json:{report}"])
    if not os.path.exists(report):
        totals.fail(name, f"{running}: the test program ended with status {code} and no report")
        return
    with open(report, encoding="utf-8") as file:
        suites = json.load(file)["testsuites"]
    for suite in suites:
        for test in suite["testsuite"]:
            full = f"{suite['name']}.{test['name']}"
            if test.get("failures"):
                totals.fail(name, full)
            elif test.get("result") == "SKIPPED":
                totals.skipped.append((name, full, reasons.get(full, "no reason given")))
            else:
                totals.passed += 1


def watch_googletest(command):
    """Runs a test program and shows what is not routine. (status, last test begun, {skipped test: its message}): older
    GoogleTests write a skip's message to the screen alone, on the line after "FILE:LINE: Skipped"."""
    running, reasons, reason_next = "before the first test", {}, False
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace")
    for line in process.stdout:
        text = line.rstrip("\n")
        if text.startswith("[ RUN      ] "):
            running = text[13:]
        elif text.endswith(": Skipped"):
            reason_next = True
            continue
        elif reason_next:
            reasons[running] = text
        elif text and not text.startswith(("[       OK", "[  SKIPPED", "[---", "Note: ")):
            print(text, flush=True)
        reason_next = False
    return process.wait(), running, reasons


def run_pytest(totals):
    print("== python: tests", flush=True)
    report = os.path.join(ROOT, "build", "pytest.xml")
    os.makedirs(os.path.dirname(report), exist_ok=True)
    if os.path.exists(report):
        os.remove(report)
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", "dev/test", f"--junitxml={report}"], cwd=ROOT).returncode
    if not os.path.exists(report):
        totals.fail("python", f"pytest ended with status {code} and no report")
        return
    for case in ET.parse(report).getroot().iter("testcase"):
        full = f"{case.get('classname')}.{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            totals.fail("python", full)
        elif skipped is not None:
            totals.skipped.append(("python", full, skipped.get("message", "")))
        else:
            totals.passed += 1
    if code not in (0, 1):
        totals.fail("python", f"pytest ended with status {code}")


def print_skipped(skipped):
    groups = defaultdict(list)
    for suite, test, reason in skipped:
        groups[(suite, reason)].append(test)
    for (suite, reason), tests in sorted(groups.items()):
        print(f"skipped in {suite} ({reason}):")
        for test in tests:
            print(f"   {re.sub('^Model/', '', test)}")


def main():
    totals = Totals()
    for name, arguments in variants():
        targets = ["test_samba", "train_samba" if name == "cpu" or has_gpu() else "checked/train_samba.ptx"]   # the latter: that it compiles
        if name != "cpu":
            targets.append("benchmarks-checked")
        if name == "gpu-bf16":
            targets.append("ladder-programs")   # that they compile; make ladder runs them
        if build(name, arguments, targets, totals):
            run_googletest(name, totals)
    run_pytest(totals)
    print_skipped(totals.skipped)
    for suite, test in totals.failures:
        print(f"FAILED in {suite}: {test}")
    print(f"{totals.passed} passed, {totals.failed} failed, {len(totals.skipped)} skipped", flush=True)
    return 1 if totals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
