import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py, and as early: torch reads it once

import torch

if not torch.cuda.is_available():
    # before any test imports kernels and with it Triton: the kernel then runs on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")
