import os

import torch

if not torch.cuda.is_available():
    # read when Triton is imported, so before any test imports kernels: the kernel then runs on the CPU, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")
