import os

# waiting threads sleep, as others may use the cores too; torch reads this once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    # before any test imports kernels and with it Triton: the kernel then runs on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")
