"""The Triton kernel against the recurrence in float64: o, the final state and all five gradients.

Without a GPU the kernel runs in Triton's interpreter, in float32 and float16 (not bfloat16: it errs there).
Every comparison draws random gradients for both outputs. Errors are norms: |got - wanted| / |wanted|.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import recurrent_scan, triton_scan

ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("o", "final state", "dq", "dk", "dv", "dlog_a", "dstate")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")

FLOAT32 = 2e-5  # sums of up to 130 products in float32, each about 1e-7 off
HANDOVER = 1e-5  # two float32 runs of the same sums, cut differently
STRONG = 1e-4  # float32 holds b = -700 to 3e-5, and e^b is off by as much
IDENTITY = 1e-4  # of the sum of absolute values, which is far larger than the sum
FLOAT16 = {"dlog_a": 3e-3, None: 1e-3}  # operands have 11 bits; dlog_a is a small difference of large sums
BFLOAT16 = {"dlog_a": 2e-2, None: 5e-3}  # operands have 8 bits
BFLOAT16_VECTOR = {"dlog_a": 5e-2, None: 5e-3}
TRAINING = 1e-4  # 20 steps of AdamW from equal weights: float32 noise of 1e-6 has begun to grow
TILE = (16, 16, 4, 1)  # chunk, block, warps, stages
NOTHING = 1e-30  # float32 cannot hold much less: a gradient that small counts as zero


def draw(B, T, G, H, K, V, vector, decay=1.0, seed=0):
    """Inputs q, k, v, log_a, state and the gradients of o and of the final state, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    q, k, v = randn(B, T, G, K), randn(B, T, G, K) / K**0.5, randn(B, T, H, V)
    log_a = -decay * F.softplus(randn(B, T, H, K) - 1 if vector else randn(B, T, H) - 1)
    return [q, k, v, log_a, randn(B, H, K, V)], [randn(B, T, H, V), randn(B, H, K, V)]


def run(fn, inputs, cotangents, dtype=torch.float64):
    """o, the final state and the gradients, by name; None as an input or a cotangent leaves it out."""
    # q, k, v carry the dtype; log_a and the state stay in float32 as in a model under autocast
    dtypes = [dtype] * 3 + [torch.promote_types(dtype, torch.float32)] * 2
    leaves = [
        x if x is None else x.to(t).detach().requires_grad_() for x, t in zip(inputs, dtypes, strict=True)
    ]
    outputs = fn(*leaves)
    assert [y.dtype for y in outputs] == [dtypes[0], dtypes[4]]
    reached = [(y, dy.to(y.dtype)) for y, dy in zip(outputs, cotangents, strict=True) if dy is not None]
    present = [x for x in leaves if x is not None]
    y, dy = zip(*reached, strict=True)
    gradients = iter(torch.autograd.grad(y, present, dy, materialize_grads=True))
    return dict(
        zip(NAMES, [*outputs, *(None if x is None else next(gradients) for x in leaves)], strict=True)
    )


def assert_close(got, wanted, tolerance, skip=()):
    for name in NAMES:
        if wanted[name] is None or name in skip:
            continue
        limit = tolerance.get(name, tolerance[None]) if isinstance(tolerance, dict) else tolerance
        error = ((got[name].double() - wanted[name]).norm() / wanted[name].norm().clamp_min(NOTHING)).item()
        assert error <= limit, f"{name} is off by {error:.1e}, more than {limit:.0e}"


def check(
    *size,
    vector,
    decay=1.0,
    missing=(),
    log_a=None,
    dtype=torch.float32,
    tolerance=FLOAT32,
    skip=(),
    **options,
):
    """triton_scan(**options) in `dtype` against recurrent_scan in float64, on the same rounded q, k, v."""
    inputs, cotangents = draw(*size, vector, decay)
    if log_a is not None:
        inputs[3] = log_a(inputs[3])
    inputs[:3] = [x.to(dtype).double() for x in inputs[:3]]
    inputs[4] = None if "state" in missing else inputs[4]
    cotangents = [
        None if name in missing else dy for name, dy in zip(("do", "dfinal"), cotangents, strict=True)
    ]
    wanted = run(recurrent_scan, inputs, cotangents)
    assert_close(run(partial(triton_scan, **options), inputs, cotangents, dtype), wanted, tolerance, skip)


both_decays = pytest.mark.parametrize("vector", [False, True], ids=["per head", "per channel"])


@pytest.mark.parametrize("vector, chunk", [(False, 16), (False, 64), (True, 16), (True, 32)])
@pytest.mark.parametrize("T", [1, 50, 64, 129])
def test_all_seven_quantities_at_any_length_and_chunk(vector, chunk, T):
    check(1, T, 2, 2, 16, 32, vector=vector, tile=(chunk, 16, 4, 1))


@both_decays
@pytest.mark.parametrize("missing", [("state", "dfinal"), ("dfinal",), ("state",), ("do",)], ids="+".join)
def test_the_initial_state_and_either_gradient_may_be_missing(vector, missing):
    check(2, 40, 1, 1, 16, 16, vector=vector, missing=missing, tile=TILE)


@both_decays
def test_heads_share_q_and_k(vector):
    check(1, 40, 2, 4, 16, 16, vector=vector, tile=TILE)
    check(2, 20, 1, 3, 16, 16, vector=vector, tile=TILE)


@both_decays
@pytest.mark.parametrize("K, V", [(64, 16), (24, 48), (16, 1), (5, 3)])
def test_head_sizes_of_any_shape_are_padded(vector, K, V):
    check(1, 40, 1, 2, K, V, vector=vector)


@both_decays
@pytest.mark.parametrize("V", [256, 144])
def test_wide_values_become_several_heads(vector, V):
    check(1, 36, 1, 2, 16, V, vector=vector, tile=(16, 64, 4, 1))


@pytest.mark.parametrize("decay", [1e-3, 1.0, 30.0, 1000.0])
def test_one_decay_per_head_is_right_at_any_strength(decay):
    check(
        1,
        100,
        2,
        2,
        16,
        16,
        vector=False,
        decay=decay,
        tile=(64, 16, 4, 1),
        skip=("dlog_a",) if decay == 1000 else (),
    )


def uniform(log_a):
    return torch.full_like(log_a, -29.9)


def mixed(log_a):
    return -29.9 * torch.rand(log_a.shape, generator=torch.Generator().manual_seed(1), dtype=log_a.dtype).to(
        DEVICE
    )


@pytest.mark.parametrize("log_a", [uniform, mixed])
def test_one_decay_per_channel_of_30_a_step_is_right(log_a):
    # uniform: dlog_a is about 1e-13 everywhere, and right to 1e-4 of that, as no 1 - 1 happens on the way
    check(1, 40, 2, 2, 16, 16, vector=True, log_a=log_a, tile=TILE, tolerance=STRONG)


def test_one_decay_per_channel_of_100_a_step_stays_finite_and_right():
    inputs, cotangents = draw(1, 40, 2, 2, 16, 16, True, decay=100)
    got = run(triton_scan, inputs, cotangents, torch.float32)
    assert all(x.isfinite().all() for x in got.values())
    assert_close(got, run(recurrent_scan, inputs, cotangents), STRONG)


@both_decays
def test_handing_over_the_state_equals_not_cutting(vector):
    (q, k, v, log_a, state), _ = draw(1, 96, 2, 2, 16, 16, vector)
    q, k, v, log_a, state = (x.float() for x in (q, k, v, log_a, state))
    whole, final = triton_scan(q, k, v, log_a, state)
    o, parts = state, []
    for cut in (slice(0, 41), slice(41, None)):
        o, state = triton_scan(q[:, cut], k[:, cut], v[:, cut], log_a[:, cut], state)
        parts.append(o)
    for got, wanted in ((torch.cat(parts, 1), whole), (state, final)):
        assert (got - wanted).norm() <= HANDOVER * wanted.norm()


@both_decays
def test_what_q_reads_was_written_by_k_or_the_state(vector):
    """sum_t (q . dq - k . dk) + <S_T, R_T> = <S_0, dS_0>, for every head (and key channel)."""
    inputs, cotangents = draw(1, 50, 2, 2, 16, 16, vector)
    got = run(triton_scan, inputs, cotangents, torch.float32)
    q, k, _, _, state = inputs
    read, written = (q * got["dq"]).sum(1), (k * got["dk"]).sum(1)
    left = (read - written + (got["final state"] * cotangents[1]).sum(-1)).sum(-1)
    right = (state * got["dstate"]).sum((-1, -2))
    assert (left - right).abs().max() <= IDENTITY * (q * got["dq"]).abs().sum((1, 3)).max()


@both_decays
def test_float16(vector):
    check(1, 50, 1, 2, 16, 16, vector=vector, dtype=torch.float16, tolerance=FLOAT16)


def test_no_state_equals_a_state_of_zeros_bit_for_bit():
    (q, k, v, log_a, state), _ = draw(1, 20, 1, 2, 16, 16, False)
    q, k, v, log_a, state = (x.float() for x in (q, k, v, log_a, state))
    for a, b in zip(triton_scan(q, k, v, log_a), triton_scan(q, k, v, log_a, 0 * state), strict=True):
        assert torch.equal(a, b)


def test_strided_inputs_are_read_right():
    inputs, cotangents = draw(1, 40, 2, 2, 16, 16, True)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    strided[4] = inputs[4].transpose(2, 3).contiguous().transpose(2, 3)
    got, wanted = (run(triton_scan, x, cotangents, torch.float32) for x in (strided, inputs))
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


# ---- where it is called from ----


def test_autocast_leaves_decay_and_state_in_float32():
    inputs, cotangents = draw(1, 20, 1, 2, 16, 16, False)
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = run(triton_scan, inputs, cotangents, torch.float16)
    wanted = run(triton_scan, inputs, cotangents, torch.float16)
    assert all(torch.equal(got[name], wanted[name]) for name in NAMES)


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
x = torch.ones(1, 3, 1, 4)
kernels.scan(x, x, x, -x)
try:
    kernels.triton_scan(x, x, x, -x)
except AssertionError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "triton_scan needs the triton package: use chunked_scan" in done.stdout


def test_what_the_kernel_cannot_take_is_refused():
    inputs, _ = draw(1, 5, 1, 1, 16, 16, False)
    with pytest.raises(AssertionError, match=r"q is torch.float64, K 16: use chunked_scan"):
        triton_scan(*inputs)
    inputs, _ = draw(1, 5, 1, 1, 257, 16, False)
    with pytest.raises(AssertionError, match=r"K 257: use chunked_scan"):
        triton_scan(*[x.float() for x in inputs])


@pytest.mark.skipif(GPU, reason="only the interpreter gets it wrong")
def test_the_interpreter_refuses_bfloat16():
    inputs, _ = draw(1, 5, 1, 1, 16, 16, False)
    with pytest.raises(AssertionError, match="Triton's interpreter multiplies bfloat16 wrongly"):
        triton_scan(*[x.bfloat16() for x in inputs])


def test_a_model_trained_with_the_kernel_follows_the_chunked_one():
    from lengthgen import LanguageModel, ModelConfig

    losses = {}
    for backend in ("chunked", "triton"):
        torch.manual_seed(0)
        size = dict(vocab_size=17, d_model=16, n_layer=1, d_state=16, headdim=16)
        model = LanguageModel(ModelConfig(layer="mamba2", backend=backend, **size)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state, losses[backend] = None, []
        for _ in range(20):
            tokens = ((torch.randint(17, (2, 1)) + torch.arange(21)) % 17).to(DEVICE)  # counting
            logits, state = model(tokens[:, :-1], state)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = [type(layer)(*(x.detach() for x in layer)) for layer in state]  # state passing
            losses[backend].append(loss.item())
    chunked, triton = torch.tensor(losses["chunked"]), torch.tensor(losses["triton"])
    assert (chunked - triton).abs().max() <= TRAINING
    assert chunked[-1] < chunked[0] - 1000 * TRAINING  # it did learn


# ---- compiled for GPUs, without one ----

# name: (B, T, G, H, K, V), one decay per channel?
SHAPES = {
    "tiny Mamba-2": ((1, 64, 1, 12, 64, 16), False),
    "Mamba-2-370m": ((1, 64, 1, 32, 128, 64), False),
    "Mamba-2-1.3b": ((1, 64, 1, 64, 128, 64), False),
    "GLA-340M": ((1, 64, 4, 4, 128, 256), True),
    "GLA-1.3B": ((1, 64, 4, 4, 256, 512), True),
}
CALLS = ("forward", "dq", "dk", "dv")
GPUS = ("80", "86", "90", "100", "120")
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on sm_86 and sm_120
SPILLED = {  # bytes of registers that a thread spills: a handful, mostly outside the loop. Of all calls that
    # this file can compile, GLA-1.3B's in bfloat16 spill more on sm_90 (120) and sm_100 (488), see WANTED
    "bfloat16": 96,
    "float32": 640,  # with K = 256; no tile of 16 x 16 has room for such a state
}


def compile_ahead(wanted):
    """Compile what triton_scan launches; print spilled bytes and shared memory for each of `wanted`.

    wanted: (shape, dtype, call, compute capability without its dot), names all
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels.scan_kernel
    pointers = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    sources = []

    class Launches:  # stands in for the kernel and keeps what it is launched with, specialized as Triton does
        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, num_warps, num_stages, **others):
            given = dict(zip(kernel.arg_names, args, strict=False)) | others
            signature, constants, attributes = {}, {}, {}
            for i, parameter in enumerate(kernel.params):
                name, x = parameter.name, given.get(parameter.name)
                if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
                    signature[name], constants[name] = "constexpr", x
                else:
                    signature[name] = pointers[x.dtype] if isinstance(x, torch.Tensor) else "i32"
                    if isinstance(x, torch.Tensor) or x % 16 == 0:
                        attributes[(i,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel, signature, constants, attributes)
            sources.append((source, dict(num_warps=num_warps, num_stages=num_stages)))

    kernels.scan_kernel = Launches()
    for shape, dtype in dict.fromkeys((shape, dtype) for shape, dtype, _, _ in wanted):
        (B, T, G, H, K, V), vector = SHAPES[shape]
        sources.clear()
        sizes = ((G, K), (G, K), (H, V))
        q, k, v = (torch.zeros(B, T, *size, dtype=getattr(torch, dtype)) for size in sizes)
        log_a, state = torch.zeros(B, T, H, *[K] * vector), torch.zeros(B, H, K, V)
        leaves = [x.requires_grad_() for x in (q, k, v, log_a, state)]
        outputs = triton_scan(*leaves)
        torch.autograd.grad(outputs, leaves, [torch.zeros_like(y) for y in outputs])
        for call, (source, options) in zip(CALLS, sources, strict=True):
            for gpu in GPUS:
                if (shape, dtype, call, gpu) not in wanted:
                    continue
                compiled = triton.compile(source, target=GPUTarget("cuda", int(gpu), 32), options=options)
                with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                    Path(cubin.name).write_bytes(compiled.asm["cubin"])
                    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
                    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                spilled = re.search(r"STACK:(\d+)", usage)[1]
                print(shape, dtype, call, gpu, spilled, compiled.metadata.shared, sep=",", flush=True)


# what the test below compiles; all calls of all shapes for all GPUs take ten minutes
WANTED = [(shape, "bfloat16", "forward", "86") for shape in SHAPES]
WANTED += [("Mamba-2-370m", "bfloat16", "forward", gpu) for gpu in ("80", "100", "120")]
WANTED += [("Mamba-2-370m", "bfloat16", call, "90") for call in CALLS]
WANTED += [("GLA-340M", "bfloat16", "dk", "90"), ("GLA-1.3B", "bfloat16", "forward", "120")]
WANTED += [("GLA-1.3B", "float32", "forward", "86")]


def test_all_calls_compile_for_gpus_fit_their_memory_and_hardly_spill(tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert {tuple(row[:4]) for row in rows} == set(WANTED)
    for shape, dtype, call, gpu, spilled, shared in rows:
        assert int(spilled) <= SPILLED[dtype], f"{shape} {dtype} {call} on sm_{gpu} spills {spilled} bytes"
        assert int(shared) <= SHARED_MEMORY, f"{shape} {dtype} {call} on sm_{gpu} wants {shared} bytes"


# ---- bench_kernels.py ----


def test_the_bench_begins_with_the_versions(monkeypatch, capsys):
    import bench_kernels  # not above, because it turns the interpreter on, which compiles nothing

    monkeypatch.setattr(bench_kernels, "error_table", lambda *args: None)
    monkeypatch.setattr(bench_kernels, "GPU", False)
    bench_kernels.main()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"torch {torch.__version__}, triton ")


def test_the_sweep_of_tiles_prints_the_worst_error_of_each(monkeypatch, capsys):
    """Times are left out: they need a GPU. A scan that forgets its initial state is seen."""
    import bench_kernels

    monkeypatch.setattr(bench_kernels, "microseconds", lambda function: 7)
    tiles = list(product((16, 32), (16, 32), (4,), (1,)))
    size = (1, 40, 1, 2, 16, 32)
    swept = [("per head", size, size, False), ("per channel", size, size, True)]

    def errors():
        bench_kernels.sweep(swept, tiles, torch.float32)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  (")]
        assert [line.split(")")[0] for line in lines] == [
            str(tile).join(["  ", ""])[:-1] for tile in tiles
        ] * 2
        return [float(line.split()[-1]) for line in lines]

    assert all(0 < error < FLOAT32 for error in errors())
    forgetful = lambda q, k, v, log_a, state, tile: triton_scan(q, k, v, log_a, 0.5 * state, tile)  # noqa: E731
    monkeypatch.setattr(bench_kernels, "triton_scan", forgetful)
    assert all(error > 0.1 for error in errors())


# ---- on a GPU ----


@needs_gpu
@pytest.mark.parametrize(
    "size, vector",
    [((1, 2048, 1, 4, 128, 64), False), ((1, 2048, 2, 2, 128, 256), True), ((1, 300, 1, 64, 16, 1), True)],
)
@pytest.mark.parametrize("tile", [None, (32, 32, 4, 2), (16, 16, 4, 2), (32, 16, 8, 1)])
def test_bfloat16_at_real_sizes_with_any_tile(size, vector, tile):
    tolerance = BFLOAT16_VECTOR if vector else BFLOAT16
    check(*size, vector=vector, dtype=torch.bfloat16, tolerance=tolerance, tile=tile)


@needs_gpu
@both_decays
def test_the_same_call_gives_the_same_bits(vector):
    inputs, cotangents = draw(8, 2048, 1, 32, 128, 64, vector)
    first, second = (run(triton_scan, inputs, cotangents, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


if __name__ == "__main__":  # every call, a table of some minutes; with "short" what the test above checks
    every = list(product(SHAPES, SPILLED, CALLS, GPUS))
    compile_ahead(WANTED if sys.argv[1:] == ["short"] else every)
