"""How exact the scans of kernels.py are, and on a GPU how fast, beside their rivals and the GPU's own limits.

    python tests/bench_kernels.py

Without a GPU it prints the first error table only, with the kernel in Triton's interpreter. With a GPU it
also prints the errors in bfloat16 at real shapes, a check of 64-bit offsets, the table of times, and a sweep
of tiles with the time and the worst error of each. A rival that is not installed (flash-linear-attention,
mamba_ssm) gets a line that says so. Sizes are (B, T, G, H, K, V) as in kernels.py.
"""

import itertools
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: runs the kernel on a CPU, slowly
sys.path.insert(0, str(Path(__file__).parents[1]))

from kernels import chunked_scan, recurrent_scan, triton, triton_scan  # noqa: E402

OUTPUTS = ("o", "final", "dq", "dk", "dv", "dlog_a", "dstate")
TERA = 1e6  # bytes or operations per microsecond in 1e12 per second


def draw(size, per_channel, dtype):
    """Random q, k, v, log_a, state that want gradients, and random gradients of o and the final state."""
    B, T, G, H, K, V = size
    torch.manual_seed(0)
    q = torch.randn(B, T, G, K, device=DEVICE, dtype=dtype)
    k = torch.randn(B, T, G, K, device=DEVICE, dtype=dtype) / K**0.5
    v = torch.randn(B, T, H, V, device=DEVICE, dtype=dtype)
    decays = (B, T, H, K) if per_channel else (B, T, H)
    log_a = -F.softplus(torch.randn(decays, device=DEVICE) - 1)
    state = torch.randn(B, H, K, V, device=DEVICE)
    inputs = [x.requires_grad_() for x in (q, k, v, log_a, state)]
    return inputs, [torch.randn_like(v), torch.randn_like(state)]


def outputs_and_gradients(function, inputs, cotangents):
    """All seven of OUTPUTS, in one tuple."""
    outputs = function(*inputs)
    return *outputs, *torch.autograd.grad(outputs, inputs, cotangents)


def print_errors(label, got, wanted):
    """One line: the norm of each error, relative to the norm of what is wanted."""
    line = f"{label:<44}"
    for x, exact in zip(got, wanted, strict=True):
        error = (x.double() - exact).norm() / exact.norm()
        line += f"{error.item():9.0e}"
    print(line, flush=True)


# ---- errors ----


def error_table(title, sizes, dtypes, functions):
    """Errors of the functions against the recurrence in float64, from the same rounded inputs."""
    print(f"\n{title}: error relative to the recurrence in float64")
    print(f"{'':<44}" + "".join(f"{name:>9}" for name in OUTPUTS))
    for model, size, per_channel in sizes:
        for dtype in dtypes:
            inputs, cotangents = draw(size, per_channel, dtype)
            exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
            exact_cotangents = [x.double() for x in cotangents]
            wanted = outputs_and_gradients(recurrent_scan, exact_inputs, exact_cotangents)
            for name, function in functions.items():
                got = outputs_and_gradients(function, inputs, cotangents)
                print_errors(f"{model:<22}{str(dtype)[6:]:<10}{name}", got, wanted)


def check_64_bit_offsets(size=(2, 131072, 132, 132, 64, 64)):
    """The last head of the last row must come out of the whole as it does alone; v has 2.2e9 > 2^31 elements.

    One group per head, so q, k and every gradient are as large as v: about 45 GB in bfloat16.
    """
    inputs, cotangents = draw(size, False, torch.bfloat16)
    scan = partial(triton_scan, tile=(64, 32, 4, 2))  # alone it would get smaller blocks
    whole = outputs_and_gradients(scan, inputs, cotangents)
    q, k, v, log_a, state = inputs
    print(
        f"\n64-bit offsets: v {tuple(v.shape)} has {v.numel():,} elements; its last head beside itself alone"
    )
    last = [x[-1:, :, -1:] for x in (q, k, v, log_a)] + [state[-1:, -1:]]
    last = [x.detach().clone().requires_grad_() for x in last]
    do, dfinal = cotangents
    alone = outputs_and_gradients(scan, last, [do[-1:, :, -1:].contiguous(), dfinal[-1:, -1:].contiguous()])
    pieces = []
    for name, x in zip(OUTPUTS, whole, strict=True):
        pieces.append(x[-1:, -1:] if name in ("final", "dstate") else x[-1:, :, -1:])
    print_errors("last head of the last row", pieces, [x.double() for x in alone])


# ---- times ----


def simple_gla(name, q, k, v, log_a, state):
    """flash-linear-attention's scan of that name with one decay per head; it has no groups."""
    import fla.ops.simple_gla

    scan = getattr(fla.ops.simple_gla, name)
    q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
    return scan(q, k, v, log_a, scale=1.0, initial_state=state, output_final_state=True)


def chunk_gla(q, k, v, log_a, state):
    """flash-linear-attention's scan with one decay per channel."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, log_a, scale=1.0, initial_state=state, output_final_state=True)


def mamba_ssm(q, k, v, log_a, state):
    """Mamba-2's own. log_a = dt A with A = -1; it also scales v by dt: not our result, but the same work."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    A = -log_a.new_ones(log_a.shape[2])
    options = dict(chunk_size=256, initial_states=state.transpose(2, 3), return_final_states=True)
    o, final = mamba_chunk_scan_combined(v, -log_a, A, k, q, **options)
    return o, final.transpose(2, 3)


def microseconds(function):
    """On the GPU alone: a replayed CUDA graph waits for no Python."""
    return triton.testing.do_bench_cudagraph(function) * 1e3


def peak_gigabytes(function):
    """What a call allocates at most, beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def time_table():
    """Times and peak memory; a floor is what this GPU needs to move the bytes or to do the matmuls."""
    square = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16)
    bandwidth = 2 * square.nbytes / microseconds(square.clone)  # bytes per microsecond
    rate = 2 * 16384**3 / microseconds(partial(torch.mm, square, square))  # operations per microsecond
    print(f"\n{torch.cuda.get_device_name()}: {bandwidth / TERA:.2f} TB/s copied, ", end="")
    print(f"{rate / TERA:.0f} TFLOP/s")

    per_head = {"triton_scan": triton_scan, "mamba_ssm": mamba_ssm}
    for name in ("chunk_simple_gla", "fused_chunk_simple_gla"):
        per_head[name] = partial(simple_gla, name)
    per_channel = {"triton_scan": triton_scan, "gla": chunk_gla}
    for model, size, functions in (
        ("Mamba-2-370m", (8, 2048, 1, 32, 128, 64), per_head),
        ("Mamba-2-1.3b", (8, 2048, 1, 64, 128, 64), per_head),
        ("GLA-340M", (8, 2048, 4, 4, 128, 256), per_channel),
        ("Mamba-2-370m", (1, 131072, 1, 32, 128, 64), per_head),
        ("GLA-340M", (1, 131072, 4, 4, 128, 256), per_channel),
    ):
        B, T, _, H, K, V = size
        if T < 100_000:  # at 131,072 steps torch.compile would unroll 4096 chunks
            functions = {**functions, "chunked, compiled": torch.compile(chunked_scan)}
        inputs, cotangents = draw(size, model == "GLA-340M", torch.bfloat16)
        read = sum(x.nbytes for x in inputs)
        written = sum(x.nbytes for x in cotangents)
        flops = B * T * H * (4 * K * V + 2 * 64 * (K + V))  # chunks of 64

        # backward reads the inputs and the outputs' gradients, and writes the inputs' gradients
        floor = max((read + written) / bandwidth, flops / rate)
        floor_both = max((3 * read + 2 * written) / bandwidth, 4 * flops / rate)
        print(f"\n{model}, B {B}, T {T}: forward, with backward; floor {floor:.0f}, {floor_both:.0f} us")
        for name, function in functions.items():
            forward = partial(function, *inputs)
            both = partial(outputs_and_gradients, function, inputs, cotangents)
            try:
                with torch.no_grad():
                    time = microseconds(forward)
                time_both = microseconds(both)
                peak = peak_gigabytes(both)
            except (ImportError, RuntimeError) as error:  # not installed; out of memory
                print(f"  {name:<24}{type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            shares = f"{floor / time:5.0%}{floor_both / time_both:6.0%} of the floor"
            print(f"  {name:<24}{time:9.0f}{time_both:9.0f} us{shares}, peak {peak:.2f} GB", flush=True)


SWEPT = (  # name, size to time, size to check, is there a decay per channel?
    ("Mamba-2-370m", (8, 2048, 1, 32, 128, 64), (1, 1000, 1, 32, 128, 64), False),
    ("GLA-340M", (8, 2048, 4, 4, 128, 256), (1, 1000, 4, 4, 128, 256), True),
)
TILES = tuple(itertools.product((16, 32, 64, 128), (16, 32, 64), (2, 4, 8), (1, 2)))


def sweep(swept=SWEPT, tiles=TILES, dtype=torch.bfloat16):
    """Print of each tile (chunk, block, warps, stages) the times, and the worst error of OUTPUTS."""
    for model, size, small_size, per_channel in swept:
        inputs, cotangents = draw(size, per_channel, dtype)
        small_inputs, small_cotangents = draw(small_size, per_channel, dtype)
        exact_inputs = [x.detach().double().requires_grad_() for x in small_inputs]
        wanted = outputs_and_gradients(recurrent_scan, exact_inputs, [x.double() for x in small_cotangents])
        print(f"\n{model}, (chunk, block, warps, stages): forward, with backward, worst error")
        for tile in tiles:
            function = partial(triton_scan, tile=tile)
            try:
                got = outputs_and_gradients(function, small_inputs, small_cotangents)
                errors = [(x.double() - y).norm() / y.norm() for x, y in zip(got, wanted, strict=True)]
                with torch.no_grad():
                    time = microseconds(partial(function, *inputs))
                time_both = microseconds(partial(outputs_and_gradients, function, inputs, cotangents))
            except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
                print(f"  {tile!s:<20}{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            worst = max(errors).item()
            print(f"  {tile!s:<20}{time:9.0f}{time_both:9.0f} us{worst:9.0e}", flush=True)


def main():
    print(f"torch {torch.__version__}, triton {triton.__version__ if triton else 'missing'}", end="")
    if GPU:
        from triton.backends.nvidia.compiler import get_ptxas_version

        major, minor = torch.cuda.get_device_capability()
        ptxas = get_ptxas_version(10 * major + minor).strip().splitlines()[-1]
        print(f", {torch.cuda.get_device_name()} (sm_{major}{minor}), ptxas {ptxas}", end="")
    print()
    functions = {"recurrent": recurrent_scan, "chunked": chunked_scan}
    if triton is not None:
        functions["triton"] = triton_scan
    half = torch.bfloat16 if GPU else torch.float16  # Triton's interpreter multiplies bfloat16 wrongly
    small = (2, 1000, 2, 4, 128, 64) if GPU else (1, 100, 1, 2, 24, 16)
    sizes = [("decay per head", small, False), ("decay per channel", small, True)]
    error_table("All backends", sizes, [torch.float32, half], functions)
    if not GPU or triton is None:
        print("\nno GPU (or no Triton): no errors at real shapes, no times")
        return

    real_sizes = [
        ("Mamba-2-370m", (1, 2048, 1, 32, 128, 64), False),
        ("Mamba-2-1.3b", (1, 2048, 1, 64, 128, 64), False),
        ("GLA-340M", (1, 2048, 4, 4, 128, 256), True),
    ]
    error_table("Real shapes, B 1, T 2048", real_sizes, [torch.bfloat16], {"triton": triton_scan})
    check_64_bit_offsets()
    torch.cuda.empty_cache()
    time_table()
    sweep()


if __name__ == "__main__":
    main()
