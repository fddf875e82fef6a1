"""The one recurrence behind four layers: step by step, in chunks and, without beta, as one GPU kernel.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in [0, 1]

    B  batch       G  groups: head h reads q, k of group h*G//H       K  key size of a head (Mamba-2: d_state)
    T  length      H  heads      J  heads of a group, H/G             V  value size (Mamba-2: headdim)
    L  steps of a chunk

    q, k    (B, T, G, K)                v  (B, T, H, V)
    log_a   (B, T, H)    one decay per head (Mamba-2, Gated DeltaNet), or
            (B, T, H, K) one decay per key channel (GLA, Mamba-1)
    beta    (B, T, H)    one beta per head (Gated DeltaNet); None means no delta rule
    state   (B, H, K, V) the S before the first step; None means zeros

log_a is never positive; below -30, -inf included, it counts as -30 and forgets all but e^-30 of the state.
States are float32, or float64 where the inputs are.

With beta, a step follows the delta rule. It writes w_t instead of v_t:

    w_t = beta_t (v_t - (diag(a_t) S_{t-1})^T k_t)

So it writes only beta_t of the difference between v_t and what k_t reads from the decayed state. A step does
not enlarge the old state while 0 <= beta_t |k_t|^2 <= 2.

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

MIN_LOG_A = -30.0  # e^-30 is about 1e-13, below the precision of float32: the old state no longer counts


def prepare(q, k, v, log_a, state, beta=None):
    """Assert that the shapes fit. Returns log_a, the initial state, and the sizes B, T, G, H, K, V.

    log_a and the state are in the dtype of all sums, float32 or float64. log_a is clamped at MIN_LOG_A,
    because one very negative value would swamp the rest in the sums of chunked_scan, and -inf - -inf is NaN.
    """
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, log_a {tuple(log_a.shape)}"
    assert k.shape == q.shape and v.shape[:2] == (B, T) and T > 0 and H % G == 0, shapes
    assert log_a.shape in ((B, T, H), (B, T, H, K)), shapes
    assert state is None or state.shape == (B, H, K, V), f"{shapes}, state {tuple(state.shape)}"
    assert beta is None or beta.shape == (B, T, H), f"{shapes}, beta {tuple(beta.shape)}"
    assert q.dtype == k.dtype == v.dtype, f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = v.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)
    return log_a.clamp(min=MIN_LOG_A).to(dtype), S, B, T, G, H, K, V


# ---- 2. The definition ----


def recurrent_scan(q, k, v, log_a, state=None, beta=None):
    """The recurrence, one step at a time: the oracle of the tests. Shapes as at the top of this file."""
    log_a, S, B, T, G, H, _, _ = prepare(q, k, v, log_a, state, beta)
    # every head gets the q and k of its group
    q = q.to(S.dtype).repeat_interleave(H // G, dim=2)  # (B, T, H, K)
    k = k.to(S.dtype).repeat_interleave(H // G, dim=2)
    a = log_a.exp().reshape(B, T, H, -1, 1)  # (B, T, H, 1 or K, 1)
    betas = [None] * T if beta is None else beta.to(S.dtype).unbind(1)

    # the recurrence; unbind, because the backward of q[:, t] would fill a tensor as large as q at every step
    o = []
    steps = zip(q.unbind(1), k.unbind(1), v.to(S.dtype).unbind(1), a.unbind(1), betas, strict=True)
    for q_t, k_t, v_t, a_t, beta_t in steps:
        S = a_t * S  # (B, H, K, V)
        if beta_t is not None:  # the delta rule: v_t becomes w_t
            read = (S * k_t[..., :, None]).sum(-2)  # (B, H, V)
            v_t = beta_t[..., None] * (v_t - read)  # (B, H, V)
        S = S + k_t[..., :, None] * v_t[..., None, :]
        o.append((S * q_t[..., :, None]).sum(-2))  # (B, H, V)
    return torch.stack(o, 1).to(v.dtype), S


# ---- 3. In chunks ----


def chunked_scan(q, k, v, log_a, state=None, chunk=32, beta=None):
    """The same in matmuls over chunks of about `chunk` steps (SSD, Dao & Gu 2024, section 6). Any T >= 1.

    Let b_t = log a_1 + ... + log a_t inside a chunk of L steps, and let S be the state that enters the chunk:

        o_t = sum_{s <= t} e^(b_t - b_s) (q_t . k_s) v_s + e^(b_t) S^T q_t      inside the chunk + from before
        S'  = e^(b_L) S + sum_s e^(b_L - b_s) k_s v_s^T                         enters the next chunk

    With one decay per key channel, b_t is a vector. Then e^(b_t - b_s) goes inside the sum over channels of
    q_t . k_s, e^(b_t) multiplies q_t, and e^(b_L - b_s) multiplies k_s. No exponent is positive, so nothing
    overflows at any decay.

    With beta, w_t takes the place of v_t in both lines. Its definition, with the w of the chunk on the left:

        w_t + sum_{s < t} beta_t e^(b_t - b_s) (k_t . k_s) w_s = beta_t v_t - beta_t e^(b_t) S^T k_t

    These are L linear equations. Their matrix is lower triangular with ones on the diagonal. Its inverse
    turns the rows beta_t v_t into from_v, and the rows beta_t e^(b_t) k_t into from_k, in all chunks at once
    and without S. Once S is known, the rows of from_v - from_k S are the w_t (Yang et al., NeurIPS 2024).
    """
    log_a, S, B, T, G, H, K, V = prepare(q, k, v, log_a, state, beta)
    out_dtype, dtype = v.dtype, S.dtype

    # The heads of a group share the matmuls of its q and k, unless every head needs a q and k of its own: one
    # decay per key channel multiplies them, and with beta each head has a triangular matrix of its own
    per_channel = log_a.dim() == 4
    own_qk = per_channel or beta is not None
    if own_qk and G < H:
        q = q.repeat_interleave(H // G, dim=2)
        k = k.repeat_interleave(H // G, dim=2)
        G = H
    J = H // G  # heads of a group
    v = v.unflatten(2, (G, J))  # (B, T, G, J, V)
    S = S.unflatten(1, (G, J)).transpose(2, 3)  # (B, G, K, J, V), to be read by one matmul for J heads
    log_a = log_a.reshape(B, T, G, -1)  # (B, T, G, J or K)

    # 1. Cut T into n chunks of equal length L. Steps of zeros in front fill up the first chunk: k = 0 writes
    #    nothing and log_a = 0 forgets nothing
    L = math.ceil(T / math.ceil(T / chunk))  # as many chunks as needed, all as short as possible
    if per_channel:
        L = 1 << (L - 1).bit_length()  # the next power of two, for decayed_scores
    n = math.ceil(T / L)
    padding = n * L - T

    def cut(x):
        """(B, T, G, ...) -> (B, n, G, L, ...)"""
        x = x.to(dtype)
        if padding:
            x = torch.cat([x.new_zeros(B, padding, *x.shape[2:]), x], 1)
        return x.unflatten(1, (n, L)).transpose(2, 3)

    q, k = cut(q), cut(k)  # (B, n, G, L, K)
    v, log_a = cut(v), cut(log_a)  # (B, n, G, L, J, V), (B, n, G, L, J or K)
    b = log_a.cumsum(3)
    # b_L - b_s; F.pad adds a constant 0 at s = L, because gradients of b_L - b_L cancel only up to rounding
    b_to_end = F.pad(b[..., -1:, :] - b[..., :-1, :], (0, 0, 0, 1))

    # 2. Compute the decayed scores q_t . k_s inside a chunk; q_in, which reads the state that enters; k_out
    #    and v_out, which write the state that leaves. With beta, step 3 replaces v_out
    if own_qk:  # q and k take the decays
        scores = decayed_scores(q, k, b)[:, :, :, None]  # (B, n, G, 1, L, L)
        q_in = q * b.exp()
        k_out = k * b_to_end.exp()
        v_out = v
    else:  # v and, in step 5, the output take the decays, because the heads share q and k
        b_by_head = b.transpose(3, 4)[..., None]  # (B, n, G, J, L, 1)
        scores = decayed_scores(q[:, :, :, None], k[:, :, :, None], b_by_head)  # (B, n, G, J, L, L)
        q_in = q
        k_out = k
        v_out = v * b_to_end.exp()[..., None]
    state_decay = b[..., -1, :].exp().reshape(B, n, G, -1, J, 1)  # (B, n, G, 1 or K, J, 1)

    # 3. The delta rule: solve for from_v and from_k of w = from_v - from_k S. J is 1. unitriangular takes 1
    #    for the diagonal, so beta_t k_t . k_t, which stands there, is not read
    from_k = [None] * n  # one for each chunk
    if beta is not None:
        beta = cut(beta[..., None])  # (B, n, G, L, 1)
        system = beta * decayed_scores(k, k, b)  # (B, n, G, L, L)
        right = beta * torch.cat([v.squeeze(4), k * b.exp()], -1)  # (B, n, G, L, V + K)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        from_v, from_k = solved.split([V, K], -1)
        v_out = from_v.unsqueeze(4)  # (B, n, G, L, 1, V)
        from_k = from_k.unbind(1)  # (B, G, L, K) each

    # 4. From chunk to chunk: q reads the state that enters, then the state decays and takes in k v^T, or with
    #    beta k w^T
    before = []
    written = []
    steps = zip(q_in.unbind(1), k_out.unbind(1), v_out.unbind(1), state_decay.unbind(1), from_k, strict=True)
    for q_i, k_i, v_i, decay_i, from_k_i in steps:
        before.append(q_i @ S.flatten(3))  # (B, G, L, J * V)
        v_i = v_i.flatten(3)  # (B, G, L, J * V)
        if beta is not None:
            v_i = v_i - from_k_i @ S.flatten(3)  # the w of this chunk
            written.append(v_i)
        added = (k_i.mT @ v_i).unflatten(3, (J, V))  # (B, G, K, J, V)
        S = torch.addcmul(added, decay_i, S)  # decay_i * S + added, in one pass
    before = torch.stack(before, 1).unflatten(4, (J, V))  # (B, n, G, L, J, V)
    if beta is not None:
        v = torch.stack(written, 1).unsqueeze(4)  # w in place of v, (B, n, G, L, 1, V)

    # 5. The output: inside the chunk + from before
    inside = (scores @ v.transpose(3, 4)).transpose(3, 4)  # (B, n, G, L, J, V)
    if own_qk:
        o = inside + before
    else:
        o = torch.addcmul(inside, before, b.exp()[..., None])
    o = o.transpose(2, 3).reshape(B, n * L, H, V)[:, padding:]
    return o.to(out_dtype), S.transpose(2, 3).reshape(B, H, K, V)


def decayed_scores(q, k, b):
    """The sum over K of q_t e^(b_t - b_s) k_s where s <= t, else 0: (..., L, L).

    q, k: (..., L, K); b: (..., L, 1 or K). One decay for all channels multiplies the finished q_t . k_s. With
    one per channel, e^(b_t - b_s) cannot be computed as e^(b_t) e^(-b_s): with strong decay e^(-b_s)
    overflows. Instead halve the chunk, and its halves, down to single steps, and call all of them pieces. For
    every s < t there is one piece with s in its first half and t in its second. With m the last step of the
    first half, no exponent in e^(b_t - b_m) e^(b_m - b_s) is positive. So all pieces of one size take one
    batched matmul: the q of second halves with the k of first halves. L is a power of two, here 8:

               s  0  1  2  3  4  5  6  7
        t = 0     x
            1     1  x
            2     2  2  x                     x  s = t, which needs no decay
            3     2  2  1  x                  1  half = 1,  m = 0, 2, 4, 6
            4     4  4  4  4  x               2  half = 2,  m = 1, 5
            5     4  4  4  4  1  x            4  half = 4,  m = 3
            6     4  4  4  4  2  2  x
            7     4  4  4  4  2  2  1  x
    """
    if b.shape[-1] == 1:
        # tril(-1) before exp: where s >= t the exponent becomes 0, so that no e^(+large) overflows. The tril
        # of q @ k.mT makes the scores with s > t zero
        return (q @ k.mT).tril() * (b - b.mT).tril(-1).exp()
    L = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # (..., L, 1, 1): the diagonal, as L blocks of one step
    half = 1
    while half < L:
        # cut the chunk into pieces of two halves; the second half reads what the first half wrote
        shape = (L // (2 * half), 2, half)  # pieces, first or second half, steps
        b_first, b_second = b.unflatten(-2, shape).unbind(-3)  # (..., pieces, half, K)
        b_mid = b_first[..., -1:, :]  # (..., pieces, 1, K)
        _, q_second = q.unflatten(-2, shape).unbind(-3)
        k_first, _ = k.unflatten(-2, shape).unbind(-3)
        q_second = q_second * (b_second - b_mid).exp()
        k_first = k_first * (b_mid - b_first).exp()
        lower = q_second @ k_first.mT  # (..., pieces, half, half)
        # the block of a piece has the blocks of its halves on its diagonal, and `lower` below it
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)  # (..., pieces, half, half)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        scores = torch.cat([top, torch.cat([lower, second], -1)], -2)  # (..., pieces, 2 * half, 2 * half)
        half *= 2
    return scores.squeeze(-3)


# ---- 4. The gradients: the same scan with its roles swapped ----


class TritonScan(torch.autograd.Function):
    """The scan and its gradients, for inputs that triton_scan has padded; log_a is (B, T, H, 1 or K).

    Let dO_t be the gradient that arrives at o_t, dS_t the whole gradient of S_t, and R_t its part from later
    steps; R_T arrives at the final state. Differentiating the recurrence gives

        dS_t = q_t dO_t^T + R_t        R_{t-1} = diag(a_t) dS_t        (R_0 is the initial state's gradient)
        dq_t = S_t dO_t        dk_t = dS_t v_t        dv_t = dS_t^T k_t

    The first line is the recurrence again, in reverse time. The second line reads a state in the way that
    o_t = S_t^T q_t does. So one kernel, "add k v^T to a decaying state and read it with q", has four roles:

        role      q    k    v    starts from      time     decay_of   output
        forward   q    k    v    S_0              forward  key        o, and S_T as its final state
        dq        dO   v    k    S_0 transposed   forward  value      dq
        dk        v    dO   q    R_T transposed   reverse  value      dk
        dv        k    q    dO   R_T              reverse  key        dv, and R_0 as its final state

    In the roles dq and dk the state is transposed, so a decay per key channel becomes one per value channel
    of the kernel: decay_of = "value". One decay per head acts on the whole state, in all roles: "head".
    """

    @staticmethod
    def forward(ctx, q, k, v, log_a, state, tile):
        # b_t as in chunked_scan, for all launches; in base 2, because a GPU computes 2^x faster than e^x.
        # Steps with log_a = 0 fill up the last chunk
        T, chunk = log_a.shape[1], tile[0]
        b = F.pad(log_a * math.log2(math.e), (0, 0, 0, 0, 0, -T % chunk))
        b = b.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2).contiguous()
        q, k, v, state = q.contiguous(), k.contiguous(), v.contiguous(), state.contiguous()
        o, final, _ = launch(q, k, v, b, state, tile)
        ctx.save_for_backward(q, k, v, b, state)
        ctx.tile = tile
        return o, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, b, state = ctx.saved_tensors
        do = do.contiguous()
        # with x, launch also returns x * output without s = t
        dq, _, q_dq = launch(do, v, k, b, state.mT, ctx.tile, x=q)
        dk, _, k_dk = launch(v, do, q, b, dfinal.mT, ctx.tile, x=k, reverse=True)
        dv, dstate, _ = launch(k, q, do, b, dfinal, ctx.tile, reverse=True)

        # a_t multiplies S_{t-1}, so d log a_t = diag(a_t) S_{t-1} * dS_t = S_{t-1} * R_{t-1}, summed over V.
        # At t = 1 both factors are known: the initial state and its gradient. From there on, step t adds k_dk
        # and subtracts q_dq:
        #     sum(S_t * R_t) = sum(S_{t-1} * R_{t-1}) + k_t * (R_t v_t) - q_t * (diag(a_t) S_{t-1} dO_t)
        # Both leave out what step t itself writes and reads, which would cancel, but only up to rounding
        initial = (state * dstate).sum(3)[:, None]  # (B, 1, H, K)
        if b.shape[3] == 1:  # one decay per head: sum over K, which q_dq and k_dk have as blocks of columns
            initial, q_dq, k_dk = (x.sum(3, keepdim=True) for x in (initial, q_dq, k_dk))
        dlog_a = torch.cat([initial, (k_dk - q_dq)[:, :-1]], 1).cumsum(1)
        return sum_heads(dq, q), sum_heads(dk, k), dv, sum_heads(dlog_a, b), dstate, None


def sum_heads(gradient, x):
    """(B, T, H, size) -> (B, T, heads of x, size): the heads that share x add their gradients."""
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)


# ---- 5. The launch ----

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_K = 256  # the registers of a GPU have no room for more


def triton_scan(q, k, v, log_a, state=None, tile=None, beta=None):
    """The recurrence as one GPU kernel that also computes its gradients. Shapes as at the top of this file.

    q, k, v are float32, bfloat16 or float16; sums, decays and states are float32. K is at most 256.
    tile: (chunk, block, warps, stages), which choose_tile explains; None calls it
    beta: None, because the kernel does not know the delta rule
    On a CPU the kernel runs only in Triton's interpreter.
    """
    assert beta is None, "the kernel does not know the delta rule: use chunked_scan"
    log_a, state, B, T, _, H, K, V = prepare(q, k, v, log_a, state)
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
    log_a = pad_last(log_a, K_padded) if per_channel else log_a[..., None]
    state = F.pad(state, (0, parts * V_padded - V, 0, K_padded - K)).unflatten(3, (parts, V_padded))
    state = state.transpose(2, 3).flatten(1, 2)  # (B, H * parts, K_padded, V_padded)

    # run it, and undo the padding
    tile = tile or choose_tile(q, v, per_channel)
    o, final = TritonScan.apply(q, k, v, log_a, state, tile)
    final = final.unflatten(1, (H, parts)).transpose(2, 3).flatten(3)  # (B, H, K_padded, parts * V_padded)
    return o.reshape(B, T, H, parts * V_padded)[..., :V], final[:, :, :K, :V]


def pad_last(x, size):
    """Fill up the last axis with zeros to a size. F.pad would copy even when there is nothing to add."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def choose_tile(q, v, per_channel):
    """(chunk, block, warps, stages) for padded q and v.

    A program, one instance of the kernel, takes `chunk` steps at a time and owns `block` columns of the
    state; both are powers of two from 16 on. It runs in `warps` groups of 32 threads, and with 2 stages it
    loads a chunk while it computes another. These choices keep the state in registers and need at most the
    99 KB of shared memory that small GPUs have.
    """
    B, _, H, V = v.shape
    K = q.shape[3]
    float32 = q.dtype == torch.float32
    chunk = 16 if float32 or per_channel else 64
    block = 16 if float32 else 32
    warps = 8 if float32 or K > 128 else 4
    stages = 1 if float32 else 2
    # few programs leave a GPU idle, so each gets fewer columns
    if q.is_cuda and B * H * V // block < torch.cuda.get_device_properties(q.device).multi_processor_count:
        block = 16
    return chunk, block, warps, stages


def launch(q, k, v, b, state, tile, x=None, reverse=False):
    """Run one role of the table in TritonScan; K and V are those of the role, swapped in dq and dk.

    x: q in role dq, k in role dk, else None. Returns o (B, T, H, V), the final state and, if x is given,
    x * (o without its term s = t): (B, T, H, V), or with one decay per head (B, T, H, V // block), where the
    columns of a block are summed.
    """
    T = v.shape[1]
    B, H, K, V = state.shape
    chunk, block, warps, stages = tile
    block = min(block, V)
    decay_per_channel = "key" if x is None else "value"  # dq and dk have an x, and a transposed state
    decay_of = "head" if b.shape[3] == 1 else decay_per_channel
    o = v.new_empty(B, T, H, V)
    final = state.new_empty(B, H, K, V)
    x_o = None if x is None else b.new_empty(B, T, H, V // block if decay_of == "head" else V)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        scan_kernel[(B * H * (V // block),)](
            q, k, v, b, state, o, final, x, x_o, T, *state.stride(),
            H=H, HQ=q.shape[2], HK=k.shape[2], HV=v.shape[2], HB=b.shape[2], K=K, V=V, N=b.shape[3],
            L=chunk, BLOCK=block, LEVELS=int(math.log2(chunk)), REVERSE=reverse, DECAY_OF=decay_of,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return o, final, x_o


# ---- 6. The kernel ----
if triton is not None:

    @triton.jit(do_not_specialize=["T"])  # one compilation for all T
    def scan_kernel(
        q, k, v, b, state, o, final, x, x_o, T, state_b, state_h, state_k, state_v,
        H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr,
        K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
        LEVELS: tl.constexpr, REVERSE: tl.constexpr, DECAY_OF: tl.constexpr,
    ):  # fmt: skip
        """One role of the table in TritonScan; q, k, v and o mean what they mean in that role.

        There are H heads of the state; q has HQ heads, k has HK, v and x have HV, and b has HB. b has N
        columns: 1, K or V. A chunk has L = 2^LEVELS steps. A program owns BLOCK columns of the state of one
        head. It walks through the chunks and keeps its piece of the state in registers. No two programs write
        to the same place, so every run gives the same bits. A chunk follows the two lines of chunked_scan. In
        reverse time, too, s runs over t and the steps that the role reaches before t. The decays, in base 2:

                      from s to t      d_in: from the S that enters to t    d_out: from s to the S that leaves
            forward   2^(b_t - b_s)    2^(b_t)                              2^(b_L - b_s)
            reverse   2^(b_s - b_t)    2^(b_L - b_t)                        2^(b_s)

        If x is given, x_o gets x * o without s = t. All matmuls are "ieee": float32 stays float32, not TF32.
        """
        # Which row of the batch, head and columns are this program's. The grid has one axis, because a GPU
        # limits a second and a third one to 65535. pid is int64, because offsets in large tensors pass 2^31
        BLOCKS: tl.constexpr = V // BLOCK
        in_dtype: tl.constexpr = q.dtype.element_ty  # what the matmuls take; they add in float32
        pid = tl.program_id(0).to(tl.int64)
        i_block, i_h, i_b = pid % BLOCKS, pid // BLOCKS % H, pid // (BLOCKS * H)
        chunks = tl.cdiv(T.to(tl.int64), L)
        t = tl.arange(0, L)
        col_k = tl.arange(0, K)
        col_v = (i_block * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        col_b = col_v if DECAY_OF == "value" else tl.arange(0, N)

        # Pointers to this row and head of tensors (B, T, heads, size), where b has whole chunks, chunks * L
        # steps, instead of T; the loop adds the steps
        q += (i_b * T * HQ + i_h // (H // HQ)) * K + col_k[None, :]
        k += (i_b * T * HK + i_h // (H // HK)) * K + col_k[None, :]
        v += (i_b * T * HV + i_h // (H // HV)) * V + col_v[None, :]
        b += (i_b * chunks * L * HB + i_h // (H // HB)) * N + col_b[None, :]
        state += i_b * state_b + i_h * state_h + col_k[:, None] * state_k + col_v[None, :] * state_v
        S = tl.load(state)

        same = t[:, None] == t[None, :]
        earlier = t[:, None] < t[None, :] if REVERSE else t[:, None] > t[None, :]
        for i in range(chunks):
            # Load the chunk from t0 on: q_c, k_c (L, K), v_c (L, BLOCK), b_c (L, N) and b_L (1, N); a decay
            # per column has BLOCK instead of N. Past the end of T, q, k and v are 0, and b repeats its last
            # value
            t0 = (chunks - 1 - i if REVERSE else i) * L
            real = t[:, None] < (T - t0).to(tl.int32)
            q_c = tl.load(q + t0 * (HQ * K) + t[:, None] * (HQ * K), mask=real, other=0.0)
            k_c = tl.load(k + t0 * (HK * K) + t[:, None] * (HK * K), mask=real, other=0.0)
            v_c = tl.load(v + t0 * (HV * V) + t[:, None] * (HV * V), mask=real, other=0.0)
            b_c = tl.load(b + t0 * (HB * N) + t[:, None] * (HB * N))
            b_L = tl.load(b + (t0 + L - 1) * (HB * N))
            d_in = tl.exp2(b_L - b_c if REVERSE else b_c)
            d_out = tl.exp2(b_c if REVERSE else b_L - b_c)

            # y (L, BLOCK): what q reads from the state that enters and from the steps s before t
            if DECAY_OF == "head":
                gap = tl.trans(b_c) - b_c if REVERSE else b_c - tl.trans(b_c)  # (L, L), because N is 1
                gap = tl.where(earlier, gap, float("-inf"))  # before exp2, because 2^(+large) * 0 is NaN
                scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
                qk_same = tl.sum(tl.where(same, scores, 0.0), 1, keep_dims=True)
                scores *= tl.exp2(gap)
                y = tl.dot(q_c, S.to(in_dtype), input_precision="ieee") * d_in
                y = tl.dot(scores.to(in_dtype), v_c, y, input_precision="ieee")
            elif DECAY_OF == "key":
                # as in decayed_scores: to_mid is the decay between a step and the midpoint of its piece, and
                # `across` says which s and t are in different halves
                scores = tl.zeros((L, L), tl.float32)
                qk_same = tl.sum(q_c.to(tl.float32) * k_c, 1, keep_dims=True)
                for level in tl.static_range(LEVELS):
                    to_mid, across = halves(b + t0 * (HB * N), b_c, HB * N, t, 1 << level, earlier)
                    q_mid = (q_c * to_mid).to(in_dtype)
                    k_mid = (k_c * to_mid).to(in_dtype)
                    level_scores = tl.dot(q_mid, tl.trans(k_mid), input_precision="ieee")
                    scores += tl.where(across, level_scores, 0.0)
                y = tl.dot((q_c * d_in).to(in_dtype), S.to(in_dtype), input_precision="ieee")
                y = tl.dot(scores.to(in_dtype), v_c, y, input_precision="ieee")
            else:
                # a decay per column: v_s decays to the midpoint, and the sum over s decays from there to t
                scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
                qk_same = tl.sum(tl.where(same, scores, 0.0), 1, keep_dims=True)
                y = tl.dot(q_c, S.to(in_dtype), input_precision="ieee") * d_in
                for level in tl.static_range(LEVELS):
                    to_mid, across = halves(b + t0 * (HB * N), b_c, HB * N, t, 1 << level, earlier)
                    level_scores = tl.where(across, scores, 0.0).to(in_dtype)
                    v_mid = (v_c * to_mid).to(in_dtype)
                    y += tl.dot(level_scores, v_mid, input_precision="ieee") * to_mid

            # Store x * y for d log a. Then add the step's own (q_t . k_t) v_t, and store the output
            row = (i_b * T + t0) * H + i_h + t[:, None] * H  # in o and x_o
            if x is not None:
                p_x = ((i_b * T + t0) * HV + i_h // (H // HV)) * V + t[:, None] * (HV * V) + col_v[None, :]
                x_y = y * tl.load(x + p_x, mask=real, other=0.0)
                if DECAY_OF == "head":
                    tl.store(x_o + row * BLOCKS + i_block, tl.sum(x_y, 1, keep_dims=True), mask=real)
                else:
                    tl.store(x_o + row * V + col_v[None, :], x_y, mask=real)
            y += qk_same * v_c
            tl.store(o + row * V + col_v[None, :], y.to(in_dtype), mask=real)

            # The state decays and takes in k v^T
            if DECAY_OF == "key":
                S *= tl.trans(tl.exp2(b_L))
                k_c = (k_c * d_out).to(in_dtype)
            else:
                S *= tl.exp2(b_L)
                v_c = (v_c * d_out).to(in_dtype)
            S = tl.dot(tl.trans(k_c), v_c, S, input_precision="ieee")

        tl.store(final + ((i_b * H + i_h) * K + col_k[:, None]) * V + col_v[None, :], S)

    @triton.jit
    def halves(b, b_c, stride, t, half, earlier):
        """For the pieces of 2 * half steps of decayed_scores: the decay, shaped as b_c, between each step and
        its midpoint, and a mask (L, L) of the s, t in different halves of one piece. b: where b_c begins"""
        piece = t // (2 * half)
        second = t % (2 * half) >= half
        mid = piece * (2 * half) + half - 1
        b_mid = tl.load(b + mid[:, None] * stride)
        to_mid = tl.exp2(tl.where(second[:, None], b_c - b_mid, b_mid - b_c))
        return to_mid, earlier & (piece[:, None] == piece[None, :]) & (second[:, None] != second[None, :])

    # Triton was imported with TRITON_INTERPRET set, so the kernel runs on a CPU, slowly
    INTERPRETED = not isinstance(scan_kernel, triton.JITFunction)

# ---- 7. Which of the three ----

BACKENDS = {"recurrent": recurrent_scan, "chunked": chunked_scan, "triton": triton_scan}


def choose_backend(device, dtype, K, V, delta_rule=False):
    """The name of the fastest scan for such inputs, and the reason in words. delta_rule: is there a beta?"""
    if device.type == "cuda" and not torch.version.hip:
        if delta_rule:
            return "chunked", "the kernel does not know the delta rule"
        if triton is None:
            return "chunked", "the triton package is not installed"
        if dtype not in KERNEL_DTYPES or K > MAX_K:
            return "chunked", f"the kernel takes no {dtype} with K = {K}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "chunked", "the kernel needs a GPU of compute capability 8.0 or higher"
        return "triton", "one fused kernel on NVIDIA GPUs"
    if V == 1:  # Mamba-1: a chunk would compute L^2 scores to mix only L numbers
        return "recurrent", "with V = 1 chunks cost more than they save"
    return "chunked", "matmuls in plain PyTorch run on any device"


def scan(q, k, v, log_a, state=None, backend=None, beta=None):
    """Run BACKENDS[backend], or if None the scan that choose_backend names."""
    if backend is None:
        backend, _ = choose_backend(q.device, q.dtype, q.shape[3], v.shape[3], beta is not None)
    with torch.autocast(q.device.type, enabled=False):  # the sums and the state stay in float32
        return BACKENDS[backend](q, k, v, log_a, state, beta=beta)
