"""The one recurrence behind Mamba-2, GLA and Mamba-1, by definition and in chunks.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in (0, 1]

    B  batch                  G  groups: heads h*G//H share q and k      K  key size of a head (Mamba-2: d_state N)
    T  length                 H  heads                                   V  value size of a head (Mamba-2: headdim P)

    q, k    (B, T, G, K)                v  (B, T, H, V)
    log_a   (B, T, H)    one decay per head (Mamba-2), or
            (B, T, H, K) one decay per key channel (GLA, Mamba-1); never positive
    state   (B, H, K, V) the S that the first step starts from, never below float32; None means zeros

Every function returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V)); gradients reach every input and the
initial state, and flow in from the final state. Bad shapes raise a ValueError that names the argument.
"""

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; everything but triton_scan works without
    triton = None


def _check(q, k, v, log_a, state):
    """Raise a ValueError that names the argument which does not fit; returns B, T, G, H, K, V."""
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q must be (B, T, G, K) and v (B, T, H, V), got {tuple(q.shape)} and {tuple(v.shape)}"
        )
    (B, T, G, K), (H, V) = q.shape, v.shape[2:]
    if T < 1:
        raise ValueError(f"q has {T} steps, expected at least one")
    if H % G:
        raise ValueError(f"v has {H} heads, which {G} groups of q cannot share evenly")
    expected = {"k": (k, [(B, T, G, K)]), "v": (v, [(B, T, H, V)])}
    expected |= {"log_a": (log_a, [(B, T, H), (B, T, H, K)])}
    if state is not None:
        expected["state"] = state, [(B, H, K, V)]
    for name, (x, shapes) in expected.items():
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {' or '.join(map(str, shapes))}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device} like q")
    return B, T, G, H, K, V


def recurrent_scan(q, k, v, log_a, state=None):
    """The definition, one step at a time: the oracle of every test. Shapes as at the top of this file."""
    B, T, G, H, K, V = _check(q, k, v, log_a, state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    S = q.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)
    q, k = (x.to(dtype).repeat_interleave(H // G, dim=2) for x in (q, k))
    a = log_a.to(dtype).exp()
    a = a[..., None, None] if a.dim() == 3 else a[..., None]
    o = []
    # unbind, not indexing: the gradient of x[:, t] is a full-size tensor of zeros at every step
    for q_t, k_t, v_t, a_t in zip(*(x.unbind(1) for x in (q, k, v.to(dtype), a)), strict=True):
        S = a_t * S + k_t[..., :, None] * v_t[..., None, :]
        o.append((S * q_t[..., :, None]).sum(-2))
    return torch.stack(o, 1).to(v.dtype), S


def _scores_vector(q, k, b):
    """Scores sum_K q_t e^(b_t - b_s) k_s for s <= t, else 0: (..., L, K) -> (..., L, L), L a power of two.

    e^(b_t - b_s) does not factor into e^(b_t) e^(-b_s): with strong decay the second overflows. But every pair s < t is
    parted by exactly one midpoint m of the halves, quarters, ... of the chunk, and e^(b_t - b_m) e^(b_m - b_s) has no
    positive exponent. So: log2(L) levels, each a matmul, exact at any decay; s = t needs no decay at all.
    """
    *lead, L, K = q.shape
    scores = (q * k).sum(-1).view(*lead, L, 1, 1)
    half = 1
    while half < L:
        q_, k_, b_ = (x.reshape(*lead, L // (2 * half), 2, half, K) for x in (q, k, b))
        b_mid = b_[..., 0, -1:, :]
        lower_q = q_[..., 1, :, :] * (b_[..., 1, :, :] - b_mid).exp()
        lower_k = k_[..., 0, :, :] * (b_mid - b_[..., 0, :, :]).exp()
        lower = lower_q @ lower_k.transpose(-1, -2)
        first, second = scores.unflatten(-3, (-1, 2)).unbind(-3)
        top = torch.cat([first, torch.zeros_like(first)], -1)
        scores = torch.cat([top, torch.cat([lower, second], -1)], -2)
        half *= 2
    return scores.squeeze(-3)


def chunked_scan(q, k, v, log_a, state=None, chunk=32):
    """The same in matmuls over chunks of at most `chunk` steps (SSD, Dao & Gu 2024, section 6). Any T >= 1.

    With b_t = log a_1 + ... + log a_t inside a chunk of length L and S the state that enters it:

        o_t = sum_{s <= t} e^(b_t - b_s) (q_t . k_s) v_s + e^(b_t) S^T q_t          inside + from before
        S'  = e^(b_L) S + sum_s e^(b_L - b_s) k_s v_s^T                             to the next chunk

    No exponent is positive, so nothing overflows at any decay. Plain autograd. Shapes as at the top of this file.
    """
    B, T, G, H, K, V = _check(q, k, v, log_a, state)
    dtype, out_dtype = torch.promote_types(v.dtype, torch.float32), v.dtype
    vector = log_a.dim() == 4
    if vector and G < H:  # heads that share q and k decay apart, channel by channel
        q, k, G = q.repeat_interleave(H // G, 2), k.repeat_interleave(H // G, 2), H
    R = H // G  # heads per group

    n = math.ceil(T / chunk)
    L = math.ceil(T / n)  # chunks of equal length pad least
    if vector:
        L = 1 << (L - 1).bit_length()  # the halving in _scores_vector wants a power of two
        n = math.ceil(T / L)
    pad = (
        n * L - T
    )  # steps with k = 0 and log_a = 0 in front: they change no state, and every chunk ends in a real step

    def chunks(x):  # (B, T, ...) -> (B, n, L, ...)
        x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (pad, 0)) if pad else x.to(dtype)
        return x.unflatten(1, (n, L))

    S = q.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)
    S = S.unflatten(1, (G, R)).transpose(2, 3)  # (B, G, K, R, V): the heads of a group share one matmul
    q, k = (chunks(x).transpose(2, 3) for x in (q, k))  # (B, n, G, L, K)
    v = chunks(v).unflatten(3, (G, R)).transpose(2, 3)  # (B, n, G, L, R, V)
    # (B, n, G, L, K), or (B, n, G, L, R) with one decay per head
    b = chunks(log_a if vector else log_a.unflatten(2, (G, R))).cumsum(2).transpose(2, 3)
    # b_L - b_s, with a constant 0 at s = L: as a difference it would leave rounding noise in the gradient of log_a
    to_end = F.pad(b[..., -1:, :] - b[..., :-1, :], (0, 0, 0, 1))

    if vector:
        scores = _scores_vector(q, k, b)[:, :, :, None]  # (B, n, G, R=1, L, L)
        q_in, k_out = q * b.exp(), k * to_end.exp()
        v_out, keep = v, b[..., -1, :].exp()[..., None, None]  # keep (B, n, G, K, 1, 1)
    else:
        b_ = b.transpose(3, 4)  # (B, n, G, R, L)
        # mask the exponent, then exponentiate: the other order gives inf * 0 = nan in the gradient
        past = torch.ones(L, L, dtype=torch.bool, device=q.device).tril(-1)
        masked = torch.full((L, L), -math.inf, dtype=dtype, device=q.device).triu(
            1
        )  # 0 at s = t, -inf at s > t
        decay = torch.where(past, b_[..., :, None] - b_[..., None, :], masked).exp()
        scores = (q @ k.transpose(-1, -2))[:, :, :, None] * decay  # (B, n, G, R, L, L)
        q_in, k_out = q, k
        v_out = v * to_end.exp()[..., None]
        keep = b[..., -1, :].exp()[..., None, :, None]  # (B, n, G, 1, R, 1)

    added = (k_out.transpose(-1, -2) @ v_out.flatten(4)).unflatten(4, (R, V))  # (B, n, G, K, R, V)
    entering = []
    for keep_i, added_i in zip(keep.unbind(1), added.unbind(1), strict=True):
        entering.append(S)
        S = torch.addcmul(added_i, keep_i, S)
    before = (q_in @ torch.stack(entering, 1).flatten(4)).unflatten(4, (R, V))  # (B, n, G, L, R, V)
    if not vector:
        before = before * b.exp()[..., None]
    inside = (scores @ v.transpose(3, 4)).transpose(3, 4)
    o = (inside + before).transpose(2, 3).reshape(B, n * L, H, V)[:, pad:]
    return o.to(out_dtype), S.transpose(2, 3).reshape(B, H, K, V)


if triton is not None:

    @triton.jit
    def scan_kernel(
        q, k, v, b, enter, o, leave, own, w, anchor, dlog_a,
        T, segment,
        enter_b, enter_s, enter_h, enter_k, enter_v, leave_b, leave_s, leave_h, leave_k, leave_v,
        H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr, HX: tl.constexpr,
        K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
        REVERSE: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One program: one (batch, segment, head, BLOCK value columns), chunk by chunk, the state in registers."""
        BLOCKS: tl.constexpr = V // BLOCK
        dtype: tl.constexpr = q.dtype.element_ty  # of the operands of tl.dot; sums are float32
        pid = tl.program_id(0).to(tl.int64)  # a 1-d grid: the other axes stop at 65535
        i_h = pid // BLOCKS % H
        segments = tl.cdiv(T, segment)
        i_s = pid // (BLOCKS * H) % segments
        i_b = pid // (BLOCKS * H) // segments
        t = tl.arange(0, L)
        c_k = tl.arange(0, K)
        c_v = (pid % BLOCKS * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        start = i_s * segment
        end = tl.minimum(start + segment, T)

        # tensors are (B, T, heads, size): step to this batch and head
        q += (i_b * T * HQ + i_h // (H // HQ)) * K
        k += (i_b * T * HK + i_h // (H // HK)) * K
        v += (i_b * T * HV + i_h // (H // HV)) * V
        if DECAY == "scalar":
            b += i_b * T * HB + i_h // (H // HB)
        elif DECAY == "key":
            b += (i_b * T * HB + i_h // (H // HB)) * K
        else:
            b += (i_b * T * HB + i_h // (H // HB)) * V
        enter += i_b * enter_b + i_s * enter_s + i_h * enter_h
        S = tl.load(enter + c_k[:, None] * enter_k + c_v[None, :] * enter_v).to(tl.float32)
        if anchor is not None:
            tail = tl.load(anchor + ((i_b * segments + i_s) * H + i_h) * V + c_v)
            if DECAY == "scalar":
                tail = tl.sum(tail, 0, keep_dims=True)

        chunks = tl.cdiv(end - start, L)
        for i in range(chunks):
            if REVERSE:
                t0 = start + (chunks - 1 - i) * L
            else:
                t0 = start + i * L
            n = tl.minimum(end - t0, L).to(tl.int32)
            real = t[:, None] < n
            inner = t[:, None] < (end - 1 - t0).to(tl.int32)  # all but the last step of the segment
            q_t = tl.load(q + t0 * (HQ * K) + t[:, None] * (HQ * K) + c_k[None, :], mask=real, other=0.0)
            k_t = tl.load(k + t0 * (HK * K) + t[:, None] * (HK * K) + c_k[None, :], mask=real, other=0.0)
            v_t = tl.load(v + t0 * (HV * V) + t[:, None] * (HV * V) + c_v[None, :], mask=real, other=0.0)
            row = tl.minimum(t, n - 1)  # rows past the end repeat the last b: a 0 would be e^(+large)
            if DECAY == "scalar":
                b_t = tl.load(b + (t0 + row) * HB)[:, None]
                b_L = tl.load(b + (t0 + n - 1) * HB)
            elif DECAY == "key":
                b_t = tl.load(b + t0 * (HB * K) + row[:, None] * (HB * K) + c_k[None, :])
                b_L = tl.load(b + (t0 + n - 1) * (HB * K) + c_k)[:, None]
            else:
                b_t = tl.load(b + t0 * (HB * V) + row[:, None] * (HB * V) + c_v[None, :])
                b_L = tl.load(b + (t0 + n - 1) * (HB * V) + c_v)[None, :]
            if DECAY == "key":
                to_L = tl.trans(b_L) - b_t
            else:
                to_L = b_L - b_t
            if REVERSE:
                c_in, c_out = tl.exp2(to_L), tl.exp2(b_t)
                earlier = t[:, None] < t[None, :]
            else:
                c_in, c_out = tl.exp2(b_t), tl.exp2(to_L)
                earlier = t[:, None] > t[None, :]

            if o is not None:
                # from the state that enters
                if DECAY == "key":
                    y = tl.dot((q_t * c_in).to(dtype), S.to(dtype), input_precision=PRECISION)
                else:
                    y = tl.dot(q_t, S.to(dtype), input_precision=PRECISION) * c_in
                # from the earlier steps of this chunk
                if DECAY == "scalar":
                    gap = b_t - tl.trans(b_t)
                    if REVERSE:
                        gap = -gap
                    decay = tl.exp2(tl.where(earlier, gap, float("-inf")))  # mask, then exponentiate
                    A = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * decay
                    y = tl.dot(A.to(dtype), v_t, y, input_precision=PRECISION)
                else:
                    if DECAY == "key":
                        A = tl.zeros([L, L], dtype=tl.float32)
                    else:
                        A = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
                    for level in tl.static_range(LEVELS):
                        half = 1 << level
                        mid = tl.minimum((t | (2 * half - 1)) - half, n - 1)
                        if DECAY == "key":
                            b_mid = tl.load(b + t0 * (HB * K) + mid[:, None] * (HB * K) + c_k[None, :])
                        else:
                            b_mid = tl.load(b + t0 * (HB * V) + mid[:, None] * (HB * V) + c_v[None, :])
                        second = t & half != 0
                        to_mid = tl.exp2(tl.where(second[:, None], b_t - b_mid, b_mid - b_t))
                        pair = earlier & (t[:, None] // (2 * half) == t[None, :] // (2 * half))
                        pair &= t[:, None] // half != t[None, :] // half
                        if DECAY == "key":
                            q_mid, k_mid = (q_t * to_mid).to(dtype), (k_t * to_mid).to(dtype)
                            A += tl.where(pair, tl.dot(q_mid, tl.trans(k_mid), input_precision=PRECISION), 0.0)
                        else:
                            A_mid, v_mid = tl.where(pair, A, 0.0).to(dtype), (v_t * to_mid).to(dtype)
                            y += tl.dot(A_mid, v_mid, input_precision=PRECISION) * to_mid
                    if DECAY == "key":
                        y = tl.dot(A.to(dtype), v_t, y, input_precision=PRECISION)
                # from the step itself, which no decay touches
                same = tl.sum(q_t.to(tl.float32) * k_t, 1, keep_dims=True)
                p_o = ((i_b * T + t0) * H + i_h) * V + t[:, None] * (H * V) + c_v[None, :]
                tl.store(o + p_o, (y + same * v_t).to(o.dtype.element_ty), mask=real)

            if w is not None:
                x_t = tl.load(
                    own + ((i_b * T + t0) * HX + i_h // (H // HX)) * V + t[:, None] * (HX * V) + c_v[None, :],
                    mask=real, other=0.0,
                )  # fmt: skip
                z = y * x_t
                if DECAY == "scalar":
                    z = tl.sum(z, 1, keep_dims=True)
                    p_w = ((i_b * H + i_h) * BLOCKS + pid % BLOCKS) * T + t0 + t[:, None]
                else:
                    p_w = p_o
                if anchor is None:
                    tl.store(w + p_w, z, mask=real)
                    k_t = tl.where(inner, k_t, 0.0)  # the anchor is the state before the last k v^T
                else:
                    d = tl.load(w + p_w, mask=real, other=0.0) - tl.where(inner, z, 0.0)
                    tl.store(dlog_a + p_w, tl.cumsum(d, 0, reverse=True) + tail[None, :], mask=real)
                    tail += tl.sum(d, 0)

            if DECAY == "key":
                k_t = (k_t * c_out).to(dtype)
            else:
                v_t = (v_t * c_out).to(dtype)
            S = tl.dot(tl.trans(k_t), v_t, S * tl.exp2(b_L), input_precision=PRECISION)

        if leave is not None:
            leave += i_b * leave_b + i_s * leave_s + i_h * leave_h
            tl.store(leave + c_k[:, None] * leave_k + c_v[None, :] * leave_v, S)


def _call(q, k, v, b, enter, o=None, leave=None, own=None, w=None, anchor=None, dlog_a=None, *, decay, reverse=False, tile):  # fmt: skip
    """Launch the kernel: one row of the table above. enter, leave (B, segments, H, K, V) of any strides."""
    (B, segments, H, K, V), T = enter.shape, q.shape[1]
    chunk, block, segment, num_warps = tile
    block = min(block, V)
    scan_kernel[(B * segments * H * (V // block),)](
        q, k, v, b, enter, o, leave, own, w, anchor, dlog_a, T, segment,
        *enter.stride(), *(enter if leave is None else leave).stride(),
        H=H, HQ=q.shape[2], HK=k.shape[2], HV=v.shape[2], HB=b.shape[2], HX=1 if own is None else own.shape[2],
        K=K, V=V, L=chunk, LEVELS=chunk.bit_length() - 1, BLOCK=block,
        REVERSE=reverse, DECAY=decay, PRECISION="ieee", num_warps=num_warps, num_stages=2,
    )  # fmt: skip


def _zeros(like, *shape):
    """One float32 zero seen as `shape`: reading it costs nothing."""
    return like.new_zeros((), dtype=torch.float32).expand(shape)


def _entering(k, v, b, state, decay, tile, reverse=False):
    """The state that enters each segment (B, segments, H, K, V), and the one that leaves the last (None if one segment)."""
    (B, H, K, V), T = state.shape, k.shape[1]
    chunk, _, segment, _ = tile
    segments = triton.cdiv(T, segment)
    if segments == 1:
        return state[:, None], None
    edges = state.new_empty(B, segments + 1, H, K, V)
    enter, leave = (edges[:, 1:], edges[:, :-1]) if reverse else (edges[:, :-1], edges[:, 1:])
    _call(k, k, v, b, _zeros(k, *enter.shape), leave=leave, decay=decay, reverse=reverse, tile=tile)
    b_L = b[:, [min(t, T) - 1 for t in range(chunk, T + chunk, chunk)]]
    a = torch.stack([x.sum(1).exp2() for x in b_L.split(segment // chunk, 1)], 1).repeat_interleave(H // b.shape[2], 2)
    a = a[..., None, None] if decay == "scalar" else a[..., None]
    edges[:, -1 if reverse else 0] = state
    for i in reversed(range(segments)) if reverse else range(segments):
        leave[:, i] += a[:, i] * enter[:, i]
    return enter, edges[:, 0 if reverse else -1].clone()


@torch.library.custom_op("lengthgen::scan_forward", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_a: torch.Tensor, state: torch.Tensor, tile: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    T, chunk = q.shape[1], tile[0]
    b = F.pad(log_a.float() * math.log2(math.e), (0, 0) * (log_a.dim() - 2) + (0, -T % chunk))
    b = b.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2)[:, :T].contiguous()
    decay = "scalar" if b.dim() == 3 else "key"
    enter, final = _entering(k, v, b, state, decay, tile)
    o, leave = torch.empty_like(v), None
    if final is None:
        final = state.new_empty(state.shape)
        leave = final[:, None]
    _call(q, k, v, b, enter, o, leave, decay=decay, tile=tile)
    return o, final, b


@torch.library.custom_op("lengthgen::scan_backward", mutates_args=())
def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor, state: torch.Tensor,
    do: torch.Tensor, dfinal: torch.Tensor, tile: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    B, T, H, K = *v.shape[:3], q.shape[3]
    rows, columns = ("scalar", "scalar") if b.dim() == 3 else ("key", "value")
    S, _ = _entering(k, v, b, state, rows, tile)
    R, dstate = _entering(q, do, b, dfinal, rows, tile, reverse=True)
    leave = None
    if dstate is None:
        dstate = state.new_empty(state.shape)
        leave = dstate[:, None]
    shape = (B, H, K // min(K, tile[1]), T) if rows == "scalar" else (B, T, H, K)
    w, dlog_a = b.new_empty(shape), b.new_empty(shape)
    dq, dk, dv, last = q.new_empty(B, T, H, K), k.new_empty(B, T, H, K), torch.empty_like(v), S.new_empty(S.shape)
    St, Rt = S.transpose(-1, -2), R.transpose(-1, -2)
    _call(do, v, k, b, St, dq, last.transpose(-1, -2), q, w, decay=columns, tile=tile)
    anchor = (last * R).sum(-1)
    _call(v, do, q, b, Rt, dk, None, k, w, anchor, dlog_a, decay=columns, reverse=True, tile=tile)
    _call(k, q, do, b, R, dv, leave, decay=rows, reverse=True, tile=tile)
    if rows == "scalar":
        dlog_a = dlog_a.sum(2).transpose(1, 2)

    def total(d, heads):  # over the heads that share one q, k or log_a
        return d if d.shape[2] == heads else d.unflatten(2, (heads, -1)).sum(3, dtype=torch.float32).to(d.dtype)

    return total(dq, q.shape[2]), total(dk, k.shape[2]), dv, total(dlog_a, b.shape[2]).contiguous(), dstate


@_forward.register_fake
def _(q, k, v, log_a, state, tile):
    return torch.empty_like(v), state.new_empty(state.shape), log_a.new_empty(log_a.shape)


@_backward.register_fake
def _(q, k, v, b, state, do, dfinal, tile):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, b, state))


def _save(ctx, inputs, output):
    q, k, v, _, state, ctx.tile = inputs
    ctx.save_for_backward(q, k, v, output[2], state)
    ctx.set_materialize_grads(False)


def _gradients(ctx, do, dfinal, _):
    q, k, v, b, state = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dfinal = _zeros(state, *state.shape) if dfinal is None else dfinal
    return *torch.ops.lengthgen.scan_backward(q, k, v, b, state, do, dfinal, ctx.tile), None


_forward.register_autograd(_gradients, setup_context=_save)


def triton_scan(q, k, v, log_a, state=None, chunk=None, block=64, segments=None, num_warps=4):
    """TODO"""
    B, T, G, H, K, V = _check(q, k, v, log_a, state)
    if chunk is None:
        chunk = 16
    split = triton.cdiv(V, 128)
    K_, V_ = max(16, triton.next_power_of_2(K)), max(16, triton.next_power_of_2(triton.cdiv(V, split)))
    chunks = triton.cdiv(T, chunk)
    segment = triton.cdiv(chunks, segments or 1) * chunk
    pad_k = lambda x: F.pad(x, (0, K_ - K)) if K_ != K else x
    v = F.pad(v, (0, split * V_ - V)).reshape(B, T, H * split, V_)
    if state is None:
        state = _zeros(q, B, H * split, K_, V_)
    else:
        state = F.pad(state.float(), (0, split * V_ - V, 0, K_ - K))
        state = state.unflatten(3, (split, V_)).transpose(2, 3).reshape(B, H * split, K_, V_)
    log_a = log_a.float() if log_a.dim() == 3 else pad_k(log_a.float())
    o, final, _ = _forward(pad_k(q), pad_k(k), v, log_a, state, [chunk, block, segment, num_warps])
    final = final.unflatten(1, (H, split)).transpose(2, 3).reshape(B, H, K_, split * V_)
    return o.reshape(B, T, H, split * V_)[..., :V], final[:, :, :K, :V]


BACKENDS = {"recurrent": recurrent_scan, "chunked": chunked_scan}
_announced = set()


def scan(q, k, v, log_a, state=None, backend=None):
    """One of the functions above; says once on stdout which one and why. `backend` None picks, a name forces."""
    if backend is None:
        backend, reason = "chunked", "plain PyTorch matmuls run on any device"
    else:
        reason = "asked for"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend not in _announced:
        _announced.add(backend)
        print(f"scan: {backend}, {reason}", flush=True)
    return BACKENDS[backend](q, k, v, log_a, state)
