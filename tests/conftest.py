import os

# waiting threads sleep, as others may use the cores too; torch reads this once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two files are tested at a time

import torch

if not torch.cuda.is_available():
    # before any test imports kernels and with it Triton: the kernel then runs on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_terminal_summary(terminalreporter):
    """Print what test_ladder.py has measured, one line for each of its tests."""
    rungs = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            rungs += [line for name, line in report.user_properties if name == "rung"]
    if rungs:
        terminalreporter.section("the ladder, with measured errors")
    for line in rungs:
        terminalreporter.write_line(line)
