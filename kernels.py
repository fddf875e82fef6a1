"""The one recurrence behind Mamba-2, GLA and Mamba-1: step by step, in chunks, and as one GPU kernel.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in [0, 1]

    B  batch       G  groups: head h reads q, k of group h*G//H       K  key size of a head (Mamba-2: d_state)
    T  length      H  heads      J  heads of a group, H/G             V  value size (Mamba-2: headdim)
    L  steps of a chunk

    q, k    (B, T, G, K)                v  (B, T, H, V)
    log_a   (B, T, H)    one decay per head (Mamba-2), or
            (B, T, H, K) one decay per key channel (GLA, Mamba-1); never positive, -inf forgets everything
    state   (B, H, K, V) the S that the first step starts from, never below float32; None means zeros

Every scan returns o (B, T, H, V) in v's dtype and the final state (B, H, K, V). Gradients reach every
input and the initial state, and flow in from the final state. q, k and v share one dtype.
"""

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; everything but triton_scan works without it
    triton = None

# ---- 1. The shapes ----

MIN_LOG_A = -30.0


def check_inputs(q, k, v, log_a, state):
    """Assert that the shapes fit. Returns log_a, cut off at MIN_LOG_A, and B, T, G, H, K, V.

    A float cannot tell e^-30 of a state, beside what is written into it, from nothing. A stronger decay would
    do harm: one huge term in a sum of log_a over a chunk rounds the others away, and -inf turns it into NaN.
    """
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, log_a {tuple(log_a.shape)}"
    assert k.shape == q.shape and v.shape[:2] == (B, T) and T > 0 and H % G == 0, shapes
    assert log_a.shape in ((B, T, H), (B, T, H, K)), shapes
    assert state is None or state.shape == (B, H, K, V), f"{shapes}, state {tuple(state.shape)}"
    assert q.dtype == k.dtype == v.dtype, f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    return log_a.clamp(min=MIN_LOG_A), B, T, G, H, K, V


# ---- 2. The definition ----


def recurrent_scan(q, k, v, log_a, state=None):
    """The recurrence, one step at a time: the oracle of every test. Shapes as at the top of this file."""
    log_a, B, T, G, H, K, V = check_inputs(q, k, v, log_a, state)
    # sums in float32, or in float64 if v is; every head gets the q and k of its group
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = v.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)
    q = q.to(dtype).repeat_interleave(H // G, dim=2)  # (B, T, H, K)
    k = k.to(dtype).repeat_interleave(H // G, dim=2)
    a = log_a.to(dtype).exp().reshape(B, T, H, -1, 1)  # (B, T, H, 1 or K, 1)

    # the recurrence; unbind, because the gradient of q[:, t] would be a full-size tensor at every step
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

    With one decay per key channel, b_t is a vector, and each factor e^(...) belongs to the product of that
    channel of q_t and k_s. No exponent is positive, so nothing overflows at any decay. Shapes as at the top
    of this file.
    """
    log_a, B, T, G, H, K, V = check_inputs(q, k, v, log_a, state)
    out_dtype = v.dtype
    dtype = torch.promote_types(out_dtype, torch.float32)
    S = v.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)

    # The heads of a group share the matmuls of its q and k. With one decay per key channel they cannot: then
    # every head gets a q and k of its own
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

    # 1. Cut T into n chunks of L steps. Steps of zeros are put in front of the first one to fill it up: k = 0
    #    writes nothing and log_a = 0 forgets nothing
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
    # b_L - b_s. At s = L it is a constant 0, because b_L - b_L would leave rounding errors in the gradient
    b_to_end = F.pad(b[..., -1:, :] - b[..., :-1, :], (0, 0, 0, 1))

    # 2. The decayed scores q_t . k_s inside a chunk; and q, k, v with the decays from and to the state
    if per_channel:  # q and k take the decays, because these belong to their channels
        scores = decayed_scores(q, k, b)[:, :, :, None]  # (B, n, G, 1, L, L)
        q_reads = q * b.exp()
        k_writes = k * b_to_end.exp()
        v_writes = v
        state_decay = b[..., -1, :].exp()[..., None, None]  # (B, n, G, K, 1, 1)
    else:  # v takes the decays, and in step 4 the output, because q and k are shared by heads
        # the first tril sets the exponent of pairs s > t to 0, because e^(+large) could give inf * 0 = NaN in
        # the gradient; the second sets their score to 0
        b_row = b.transpose(3, 4)  # (B, n, G, J, L)
        decay = (b_row[..., :, None] - b_row[..., None, :]).tril(-1).exp()  # (B, n, G, J, L, L)
        scores = (q @ k.mT).tril()[:, :, :, None] * decay  # (B, n, G, J, L, L)
        q_reads = q
        k_writes = k
        v_writes = v * b_to_end.exp()[..., None]
        state_decay = b[..., -1, :].exp()[..., None, :, None]  # (B, n, G, 1, J, 1)

    # 3. From chunk to chunk: q reads the state that enters, then the state decays and takes in k v^T
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

    e^(b_t - b_s) cannot be computed as e^(b_t) e^(-b_s): with strong decay e^(-b_s) overflows. Instead halve
    the chunk, and halve the halves. Every pair s < t is parted by exactly one midpoint m, the last step of a
    first half, and in e^(b_t - b_m) e^(b_m - b_s) neither exponent is positive. So each level is one matmul
    of its second halves with its first halves. L is a power of two, here 8:

               s  0  1  2  3  4  5  6  7
        t = 0     =
            1     1  =
            2     2  2  =                     =  s = t, which needs no decay
            3     2  2  1  =                  1  parted by halves of 1 step,   m = 0, 2, 4, 6
            4     4  4  4  4  =               2  parted by halves of 2 steps,  m = 1, 5
            5     4  4  4  4  1  =            4  parted by halves of 4 steps,  m = 3
            6     4  4  4  4  2  2  =
            7     4  4  4  4  2  2  1  =
    """
    L = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # (..., L, 1, 1): the diagonal, as L blocks of one step
    for level in range(L.bit_length() - 1):
        # cut the chunk into pairs of halves; every second half reads what the first half of its pair wrote
        half = 2**level
        halves = (L // (2 * half), 2, half)  # pairs, first or second, steps
        b_first, b_second = b.unflatten(-2, halves).unbind(-3)  # (..., pairs, half, K)
        b_mid = b_first[..., -1:, :]  # (..., pairs, 1, K)
        q_second = q.unflatten(-2, halves)[..., 1, :, :] * (b_second - b_mid).exp()
        k_first = k.unflatten(-2, halves)[..., 0, :, :] * (b_mid - b_first).exp()
        lower = q_second @ k_first.mT  # (..., pairs, half, half)
        # a block of this level has two blocks of the level before on its diagonal, and these scores below it
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)  # (..., pairs, half, half)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        scores = torch.cat([top, torch.cat([lower, second], -1)], -2)  # (..., pairs, 2 * half, 2 * half)
    return scores.squeeze(-3)


# ---- 4. The gradients: the same scan with its roles swapped ----


class TritonScan(torch.autograd.Function):
    """o and the final state of inputs that triton_scan has padded; log_a is (B, T, H, 1 or K).

    Let dO_t be the gradient that arrives at o_t, R_T the gradient that arrives at the final state, and dS_t
    the whole gradient of S_t, from its own step and from all later ones. Differentiating the recurrence gives

        dS_t = q_t dO_t^T + R_t        R_{t-1} = diag(a_t) dS_t        (R_0 is the initial state's gradient)
        dq_t = S_t dO_t        dk_t = dS_t v_t        dv_t = dS_t^T k_t

    The first line is the recurrence again, in reverse time. The second line reads a state in the way that
    o_t = S_t^T q_t does. So one kernel, "add k v^T to a decaying state and read it with q", has four roles:

        role      q    k    v    starts from      time     decay    gives
        forward   q    k    v    S_0              forward  key      o, and S_T as its final state
        dq        dO   v    k    S_0 transposed   forward  value    dq
        dk        v    dO   q    R_T transposed   reverse  value    dk
        dv        k    q    dO   R_T              reverse  key      dv, and R_0 as its final state

    In the roles dq and dk the state is transposed, so one decay per key channel acts on what the kernel takes
    for values. One decay per head acts on the whole state; its `decay` is "scalar" in all four roles.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, state, tile):
        # b_t as in chunked_scan, for all launches; in base 2, because a GPU computes 2^x faster than e^x
        T, chunk = q.shape[1], tile[0]
        b = F.pad(log_a * math.log2(math.e), (0, 0, 0, 0, 0, -T % chunk))
        b = b.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2)[:, :T].contiguous()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        decay = "scalar" if b.shape[3] == 1 else "key"
        o, final, _ = launch(q, k, v, b, state, tile, decay)
        ctx.save_for_backward(q, k, v, b, state)
        ctx.tile = tile
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, b, state = ctx.saved_tensors
        do = do.contiguous()
        decay, decay_mT = ("scalar", "scalar") if b.shape[3] == 1 else ("key", "value")
        dq, before_T, q_dq = launch(do, v, k, b, state.mT, ctx.tile, decay_mT, x=q)
        dk, _, k_dk = launch(v, do, q, b, dfinal.mT, ctx.tile, decay_mT, reverse=True, x=k)
        dv, dstate, _ = launch(k, q, do, b, dfinal, ctx.tile, decay, reverse=True)

        # a_t stands between every k_s with s < t and every q_u with u >= t; R_T counts as a last q. So its
        # gradient is all that is read from step t on, minus what was also written from step t on:
        #     d log a_t = sum_{u >= t} q_u * dq_u + sum(S_T * R_T) - sum_{s >= t} k_s * dk_s
        # Both sums have what a step writes and reads itself, and what step T writes and R_T reads. It would
        # cancel but for its rounding error, so the kernel leaves it out of q * dq, k * dk and `before_T`
        k_dk[:, -1] = 0
        last = (before_T * dfinal.mT).sum(2)[:, None]  # (B, 1, H, K)
        if decay == "scalar":
            last = last.sum(-1, keepdim=True)
        dlog_a = (q_dq - k_dk).flip(1).cumsum(1).flip(1) + last
        return sum_heads(dq, q), sum_heads(dk, k), dv, sum_heads(dlog_a, b), dstate, None


def sum_heads(gradient, x):
    """(B, T, H, size) -> (B, T, heads of x, size): the heads that share x add their gradients."""
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)


# ---- 5. The launch ----


def triton_scan(q, k, v, log_a, state=None, tile=None):
    """The recurrence as one GPU kernel that also computes its gradients. Shapes as at the top of this file.

    q, k, v are float32, bfloat16 or float16; sums, decays and states are float32. K is at most 256.
    tile: how the kernel cuts its work, see choose_tile; None chooses
    On a CPU the kernel runs only in Triton's interpreter.
    """
    log_a, B, T, _, H, K, V = check_inputs(q, k, v, log_a, state)
    assert triton is not None, "triton_scan needs the triton package: use chunked_scan"
    assert q.dtype in KERNEL_DTYPES and K <= MAX_K, f"q is {q.dtype}, K {K}: use chunked_scan"
    assert not INTERPRETED or q.dtype != torch.bfloat16, "Triton's interpreter multiplies bfloat16 wrongly"
    per_channel = log_a.dim() == 4

    # pad K and V to powers of two; V = 256 becomes two heads of 128 with the same q, k and log_a
    parts = triton.cdiv(V, 128)
    K_padded = max(16, triton.next_power_of_2(K))
    V_padded = max(16, triton.next_power_of_2(triton.cdiv(V, parts)))
    q, k = pad_last(q, K_padded), pad_last(k, K_padded)
    v = pad_last(v, parts * V_padded).reshape(B, T, H * parts, V_padded)
    log_a = pad_last(log_a.float(), K_padded) if per_channel else log_a.float()[..., None]
    state = q.new_zeros(B, H, K, V, dtype=torch.float32) if state is None else state.float()
    state = F.pad(state, (0, parts * V_padded - V, 0, K_padded - K))
    state = state.unflatten(3, (parts, V_padded)).transpose(2, 3).flatten(1, 2)  # (B, H * parts, K_, V_)

    # run it, and undo the padding
    tile = tile or choose_tile(q, v, per_channel)
    o, final = TritonScan.apply(q, k, v, log_a, state, tile)
    final = final.unflatten(1, (H, parts)).transpose(2, 3).flatten(3)  # (B, H, K_padded, parts * V_padded)
    return o.reshape(B, T, H, parts * V_padded)[..., :V], final[:, :, :K, :V]


KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_K = 256  # the registers of a GPU have no room for more


def pad_last(x, size):
    """Zeros up to this size of the last axis. F.pad would copy even when there is nothing to add."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def choose_tile(q, v, per_channel):
    """(chunk, block, warps, stages) for padded q and v.

    A program takes `chunk` steps at a time and owns `block` columns of the state, powers of two of at least
    16. It runs in `warps` groups of 32 threads, and with 2 stages it loads a chunk while it computes another.
    These choices spill few registers and fit into the 99 KB of shared memory that small GPUs have.
    """
    (B, _, H, V), K = v.shape, q.shape[3]
    float32 = q.dtype == torch.float32
    chunk = 16 if float32 or per_channel else 64
    block = 16 if float32 else 32
    warps = 8 if float32 or K > 128 else 4
    stages = 1 if float32 else 2
    # few programs leave a GPU idle, so each gets fewer columns
    if q.is_cuda and B * H * V // block < torch.cuda.get_device_properties(q.device).multi_processor_count:
        block = 16
    return chunk, block, warps, stages


def launch(q, k, v, b, state, tile, decay, reverse=False, x=None):
    """Run the kernel in one role. Returns o, the final state, and for x = q or k also x * o without s = t."""
    T = v.shape[1]
    B, H, K, V = state.shape
    chunk, block, warps, stages = tile
    block = min(block, V)
    o = v.new_empty(B, T, H, V)
    final = state.new_empty(B, H, K, V)
    x_o = None
    if x is not None:  # x * o; with one decay per head only its sum over the columns of each program
        x_o = b.new_empty(B, T, H, V if decay == "value" else V // block)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        scan_kernel[(B * H * (V // block),)](
            q, k, v, b, state, o, final, x, x_o, T, *state.stride(),
            H, q.shape[2], k.shape[2], v.shape[2], b.shape[2], 1 if x is None else x.shape[2],
            K, V, b.shape[3], chunk, block, chunk.bit_length() - 1, reverse, decay,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if decay == "scalar" and x is not None:
        x_o = x_o.sum(3, keepdim=True)
    return o, final, x_o


# ---- 6. The kernel ----
if triton is not None:

    @triton.jit(do_not_specialize=["T"])
    def scan_kernel(
        q, k, v, b, state, o, final, x, x_o, T, state_b, state_h, state_k, state_v,
        H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr,
        HX: tl.constexpr, K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
        BLOCK: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,
    ):  # fmt: skip
        """One role of the table in TritonScan; q, k, v and o mean what they mean in that role.

        There are H heads of the state; q has HQ heads, k has HK, v has HV, b has HB and x has HX. A program
        owns BLOCK columns of the state of one head. It walks through the chunks and keeps its piece of the
        state in registers. No two programs write to the same place, so every run gives the same bits. In a
        chunk, with S the state that enters, and "before" meant in the direction of time of this role:

            o_t = sum_{s = t or before} decay(s, t) (q_t . k_s) v_s + c_in(t) S^T q_t
            S'  = e^(b_L) S + sum_s c_out(s) k_s v_s^T

                      decay(s, t)      c_in(t)          c_out(s)
            forward   e^(b_t - b_s)    e^(b_t)          e^(b_L - b_s)
            reverse   e^(b_s - b_t)    e^(b_L - b_t)    e^(b_s)
        """
        # Which row of the batch, head and columns are this program's. The grid has one axis, because the
        # others stop at 65535 on a GPU
        BLOCKS: tl.constexpr = V // BLOCK
        dtype: tl.constexpr = q.dtype.element_ty  # what the matmuls take; they add in float32
        pid = tl.program_id(0).to(tl.int64)
        i_block, i_h, i_b = pid % BLOCKS, pid // BLOCKS % H, pid // (BLOCKS * H)
        chunks = tl.cdiv(T.to(tl.int64), L)
        t = tl.arange(0, L)
        c_k = tl.arange(0, K)
        c_v = (i_block * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        c_b = c_v if DECAY == "value" else tl.arange(0, N)

        # Pointers to this row and head of tensors (B, T, heads, size); the loop adds the steps
        q += (i_b * T * HQ + i_h // (H // HQ)) * K + c_k[None, :]
        k += (i_b * T * HK + i_h // (H // HK)) * K + c_k[None, :]
        v += (i_b * T * HV + i_h // (H // HV)) * V + c_v[None, :]
        b += (i_b * T * HB + i_h // (H // HB)) * N + c_b[None, :]
        state += i_b * state_b + i_h * state_h + c_k[:, None] * state_k + c_v[None, :] * state_v
        S = tl.load(state)

        same = t[:, None] == t[None, :]
        earlier = t[:, None] < t[None, :] if REVERSE else t[:, None] > t[None, :]
        for i in range(chunks):
            # The chunk starts at t0 and has n real steps
            t0 = (chunks - 1 - i if REVERSE else i) * L
            n = tl.minimum(T - t0, L).to(tl.int32)
            real = t[:, None] < n

            # Load it. Steps past the end repeat the last b: 0 would give e^(+large) * 0 in reverse time
            q_t = tl.load(q + t0 * (HQ * K) + t[:, None] * (HQ * K), mask=real, other=0.0)
            k_t = tl.load(k + t0 * (HK * K) + t[:, None] * (HK * K), mask=real, other=0.0)
            v_t = tl.load(v + t0 * (HV * V) + t[:, None] * (HV * V), mask=real, other=0.0)
            b_t = tl.load(b + t0 * (HB * N) + tl.minimum(t, n - 1)[:, None] * (HB * N))
            b_L = tl.load(b + (t0 + n - 1) * (HB * N))  # (1, N)
            c_in = tl.exp2(b_L - b_t if REVERSE else b_t)
            c_out = tl.exp2(b_t if REVERSE else b_L - b_t)

            # y (L, BLOCK): what q reads from the state that enters and from the steps s before t
            if DECAY == "scalar":
                gap = tl.trans(b_t) - b_t if REVERSE else b_t - tl.trans(b_t)
                A = tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
                qk_same = tl.sum(tl.where(same, A, 0.0), 1, keep_dims=True)
                A *= tl.exp2(tl.where(earlier, gap, float("-inf")))  # mask the exponent, then exponentiate
                y = tl.dot(q_t, S.to(dtype), input_precision="ieee") * c_in
                y = tl.dot(A.to(dtype), v_t, y, input_precision="ieee")
            elif DECAY == "key":
                A = tl.zeros((L, L), tl.float32)
                qk_same = tl.sum(q_t.to(tl.float32) * k_t, 1, keep_dims=True)
                for level in tl.static_range(LEVELS):
                    to_mid, parted = halves(b, t, t0, n, b_t, HB * N, 1 << level, earlier)
                    scores = tl.dot(
                        (q_t * to_mid).to(dtype), tl.trans((k_t * to_mid).to(dtype)), input_precision="ieee"
                    )
                    A += tl.where(parted, scores, 0.0)
                y = tl.dot((q_t * c_in).to(dtype), S.to(dtype), input_precision="ieee")
                y = tl.dot(A.to(dtype), v_t, y, input_precision="ieee")
            else:
                A = tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
                qk_same = tl.sum(tl.where(same, A, 0.0), 1, keep_dims=True)
                y = tl.dot(q_t, S.to(dtype), input_precision="ieee") * c_in
                for level in tl.static_range(LEVELS):
                    to_mid, parted = halves(b, t, t0, n, b_t, HB * N, 1 << level, earlier)
                    A_mid = tl.where(parted, A, 0.0).to(dtype)
                    y += tl.dot(A_mid, (v_t * to_mid).to(dtype), input_precision="ieee") * to_mid

            # For d log a, x * y. Then the output, to which step t itself adds (q_t . k_t) v_t
            if x is not None:
                p_x = ((i_b * T + t0) * HX + i_h // (H // HX)) * V + t[:, None] * (HX * V) + c_v[None, :]
                x_y = y * tl.load(x + p_x, mask=real, other=0.0)
                row = (i_b * T + t0) * H + i_h + t[:, None] * H
                if DECAY == "scalar":
                    tl.store(x_o + row * BLOCKS + i_block, tl.sum(x_y, 1, keep_dims=True), mask=real)
                else:
                    tl.store(x_o + row * V + c_v[None, :], x_y, mask=real)
            y += qk_same * v_t
            p_o = ((i_b * T + t0) * H + i_h) * V + t[:, None] * (H * V) + c_v[None, :]
            tl.store(o + p_o, y.to(dtype), mask=real)

            # The state decays to the end of the chunk and takes in k v^T, in role dq without that of step T
            if x is not None and not REVERSE:
                k_t = tl.where(t0 + t[:, None] < T - 1, k_t, 0.0)
            if DECAY == "key":
                S *= tl.trans(tl.exp2(b_L))
                k_t = (k_t * c_out).to(dtype)
            else:
                S *= tl.exp2(b_L)
                v_t = (v_t * c_out).to(dtype)
            S = tl.dot(tl.trans(k_t), v_t, S, input_precision="ieee")

        tl.store(final + ((i_b * H + i_h) * K + c_k[:, None]) * V + c_v[None, :], S)

    @triton.jit
    def halves(b, t, t0, n, b_t, stride, half, earlier):
        """One level of decayed_scores: the decay (L, N) between each step and its midpoint, and a mask (L, L)
        of the pairs s, t that a midpoint parts."""
        pair = t // (2 * half)
        second = t % (2 * half) >= half
        mid = tl.minimum(pair * (2 * half) + half - 1, n - 1)
        b_mid = tl.load(b + t0 * stride + mid[:, None] * stride)
        to_mid = tl.exp2(tl.where(second[:, None], b_t - b_mid, b_mid - b_t))
        return to_mid, earlier & (pair[:, None] == pair[None, :]) & (second[:, None] != second[None, :])

    INTERPRETED = not isinstance(scan_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set

# ---- 7. Which of the three ----

BACKENDS = {"recurrent": recurrent_scan, "chunked": chunked_scan, "triton": triton_scan}


def choose_backend(device, dtype, K, V):
    """The name of the fastest scan for such inputs, and the reason in words."""
    if device.type == "cuda" and not torch.version.hip:
        if triton is None:
            return "chunked", "the triton package is not installed"
        if dtype not in KERNEL_DTYPES or K > MAX_K:
            return "chunked", f"the kernel takes no {dtype} with K = {K}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "chunked", "the kernel needs a GPU of compute capability 8.0"
        return "triton", "one fused kernel on NVIDIA GPUs"
    if V == 1:  # Mamba-1: chunks would make L^2 scores for L numbers of v
        return "recurrent", "with V = 1 chunks cost more than they save"
    return "chunked", "matmuls in plain PyTorch run on any device"


def scan(q, k, v, log_a, state=None, backend=None):
    """The scan of BACKENDS that is called `backend`; None takes the one of choose_backend."""
    if backend is None:
        backend, _ = choose_backend(q.device, q.dtype, q.shape[3], v.shape[3])
    with torch.autocast(q.device.type, enabled=False):  # the sums and the state stay in float32
        return BACKENDS[backend](q, k, v, log_a, state)
