"""The one recurrence behind Mamba-2, GLA and Mamba-1: step by step, in chunks, and as one GPU kernel.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in (0, 1]

    B  batch       G  groups: head h reads q, k of group h*G//H       K  key size of a head (Mamba-2: d_state)
    T  length      H  heads      J  heads of a group, H/G             V  value size (Mamba-2: headdim)
    L  steps of a chunk

    q, k    (B, T, G, K)                v  (B, T, H, V)
    log_a   (B, T, H)    one decay per head (Mamba-2), or
            (B, T, H, K) one decay per key channel (GLA, Mamba-1); never positive
    state   (B, H, K, V) the S that the first step starts from, never below float32; None means zeros

Every scan returns o (B, T, H, V) in v's dtype and the final state (B, H, K, V). Gradients reach every
input and the initial state, and flow in from the final state. q, k and v share one dtype.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; everything but triton_scan works without it
    triton = None


# ---- 1. The shapes ----
def check_inputs(q, k, v, log_a, state):
    """Raise a ValueError that names the argument which does not fit. Returns B, T, G, H, K, V."""
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"expected q (B, T, G, K), v (B, T, H, V), got {tuple(q.shape)}, {tuple(v.shape)}")
    (B, T, G, K), (H, V) = q.shape, v.shape[2:]
    if min(B, T, G, H, K, V) < 1:
        raise ValueError(f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}, expected no size below 1")
    if H % G:
        raise ValueError(f"v has {H} heads, which {G} groups of q cannot share evenly")

    table = [("q", q, [(B, T, G, K)]), ("k", k, [(B, T, G, K)]), ("v", v, [(B, T, H, V)])]
    table.append(("log_a", log_a, [(B, T, H), (B, T, H, K)]))
    if state is not None:
        table.append(("state", state, [(B, H, K, V)]))
    for name, x, shapes in table:
        shape = tuple(x.shape)
        if shape not in shapes:
            raise ValueError(f"{name} has shape {shape}, expected {' or '.join(map(str, shapes))}")
        if x.device != q.device:
            raise ValueError(f"{name} {shape} is on {x.device}, expected {q.device} like q")
        if not x.is_floating_point():
            raise ValueError(f"{name} {shape} is {x.dtype}, expected a floating-point dtype")
        # log_a and state may have a dtype of their own: they are computed in float32 at least
        if name in ("k", "v") and x.dtype != q.dtype:
            raise ValueError(f"{name} {shape} is {x.dtype}, expected {q.dtype} like q")
    # only on a CPU: a look at the values would make every call wait for the GPU
    if log_a.device.type == "cpu" and not torch.compiler.is_compiling() and log_a.max() > 0:
        reached = f"log_a {tuple(log_a.shape)} reaches {log_a.max():.3}"
        raise ValueError(f"{reached}, expected no log decay above 0")
    return B, T, G, H, K, V


# ---- 2. The definition ----
def recurrent_scan(q, k, v, log_a, state=None):
    """The recurrence one step at a time: the oracle of every test. Shapes as at the top of this file."""
    B, T, G, H, K, V = check_inputs(q, k, v, log_a, state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = v.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)
    q = q.to(dtype).repeat_interleave(H // G, dim=2)  # (B, T, H, K): every head gets the q of its group
    k = k.to(dtype).repeat_interleave(H // G, dim=2)
    a = log_a.to(dtype).exp().reshape(B, T, H, -1, 1)  # (B, T, H, 1 or K, 1)

    # unbind, not q[:, t]: the gradient of q[:, t] is a full-size tensor of zeros at every step
    o = []
    steps = zip(q.unbind(1), k.unbind(1), v.to(dtype).unbind(1), a.unbind(1), strict=True)
    for q_t, k_t, v_t, a_t in steps:
        S = a_t * S + k_t[..., :, None] * v_t[..., None, :]  # (B, H, K, V)
        o.append((S * q_t[..., :, None]).sum(-2))  # (B, H, V)
    return torch.stack(o, 1).to(v.dtype), S


# ---- 3. In chunks ----
def chunked_scan(q, k, v, log_a, state=None, chunk=32):
    """The same in matmuls over chunks of about `chunk` steps (SSD, Dao & Gu 2024, section 6). Any T >= 1.

    Let b_t = log a_1 + ... + log a_t inside a chunk of L steps, and let S be the state that enters the chunk:

        o_t = sum_{s <= t} e^(b_t - b_s) (q_t . k_s) v_s + e^(b_t) S^T q_t      inside the chunk + from before
        S'  = e^(b_L) S + sum_s e^(b_L - b_s) k_s v_s^T                         enters the next chunk

    With a decay per key channel the factors e^(...) belong inside, to each product of q_t and k_s.
    No exponent is positive, so nothing overflows at any decay. Shapes as at the top of this file.
    """
    B, T, G, H, K, V = check_inputs(q, k, v, log_a, state)
    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    S = v.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)

    # Heads of a group share the matmuls of its q and k, unless every channel decays: then each is a group
    per_channel = log_a.dim() == 4
    if per_channel and G < H:
        q = q.repeat_interleave(H // G, dim=2)
        k = k.repeat_interleave(H // G, dim=2)
        G = H
    J = H // G  # heads of a group
    v = v.unflatten(2, (G, J))  # (B, T, G, J, V)
    S = S.unflatten(1, (G, J)).transpose(2, 3)  # (B, G, K, J, V)
    if not per_channel:
        log_a = log_a.unflatten(2, (G, J))  # (B, T, G, J), else (B, T, G, K)

    # 1. Cut T into n chunks of L steps. Equal chunks need the least padding, which goes in front: k = 0 and
    #    log_a = 0 change no state, and every chunk ends in a real step
    L = math.ceil(T / math.ceil(T / chunk))
    if per_channel:
        L = 1 << (L - 1).bit_length()  # the next power of two, for decayed_scores
    n = math.ceil(T / L)
    padding = n * L - T
    chunks = []
    for x in (q, k, v, log_a):
        x = x.to(dtype)
        if padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (padding, 0))
        chunks.append(x.unflatten(1, (n, L)).transpose(2, 3))
    q, k, v, log_a = chunks  # (B, n, G, L, K), the same, (B, n, G, L, J, V), (B, n, G, L, J or K)
    b = log_a.cumsum(3)
    # b_L - b_s, with a constant 0 at s = L: a difference would leave rounding noise in the gradient of log_a
    b_to_end = F.pad(b[..., -1:, :] - b[..., :-1, :], (0, 0, 0, 1))

    # 2. The scores of the pairs inside a chunk; and what reads, what writes and what decays the state
    if per_channel:  # q and k carry the decays of their channels
        scores = decayed_scores(q, k, b)[:, :, :, None]  # (B, n, G, 1, L, L)
        q_reads = q * b.exp()
        k_writes = k * b_to_end.exp()
        v_writes = v
        state_decay = b[..., -1, :].exp()[..., None, None]  # (B, n, G, K, 1, 1)
    else:  # v carries the decays of its heads, and so does o at the end
        # pairs s > t get exponent 0 here, because e^(+large) would give inf * 0 = nan in the gradient, and
        # score 0 in the line after
        b_row = b.transpose(3, 4)  # (B, n, G, J, L)
        decay = (b_row[..., :, None] - b_row[..., None, :]).tril(-1).exp()  # (B, n, G, J, L, L)
        scores = (q @ k.mT).tril()[:, :, :, None] * decay  # (B, n, G, J, L, L)
        q_reads = q
        k_writes = k
        v_writes = v * b_to_end.exp()[..., None]
        state_decay = b[..., -1, :].exp()[..., None, :, None]  # (B, n, G, 1, J, 1)

    # 3. From chunk to chunk: q reads the state that enters; then the state decays and takes in k v^T
    before = []
    steps = zip(q_reads.unbind(1), k_writes.unbind(1), v_writes.unbind(1), state_decay.unbind(1), strict=True)
    for q_i, k_i, v_i, decay_i in steps:
        before.append(q_i @ S.flatten(3))  # (B, G, L, J * V)
        added = (k_i.mT @ v_i.flatten(3)).unflatten(3, (J, V))  # (B, G, K, J, V)
        S = torch.addcmul(added, decay_i, S)
    before = torch.stack(before, 1).unflatten(4, (J, V))  # (B, n, G, L, J, V)

    # 4. The output: inside the chunk + from before
    inside = (scores @ v.transpose(3, 4)).transpose(3, 4)  # (B, n, G, L, J, V)
    o = inside + before if per_channel else torch.addcmul(inside, before, b.exp()[..., None])
    o = o.transpose(2, 3).reshape(B, n * L, H, V)[:, padding:]
    return o.to(out_dtype), S.transpose(2, 3).reshape(B, H, K, V)


def decayed_scores(q, k, b):
    """sum_K q_t e^(b_t - b_s) k_s for s <= t, else 0: q, k, b (..., L, K) -> (..., L, L).

    e^(b_t - b_s) does not factor into e^(b_t) e^(-b_s): with strong decay the second overflows. But halve the
    chunk, and halve the halves: every pair s < t is parted by exactly one midpoint m, the last step of a
    first half, and neither exponent of e^(b_t - b_m) e^(b_m - b_s) is positive. So each level is one matmul
    of its second halves with its first halves. L is a power of two.

               s  0  1  2  3  4  5  6  7
        t = 0     =                           =  s = t needs no decay
            1     1  =                        1  parted by halves of 1 step,   m = 0, 2, 4, 6
            2     2  2  =                     2  parted by halves of 2 steps,  m = 1, 5
            3     2  2  1  =                  4  parted by halves of 4 steps,  m = 3
            4     4  4  4  4  =
            5     4  4  4  4  1  =
            6     4  4  4  4  2  2  =
            7     4  4  4  4  2  2  1  =
    """
    L = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # (..., L, 1, 1): the diagonal, as L blocks of one step
    for level in range(L.bit_length() - 1):
        # every second half reads what the first half before it wrote
        half = 2**level
        halves = (L // (2 * half), 2, half)  # pairs of them, first and second, steps
        b_first, b_second = b.unflatten(-2, halves).unbind(-3)  # (..., pairs, half, K)
        b_mid = b_first[..., -1:, :]  # (..., pairs, 1, K)
        q_second = q.unflatten(-2, halves)[..., 1, :, :] * (b_second - b_mid).exp()
        k_first = k.unflatten(-2, halves)[..., 0, :, :] * (b_mid - b_first).exp()
        lower = q_second @ k_first.mT  # (..., pairs, half, half)
        # two blocks of the level before and these scores are the quarters of a block of this level
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)  # (..., pairs, half, half)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        scores = torch.cat([top, torch.cat([lower, second], -1)], -2)  # (..., pairs, 2 * half, 2 * half)
    return scores.squeeze(-3)


# ---- 4. The gradients: the same scan with its roles swapped ----
class TritonScan(torch.autograd.Function):
    """o and the final state. log_a is (B, T, heads, 1 or K), tile is [chunk, block, steps of a segment].

    Here v and the state have H heads; triton_scan cuts a wide head into several, which share one log_a.

    Let dO_t be the gradient that arrives at o_t, R_T the one that arrives at the final state, and dS_t all
    that reaches S_t, from its own step and from the later ones. Differentiating the recurrence gives

        dS_t = q_t dO_t^T + R_t        R_{t-1} = diag(a_t) dS_t        (R_0 is the initial state's gradient)
        dq_t = S_t dO_t        dk_t = dS_t v_t        dv_t = dS_t^T k_t

    The first line is the recurrence again, in reverse time. The second line reads a state as o_t = S_t^T q_t
    does. So one kernel, "add k v^T to a decaying state and read it with q", is launched in four roles:

        role      q    k    v    starts from      time     decay    gives
        forward   q    k    v    S_0              forward  key      o, and S_T as its final state
        dq        dO   v    k    S_0 transposed   forward  value    dq
        dk        v    dO   q    R_T transposed   reverse  value    dk
        dv        k    q    dO   R_T              reverse  key      dv, and R_0 as its final state

    In the two roles with a transposed state K and V change places: the kernel's keys are the columns of S,
    and a decay per key channel acts on the kernel's values. One decay per head, "scalar" in all four roles,
    acts on all of S.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, state, tile):
        # b of every chunk, shared by all launches; in base 2, because GPUs compute 2^x and not e^x
        T, chunk = q.shape[1], tile[0]
        if T % chunk:
            log_a = F.pad(log_a, (0, 0, 0, 0, 0, -T % chunk))
        b = (log_a * math.log2(math.e)).unflatten(1, (-1, chunk)).cumsum(2)
        b = b.flatten(1, 2)[:, :T].contiguous()  # (B, T, heads, 1 or K)

        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        decay = "scalar" if b.shape[3] == 1 else "key"
        enter = states_that_enter(k, v, b, state, tile, decay, reverse=False)
        leave = state.new_empty(enter.shape)
        o = torch.empty_like(v)
        launch_kernel(q, k, v, b, enter, tile, decay, reverse=False, o=o, leave=leave)
        ctx.save_for_backward(q, k, v, b, state)
        ctx.tile = tile
        return o, leave[:, -1]

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, b, state = ctx.saved_tensors
        tile = ctx.tile
        (B, T, H, _), K = v.shape, q.shape[3]
        do = do.contiguous()
        # what the decay acts on in S and R, and in S and R transposed
        decay, decay_mT = ("scalar", "scalar") if b.shape[3] == 1 else ("key", "value")
        S = states_that_enter(k, v, b, state, tile, decay, reverse=False)  # (B, segments, H, K, V)
        R = states_that_enter(q, do, b, dfinal, tile, decay, reverse=True)  # (B, segments, H, K, V)

        # dq, and the first half of d log a. d log a_t adds up all pairs of a k_s, s < t, with a q_u, u >= t
        # (S_0 counts as a first k, R_T as a last q). From t + 1 to t it gains what q_t reads and loses what
        # k_t writes:
        #     d log a_t = d log a_{t+1} + q_t * dq_t - k_t * dk_t      (summed over K with one decay per head)
        # dq and dk are taken here without the pair s = t, which is in neither sum: so nothing large cancels,
        # and even a d log a of size 1e-13 is right to 1e-4. This launch stores q * dq in float32, with one
        # decay per head summed over the keys of each program
        dq = q.new_empty(B, T, H, K)
        leave = state.new_empty(S.mT.shape)
        qdq = b.new_empty((B, H, K // min(K, tile[1]), T) if decay == "scalar" else (B, T, H, K))
        launch_kernel(do, v, k, b, S.mT, tile, decay_mT, reverse=False, o=dq, leave=leave, x=q, qdq=qdq)

        # dk, and the second half: in reverse time this launch subtracts k * dk and sums. The sum starts from
        # d log a_{e+1} = sum(S_e * R_e) after the last step e of a segment. This holds k_e * (R_e v_e), as
        # does the k_e * dk_e that step e subtracts: both leave it out, so the dq launch leaves S_e without
        # k_e v_e^T
        dk = torch.empty_like(dq)
        end_sum = (leave * R.mT).sum(3)  # (B, segments, H, K)
        dlog_a = torch.empty_like(qdq)
        sums = dict(qdq=qdq, end_sum=end_sum, dlog_a=dlog_a)
        launch_kernel(v, do, q, b, R.mT, tile, decay_mT, reverse=True, o=dk, x=k, **sums)
        if decay == "scalar":
            dlog_a = dlog_a.sum(2).transpose(1, 2)[..., None]  # (B, T, H, 1)

        # dv, and the initial state's gradient
        dv = torch.empty_like(v)
        dstate = state.new_empty(R.shape)
        launch_kernel(k, q, do, b, R, tile, decay, reverse=True, o=dv, leave=dstate)
        return sum_heads(dq, q), sum_heads(dk, k), dv, sum_heads(dlog_a, b), dstate[:, 0], None


def sum_heads(gradient, x):
    """(B, T, H, size) -> (B, T, heads of x, size): the heads that share x add their gradients."""
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)


# ---- 5. The launch ----
def triton_scan(q, k, v, log_a, state=None, chunk=None, block=None, segments=None):
    """The same as one fused GPU kernel that is its own gradient. Shapes as at the top of this file.

    q, k, v are float32, bfloat16 or float16; sums, decays and states are float32. K is at most 256. K and V
    are padded to powers of two, 16 or more: with V = 1 (Mamba-1) v becomes as large as log_a. A program takes
    `chunk` steps at a time and `block` value columns (powers of two, 16 or more), and `segments` of T run
    side by side; None chooses. On a CPU the kernel runs only in Triton's interpreter. Raises ValueError for
    what it cannot take, ImportError without Triton.
    """
    B, T, _, H, K, V = check_inputs(q, k, v, log_a, state)
    if triton is None:
        raise ImportError("triton_scan needs the triton package, which is not installed: use chunked_scan")
    reason = reason_against_the_kernel(q)
    if reason:
        raise ValueError(f"{reason}: use chunked_scan")

    # the largest tile that hardly spills registers on an H100
    float32, per_channel = q.dtype == torch.float32, log_a.dim() == 4
    if chunk is None:
        chunk = 16 if float32 or per_channel else 64
    if block is None:
        block = 16 if float32 else 32 if per_channel or K > 128 else 64
    for name, size in (("chunk", chunk), ("block", block)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} is {size}, expected a power of two of at least 16")

    # pad K and V to powers of two; V = 256 becomes two heads of 128 with the same q, k and log_a
    parts = triton.cdiv(V, 128)
    K_padded = max(16, triton.next_power_of_2(K))
    V_padded = max(16, triton.next_power_of_2(triton.cdiv(V, parts)))
    q, k = pad_last(q, K_padded), pad_last(k, K_padded)
    v = pad_last(v, parts * V_padded).reshape(B, T, H * parts, V_padded)
    log_a = pad_last(log_a.float(), K_padded) if per_channel else log_a.float()[..., None]
    state = q.new_zeros(B, H, K, V, dtype=torch.float32) if state is None else state.float()
    state = pad_last(pad_last(state, parts * V_padded).mT, K_padded).mT
    state = state.unflatten(3, (parts, V_padded)).transpose(2, 3).flatten(1, 2)  # (B, H * parts, K_, V_)

    # two programs per multiprocessor keep a GPU busy; fewer than three segments gain less than they cost
    if segments is None:
        segments = 1
        if q.is_cuda:
            programs = B * H * parts * max(1, V_padded // block)
            wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count // programs
            if min(wanted, T // 1024) > 2:
                segments = min(wanted, T // 1024)
    if segments < 1:
        raise ValueError(f"segments is {segments}, expected at least 1")
    segment = triton.cdiv(triton.cdiv(T, chunk), segments) * chunk  # steps, in whole chunks

    o, final = TritonScan.apply(q, k, v, log_a, state, [chunk, block, segment])
    final = final.unflatten(1, (H, parts)).transpose(2, 3).flatten(3)  # (B, H, K_padded, parts * V_padded)
    return o.reshape(B, T, H, parts * V_padded)[..., :V], final[:, :, :K, :V]


def reason_against_the_kernel(q):
    """Why triton_scan cannot take inputs like q (B, T, G, K), or None if it can."""
    shape, K = tuple(q.shape), q.shape[3]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q {shape} is {q.dtype}, but the kernel takes float32, bfloat16 or float16"
    if q.dtype == torch.bfloat16 and INTERPRETED:
        return f"q {shape} is torch.bfloat16, which Triton's interpreter multiplies wrongly"
    if K > 256:
        return f"q {shape} has K = {K}, but the kernel has room for a state of K = 256"
    if not q.is_cuda and not INTERPRETED:
        return f"q {shape} is on {q.device}, but the kernel needs a GPU (or TRITON_INTERPRET=1)"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"q {shape} is on a GPU that is too old: the kernel needs compute capability 8.0"


def pad_last(x, size):
    """Zeros up to this size of the last axis. F.pad would copy even when there is nothing to add."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def states_that_enter(k, v, b, state, tile, decay, reverse):
    """The states that enter the segments, (B, segments, H, K, V), when `state` enters the first in this time.

    Few heads and a long sequence would leave a GPU idle, so T is cut into segments that run side by side. A
    launch without output, for which any q will do, finds what each segment adds to a state of zeros; a short
    loop chains them.
    """
    chunk, _, segment = tile
    T = k.shape[1]
    segments = triton.cdiv(T, segment)
    if segments == 1:
        return state[:, None]
    enter = state[:, None].repeat(1, segments, 1, 1, 1)
    added = torch.empty_like(enter)
    any_q = k
    launch_kernel(any_q, k, v, b, torch.zeros_like(enter), tile, decay, reverse, leave=added)

    # b at the last step of each chunk; summed over a segment they are its log decay
    chunk_ends = torch.arange(chunk, T + chunk, chunk, device=b.device).clamp(max=T) - 1
    b_ends = b[:, chunk_ends].repeat_interleave(state.shape[1] // b.shape[2], 2)  # (B, chunks, H, 1 or K)
    decays = b_ends.split(segment // chunk, dim=1)
    for i in reversed(range(segments)) if reverse else range(segments):
        enter[:, i] = state
        segment_decay = decays[i].sum(1).exp2()[..., None]  # (B, H, 1 or K, 1)
        state = torch.addcmul(added[:, i], segment_decay, state)
    return enter


# torch.compile cannot trace a launch in Triton's interpreter, so it gets the launch as one operator
@torch.library.custom_op("lengthgen::launch_kernel", mutates_args=("o", "leave", "qdq", "dlog_a"))
def launch_kernel(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, enter: Tensor, tile: list[int], decay: str, reverse: bool,
    o: Tensor | None = None, leave: Tensor | None = None, x: Tensor | None = None,
    qdq: Tensor | None = None, end_sum: Tensor | None = None, dlog_a: Tensor | None = None,
) -> None:  # fmt: skip
    """One launch in a role of the table. Reads `enter` (B, segments, H, K, V), writes those of o, leave, qdq
    and dlog_a that it is given; dk reads qdq."""
    (B, segments, H, K, V), (chunk, block, segment) = enter.shape, tile
    block = min(block, V)
    heads_of_x = 1 if x is None else x.shape[2]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        scan_kernel[(B * segments * H * (V // block),)](
            q, k, v, b, enter, o, leave, x, qdq, end_sum, dlog_a, k.shape[1], segment, *enter.stride(),
            H, q.shape[2], k.shape[2], v.shape[2], b.shape[2], heads_of_x, K, V, b.shape[3], chunk, block,
            chunk.bit_length() - 1, reverse, decay, num_warps=4 if K * block > 1024 else 1, num_stages=2,
        )  # fmt: skip


# ---- 6. The kernel ----
if triton is not None:

    @triton.jit
    def scan_kernel(
        q, k, v, b, enter, o, leave, x, qdq, end_sum, dlog_a,
        T, segment, enter_b, enter_s, enter_h, enter_k, enter_v,  # strides of enter (B, segments, H, K, V)
        H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr,
        HX: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
        BLOCK: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    ):  # fmt: skip
        """A launch, in the letters of its role. H heads run; q has HQ, k has HK ...

        enter and leave are states, x is the q or k whose gradient o is; qdq, end_sum, dlog_a as in backward.

        A program owns BLOCK value columns of one head and walks through the chunks of a segment, its piece of
        the state in registers: none goes to memory on the way, no two programs add to one number, and every
        run gives the same bits. In a chunk, with S entering and "before" meant in the time of the launch, and
        with e^x computed as 2^x, since b comes in base 2:

            o_t = sum_{s = t or before} decay(s, t) (q_t . k_s) v_s + c_in(t) S^T q_t
            S'  = e^(b_L) S + sum_s c_out(s) k_s v_s^T            (decays of channels: on their products)

                      decay(s, t)      c_in(t)          c_out(s)
            forward   e^(b_t - b_s)    e^(b_t)          e^(b_L - b_s)
            reverse   e^(b_s - b_t)    e^(b_L - b_t)    e^(b_s)
        """
        # Where this program works. A 1-d grid, as the other axes stop at 65535; offsets in 64 bits
        tl.static_assert(DECAY != "value" or qdq is not None)  # in this mode only qdq adds s = t
        BLOCKS: tl.constexpr = V // BLOCK
        dtype: tl.constexpr = q.dtype.element_ty  # what the matmuls take; they add in float32
        pid = tl.program_id(0).to(tl.int64)
        i_h, i_bs = pid // BLOCKS % H, pid // (BLOCKS * H)
        segments = tl.cdiv(T, segment)
        i_b, i_s = i_bs // segments, i_bs % segments
        start = i_s * segment
        end = tl.minimum(start + segment, T)
        chunks = tl.cdiv(end - start, L)
        t = tl.arange(0, L)
        c_k = tl.arange(0, K)
        c_v = (pid % BLOCKS * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        c_b = c_v if DECAY == "value" else tl.arange(0, N)

        # Pointers into (B, T, heads, size) at this batch row and head; the loop adds the steps
        q += (i_b * T * HQ + i_h // (H // HQ)) * K + c_k[None, :]
        k += (i_b * T * HK + i_h // (H // HK)) * K + c_k[None, :]
        v += (i_b * T * HV + i_h // (H // HV)) * V + c_v[None, :]
        b += (i_b * T * HB + i_h // (H // HB)) * N + c_b[None, :]

        # The state that enters, and for dk the sum for d log a from the steps after the segment
        enter += i_b * enter_b + i_s * enter_s + i_h * enter_h
        S = tl.load(enter + c_k[:, None] * enter_k + c_v[None, :] * enter_v)
        if end_sum is not None:
            later = tl.load(end_sum + (i_bs * H + i_h) * V + c_v)[None, :]
            if DECAY == "scalar":
                later = tl.sum(later, 1, keep_dims=True)

        same = t[:, None] == t[None, :]
        earlier = t[:, None] < t[None, :] if REVERSE else t[:, None] > t[None, :]
        for i in range(chunks):
            # The chunk starts at t0 and has n real steps
            t0 = start + (chunks - 1 - i if REVERSE else i) * L
            n = tl.minimum(end - t0, L).to(tl.int32)
            real = t[:, None] < n
            inner = t[:, None] < (end - t0 - 1).to(tl.int32)  # all steps but the segment's last

            # Load. Steps past the end repeat the last b, because 0 would give e^(+large) * 0 in reverse time
            q_t = tl.load(q + t0 * (HQ * K) + t[:, None] * (HQ * K), mask=real, other=0.0)
            k_t = tl.load(k + t0 * (HK * K) + t[:, None] * (HK * K), mask=real, other=0.0)
            v_t = tl.load(v + t0 * (HV * V) + t[:, None] * (HV * V), mask=real, other=0.0)
            b_t = tl.load(b + t0 * (HB * N) + tl.minimum(t, n - 1)[:, None] * (HB * N))
            b_L = tl.load(b + (t0 + n - 1) * (HB * N))  # (1, N)
            c_in = tl.exp2(b_L - b_t if REVERSE else b_t)
            c_out = tl.exp2(b_t if REVERSE else b_L - b_t)

            if o is not None:
                # y (L, BLOCK): what q reads of S. A (L, L): q_t . k_s, for "key" the diagonal alone
                if DECAY == "key":
                    y = tl.dot((q_t * c_in).to(dtype), S.to(dtype), input_precision="ieee")
                    A = tl.where(same, tl.sum(q_t.to(tl.float32) * k_t, 1, keep_dims=True), 0.0)
                else:
                    y = tl.dot(q_t, S.to(dtype), input_precision="ieee") * c_in
                    A = tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
                if qdq is not None:  # dq and dk: d log a wants them without s = t
                    y_same = tl.sum(tl.where(same, A, 0.0), 1, keep_dims=True) * v_t

                # Decay the pairs, s before t: as one matrix, or level by level as in decayed_scores
                if DECAY == "scalar":
                    reads = earlier if qdq is not None else earlier | same
                    gap = tl.trans(b_t) - b_t if REVERSE else b_t - tl.trans(b_t)
                    A *= tl.exp2(tl.where(reads, gap, float("-inf")))  # mask the exponent, then exponentiate
                else:
                    for level in tl.static_range(LEVELS):
                        half = 1 << level
                        pair = t // (2 * half)  # which pair of halves, which of the two, and where they meet
                        second = t % (2 * half) >= half
                        mid = tl.minimum(pair * (2 * half) + half - 1, n - 1)
                        b_mid = tl.load(b + t0 * (HB * N) + mid[:, None] * (HB * N))
                        to_mid = tl.exp2(tl.where(second[:, None], b_t - b_mid, b_mid - b_t))
                        parted = (pair[:, None] == pair[None, :]) & (second[:, None] != second[None, :])
                        if DECAY == "key":
                            q_mid, k_mid = (q_t * to_mid).to(dtype), (k_t * to_mid).to(dtype)
                            scores = tl.dot(q_mid, tl.trans(k_mid), input_precision="ieee")
                            A += tl.where(earlier & parted, scores, 0.0)
                        else:
                            A_mid = tl.where(earlier & parted, A, 0.0).to(dtype)
                            v_mid = (v_t * to_mid).to(dtype)
                            y += tl.dot(A_mid, v_mid, input_precision="ieee") * to_mid
                if DECAY != "value":
                    y = tl.dot(A.to(dtype), v_t, y, input_precision="ieee")
                p_o = ((i_b * T + t0) * H + i_h) * V + t[:, None] * (H * V) + c_v[None, :]
                tl.store(o + p_o, (y if qdq is None else y + y_same).to(dtype), mask=real)

            if qdq is not None:
                # xdx is q * dq or k * dk; for "scalar" its sum over the block, (B, H, BLOCKS, T)
                p_x = ((i_b * T + t0) * HX + i_h // (H // HX)) * V + t[:, None] * (HX * V) + c_v[None, :]
                xdx = y * tl.load(x + p_x, mask=real, other=0.0)
                p_xdx = p_o
                if DECAY == "scalar":
                    xdx = tl.sum(xdx, 1, keep_dims=True)
                    p_xdx = ((i_b * H + i_h) * BLOCKS + pid % BLOCKS) * T + t0 + t[:, None]

                # dq stores it; dk subtracts its own and sums back in time
                if dlog_a is None:
                    tl.store(qdq + p_xdx, xdx, mask=real)
                else:
                    change = tl.load(qdq + p_xdx, mask=real, other=0.0) - tl.where(inner, xdx, 0.0)
                    tl.store(dlog_a + p_xdx, later + tl.cumsum(change, 0, reverse=True), mask=real)
                    later += tl.sum(change, 0, keep_dims=True)

            # The state decays to the end of the chunk and takes in k v^T; dq leaves out the last of a segment
            k_out, v_out = k_t, v_t
            if qdq is not None and dlog_a is None:
                k_out = tl.where(inner, k_t, 0.0)
            if DECAY == "key":
                S *= tl.trans(tl.exp2(b_L))
                k_out = (k_out * c_out).to(dtype)
            else:
                S *= tl.exp2(b_L)
                v_out = (v_out * c_out).to(dtype)
            S = tl.dot(tl.trans(k_out), v_out, S, input_precision="ieee")

        if leave is not None:
            tl.store(leave + ((i_bs * H + i_h) * K + c_k[:, None]) * V + c_v[None, :], S)

    INTERPRETED = not isinstance(scan_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set


# ---- 7. Which of the three ----
BACKENDS = {"recurrent": recurrent_scan, "chunked": chunked_scan, "triton": triton_scan}
_announced = set()


@torch.compiler.assume_constant_result  # under torch.compile: said while tracing, not part of the graph
def _announce(backend, reason):
    if backend not in _announced:
        _announced.add(backend)
        print(f"scan: {backend}, {reason}", flush=True)


def scan(q, k, v, log_a, state=None, backend=None):
    """One of the functions above; says once on stdout which and why. backend None picks, a name forces."""
    reason = "asked for"
    if backend is None:
        if not q.is_cuda or torch.version.hip:
            backend, reason = "chunked", "plain PyTorch matmuls run on any device"
            if v.shape[3] == 1:  # Mamba-1: a matmul over chunks would make L^2 scores for L numbers of v
                backend, reason = "recurrent", "with V = 1 chunks cost more than they save"
        elif triton is None:
            backend, reason = "chunked", "the triton package is not installed"
        elif reason_against_the_kernel(q):
            backend, reason = "chunked", reason_against_the_kernel(q)
        else:
            backend, reason = "triton", "one fused kernel on NVIDIA GPUs"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    _announce(backend, reason)
    with torch.autocast(q.device.type, enabled=False):  # the sums and the state stay in float32
        return BACKENDS[backend](q, k, v, log_a, state)
