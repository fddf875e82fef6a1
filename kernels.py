"""The one recurrence behind Mamba-2, GLA and Mamba-1: by definition, in chunks, and as one GPU kernel.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        a_t = exp(log_a_t) in (0, 1]

    B  batch       G  groups: head h reads q, k of group h*G//H       K  key size of a head (Mamba-2: d_state)
    T  length      H  heads                                           V  value size (Mamba-2: headdim)

    q, k    (B, T, G, K)                v  (B, T, H, V)
    log_a   (B, T, H)    one decay per head (Mamba-2), or
            (B, T, H, K) one decay per key channel (GLA, Mamba-1); never positive
    state   (B, H, K, V) the S that the first step starts from, never below float32; None means zeros

Every function returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V)); gradients reach every input
and the initial state, and flow in from the final state. q, k, v share one dtype; what does not fit raises a
ValueError that names it (a log_a above 0 only on a CPU: to look at it on a GPU would stall every call).
"""

import math
import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: runs the kernel on a CPU, slowly
try:
    import triton
    import triton.language as tl
except ImportError:  # Triton exists for Linux only; everything but triton_scan works without
    triton = None


def _check(q, k, v, log_a, state):
    """Raise a ValueError that names the argument which does not fit; returns B, T, G, H, K, V."""
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"expected q (B, T, G, K), v (B, T, H, V), got {tuple(q.shape)}, {tuple(v.shape)}")
    (B, T, G, K), (H, V) = q.shape, v.shape[2:]
    if min(q.shape) < 1 or min(v.shape) < 1:
        raise ValueError(f"q has shape {tuple(q.shape)} and v {tuple(v.shape)}, expected no size below 1")
    if H % G:
        raise ValueError(f"v has {H} heads, which {G} groups of q cannot share evenly")
    expected = {"q": (q, [(B, T, G, K)]), "k": (k, [(B, T, G, K)]), "v": (v, [(B, T, H, V)])}
    expected |= {"log_a": (log_a, [(B, T, H), (B, T, H, K)])}
    if state is not None:
        expected["state"] = state, [(B, H, K, V)]
    for name, (x, shapes) in expected.items():
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {' or '.join(map(str, shapes))}")
        if x.device != q.device:
            raise ValueError(f"{name} {tuple(x.shape)} is on {x.device}, expected {q.device} like q")
        if not x.is_floating_point():
            raise ValueError(f"{name} {tuple(x.shape)} is {x.dtype}, expected a floating-point dtype")
        # log_a and state may differ: they are computed in float32 at least
        if name in "kv" and x.dtype != q.dtype:
            raise ValueError(f"{name} {tuple(x.shape)} is {x.dtype}, expected {q.dtype} like q")
    if log_a.device.type == "cpu" and not torch.compiler.is_compiling() and log_a.max() > 0:
        raise ValueError(
            f"log_a {tuple(log_a.shape)} reaches {log_a.max():.3g}, expected no log decay above 0"
        )
    return B, T, G, H, K, V


def recurrent_scan(q, k, v, log_a, state=None):
    """The definition, one step at a time: the oracle of every test. Shapes as at the top of this file."""
    B, _, G, H, K, V = _check(q, k, v, log_a, state)
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

    e^(b_t - b_s) does not factor into e^(b_t) e^(-b_s): with strong decay the second overflows. But every
    pair s < t is parted by exactly one midpoint m of the halves, quarters, ... of the chunk, and e^(b_t -
    b_m) e^(b_m - b_s) has no positive exponent. So: log2(L) levels, each a matmul, exact at any decay; s = t
    needs no decay at all.
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

    No exponent is positive, so nothing overflows at any decay. Plain autograd. Shapes as at the file's top.
    """
    B, T, G, H, K, V = _check(q, k, v, log_a, state)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, expected at least 1")
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
    # steps with k = 0 and log_a = 0 in front: they change no state, and every chunk ends in a real step
    pad = n * L - T

    def chunks(x):  # (B, T, ...) -> (B, n, L, ...)
        x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (pad, 0)) if pad else x.to(dtype)
        return x.unflatten(1, (n, L))

    S = q.new_zeros(B, H, K, V, dtype=dtype) if state is None else state.to(dtype)
    S = S.unflatten(1, (G, R)).transpose(2, 3)  # (B, G, K, R, V): the heads of a group share one matmul
    q, k = (chunks(x).transpose(2, 3) for x in (q, k))  # (B, n, G, L, K)
    v = chunks(v).unflatten(3, (G, R)).transpose(2, 3)  # (B, n, G, L, R, V)
    # (B, n, G, L, K), or (B, n, G, L, R) with one decay per head
    b = chunks(log_a if vector else log_a.unflatten(2, (G, R))).cumsum(2).transpose(2, 3)
    # b_L - b_s, with a constant 0 at s = L: a difference would leave rounding noise in the gradient of log_a
    to_end = F.pad(b[..., -1:, :] - b[..., :-1, :], (0, 0, 0, 1))

    if vector:
        scores = _scores_vector(q, k, b)[:, :, :, None]  # (B, n, G, R=1, L, L)
        q_in, k_out = q * b.exp(), k * to_end.exp()
        v_out, keep = v, b[..., -1, :].exp()[..., None, None]  # keep (B, n, G, K, 1, 1)
    else:
        b_ = b.transpose(3, 4)  # (B, n, G, R, L)
        # mask the exponent, then exponentiate: the other order gives inf * 0 = nan in the gradient
        decay = (b_[..., :, None] - b_[..., None, :]).tril(-1).exp()
        scores = (q @ k.transpose(-1, -2)).tril()[:, :, :, None] * decay  # (B, n, G, R, L, L)
        q_in, k_out = q, k
        v_out = v * to_end.exp()[..., None]
        keep = b[..., -1, :].exp()[..., None, :, None]  # (B, n, G, 1, R, 1)

    before = []
    for q_i, k_i, v_i, keep_i in zip(*(x.unbind(1) for x in (q_in, k_out, v_out, keep)), strict=True):
        before.append(q_i @ S.flatten(3))  # (B, G, L, R * V)
        added = (k_i.transpose(-1, -2) @ v_i.flatten(3)).unflatten(3, (R, V))  # (B, G, K, R, V)
        S = torch.addcmul(added, keep_i, S)
    before = torch.stack(before, 1).unflatten(4, (R, V))  # (B, n, G, L, R, V)
    inside = (scores @ v.transpose(3, 4)).transpose(3, 4)
    o = inside + before if vector else torch.addcmul(inside, before, b.exp()[..., None])
    o = o.transpose(2, 3).reshape(B, n * L, H, V)[:, pad:]
    return o.to(out_dtype), S.transpose(2, 3).reshape(B, H, K, V)


def triton_scan(q, k, v, log_a, state=None, chunk=None, block=None, segments=None):
    """The same as one fused GPU kernel that is its own gradient. Shapes as at the top of this file.

    Let dO_t be the gradient that arrives at o_t, R_T the one that arrives at the final state, and dS_t all
    that reaches S_t, from its own step and the later ones. Differentiating the recurrence gives

        dS_t = q_t dO_t^T + R_t        R_{t-1} = diag(a_t) dS_t        (R_0 is the initial state's gradient)
        dq_t = S_t dO_t        dk_t = dS_t v_t        dv_t = dS_t^T k_t

    The first line is the recurrence again, in reverse time; the second reads a state as o_t = S_t^T q_t does.
    So one kernel, "add k v^T to a decaying state, read it with q", is called four times with the roles
    swapped:

        call      q    k    v    starts from      time     decay acts on    gives
        forward   q    k    v    S_0              forward  key rows         o, and S_T as its final state
        dq        dO   v    k    S_0 transposed   forward  value columns    dq
        dk        v    dO   q    R_T transposed   reverse  value columns    dk
        dv        k    q    dO   R_T              reverse  key rows         dv, and R_0 as its final state

    One program owns `block` value columns of one head and walks through the chunks, its K x block piece of
    the state in registers: none goes to memory on the way, no two programs add to one number, and every run
    gives the same bits. In a chunk of L steps with b_t = log a_1 + ... + log a_t, S entering, and "before"
    meant in the call's time:

        o_t = sum_{s = t or before} decay(s, t) (q_t . k_s) v_s + c_in(t) S^T q_t
        S'  = e^(b_L) S + sum_s c_out(s) k_s v_s^T

                  decay(s, t)      c_in(t)          c_out(s)
        forward   e^(b_t - b_s)    e^(b_t)          e^(b_L - b_s)
        reverse   e^(b_s - b_t)    e^(b_L - b_t)    e^(b_s)

    No exponent is ever positive. With one decay per head decay(s, t) is a matrix; with one per channel it
    becomes log2(L) masked matmuls by the halving of _scores_vector.

    The decay's gradient needs no fifth call. d log a_t adds up all pairs of a k_s, s < t, with a q_u, u >= t
    (S_0 counts as a first k, R_T as a last q). So from t + 1 to t it gains what q_t read and loses what k_t
    wrote:

        d log a_t = d log a_{t+1} + q_t * dq_t - k_t * dk_t        (and summed over K with one decay per head)

    dq and dk here without the pair s = t, which is in neither sum: without it nothing large cancels and 1e-13
    is right to 1e-4. The dq call stores q * dq in float32; the dk call, in reverse time anyway, subtracts and
    sums. It starts from what S_T without the last k v^T, which the dq call leaves behind, has in common with
    R_T.

    Few heads and a long sequence would leave a GPU idle, so T is cut into `segments` that run side by side: a
    call without output finds what each adds to the state, a short loop chains them, each restarts the sum for
    d log a.

    q, k, v are all float32, bfloat16 or float16; sums, decays and states are float32. K is at most 256. Sizes
    are padded to powers of two, 16 or more: with V = 1 (Mamba-1) v becomes as large as log_a. `chunk`,
    `block` (powers of two, 16 or more) and `segments` are chosen where None. On a CPU it runs only in
    Triton's interpreter. Raises ValueError for what it cannot take, ImportError without Triton.
    """
    B, T, _, H, K, V = _check(q, k, v, log_a, state)
    if triton is None:
        raise ImportError("triton_scan needs the triton package, which is not installed: use chunked_scan")
    if unfit := _unfit(q):
        raise ValueError(f"{unfit}: use chunked_scan")
    half, vector = q.dtype != torch.float32, log_a.dim() == 4
    chunk = (64 if half and not vector else 16) if chunk is None else chunk
    block = (16 if not half else 32 if vector or K > 128 else 64) if block is None else block
    for name, size in {"chunk": chunk, "block": block}.items():
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} is {size}, expected a power of two of at least 16")

    parts = triton.cdiv(V, 128)  # V = 256 becomes two heads of 128 with the same q, k and log_a
    K_, V_ = (max(16, triton.next_power_of_2(size)) for size in (K, triton.cdiv(V, parts)))
    more_k, more_v = K_ - K, parts * V_ - V
    q, k, v = _pad(q, 0, more_k), _pad(k, 0, more_k), _pad(v, 0, more_v).reshape(B, T, H * parts, V_)
    log_a = _pad(log_a.float(), 0, more_k if vector else 0)
    if state is None:
        state = _zeros(q, B, H * parts, K_, V_)
    else:
        state = _pad(state.float(), 0, more_v, 0, more_k).unflatten(3, (parts, V_))
        state = state.transpose(2, 3).reshape(B, H * parts, K_, V_)
    if segments is None:
        segments = 1
        if q.is_cuda:  # two programs per multiprocessor; fewer than three segments gain less than they cost
            programs = B * H * parts * max(1, V_ // block)
            wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count // programs
            segments = max(1, min(wanted, T // 1024)) if wanted > 2 else 1
    if segments < 1:
        raise ValueError(f"segments is {segments}, expected at least 1")
    segment = triton.cdiv(triton.cdiv(T, chunk), segments) * chunk

    o, final, _ = _forward(q, k, v, log_a, state, [chunk, block, segment])
    final = final.unflatten(1, (H, parts)).transpose(2, 3).reshape(B, H, K_, parts * V_)
    return o.reshape(B, T, H, parts * V_)[..., :V], final[:, :, :K, :V]


def _unfit(q):
    """Why triton_scan cannot take inputs like q (B, T, G, K), or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q {tuple(q.shape)} is {q.dtype}, but the kernel takes float32, bfloat16 or float16"
    if q.dtype == torch.bfloat16 and INTERPRETED:
        return f"q {tuple(q.shape)} is torch.bfloat16, which Triton's interpreter multiplies wrongly"
    if q.shape[3] > 256:
        return f"q {tuple(q.shape)} has K = {q.shape[3]}, but the kernel has room for a state of K = 256"
    if not (q.is_cuda or INTERPRETED):
        return f"q {tuple(q.shape)} is on {q.device}, but the kernel needs a GPU (or TRITON_INTERPRET=1)"
    if q.is_cuda and (gpu := torch.cuda.get_device_properties(q.device)).major < 8:
        return f"q {tuple(q.shape)} is on {gpu.name}, but the kernel needs compute capability 8.0 or newer"


def _pad(x, *sizes):
    return F.pad(x, sizes) if any(sizes) else x  # F.pad copies even when there is nothing to add


def _zeros(like, *shape):
    """One float32 zero seen as `shape`, all strides 0: reading it costs no bandwidth."""
    return like.new_zeros((), dtype=torch.float32).expand(shape)


@torch.library.custom_op("lengthgen::scan_forward", mutates_args=())  # torch.compile does not look inside
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor, tile: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state, and b in base 2 for the gradient. tile is chunk, block and steps per segment."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    T, chunk = q.shape[1], tile[0]
    b = _pad(log_a * math.log2(math.e), *(0, 0) * (log_a.dim() - 2), 0, -T % chunk)
    b = b.unflatten(1, (-1, chunk)).cumsum(2).flatten(1, 2)[:, :T].contiguous()
    decay = "scalar" if b.dim() == 3 else "key"
    o, enter, final, leave = torch.empty_like(v), *_chain(k, v, b, state, tile, decay)
    _call(q, k, v, b, enter, tile, decay, o=o, leave=leave)
    return o, final, b


@torch.library.custom_op("lengthgen::scan_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor, do: Tensor, dfinal: Tensor, tile: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, log_a and state."""
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), do.contiguous()
    (B, T, H, _), K = v.shape, q.shape[3]
    rows, columns = ("scalar", "scalar") if b.dim() == 3 else ("key", "value")
    S, _, _ = _chain(k, v, b, state, tile, rows)
    R, dstate, leave = _chain(q, do, b, dfinal, tile, rows, reverse=True)
    S_, R_ = S.transpose(3, 4), R.transpose(3, 4)
    dq, dk, dv = q.new_empty(B, T, H, K), q.new_empty(B, T, H, K), torch.empty_like(v)
    qdq = b.new_empty((B, H, K // min(K, tile[1]), T) if rows == "scalar" else (B, T, H, K))
    dlog_a = torch.empty_like(qdq)
    before_last = torch.empty_like(S_, memory_format=torch.contiguous_format)
    _call(do, v, k, b, S_, tile, columns, o=dq, leave=before_last, x=q, qdq=qdq)
    anchor = (before_last * R_).sum(3)
    _call(v, do, q, b, R_, tile, columns, reverse=True, o=dk, x=k, qdq=qdq, anchor=anchor, dlog_a=dlog_a)
    _call(k, q, do, b, R, tile, rows, reverse=True, o=dv, leave=leave)
    if rows == "scalar":
        dlog_a = dlog_a.sum(2).transpose(1, 2)

    def total(d, like):  # heads that share one q, k or log_a add their gradients
        d = d.unflatten(2, (like.shape[2], -1))
        return d.sum(3, dtype=torch.float32).to(like.dtype) if d.shape[3] > 1 else d.squeeze(3).contiguous()

    return total(dq, q), total(dk, k), dv, total(dlog_a, b), dstate


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
    return *_backward(q, k, v, b, state, do, dfinal, ctx.tile), None


_forward.register_autograd(_gradients, setup_context=_save)


def _chain(k, v, b, state, tile, decay, reverse=False):
    """States that enter the segments (B, segments, H, K, V), the one that leaves the last, where to write it.

    With one segment the main call writes it; with more it is already known and there is nothing to write.
    """
    (B, H, K, V), T = state.shape, k.shape[1]
    chunk, _, segment = tile
    segments = triton.cdiv(T, segment)
    if segments == 1:
        final = state.new_empty(state.shape)
        return state[:, None], final, final[:, None]
    edges = state.new_empty(B, segments + 1, H, K, V)
    before, after = edges[:, :-1], edges[:, 1:]
    enter, leave, first, last = (after, before, -1, 0) if reverse else (before, after, 0, -1)
    _call(k, k, v, b, _zeros(k, *enter.shape), tile, decay, reverse, leave=leave)
    b_L = torch.cat([b[:, chunk - 1 : T - 1 : chunk], b[:, T - 1 :]], 1)  # at the end of each chunk
    # each segment's whole decay
    a = torch.stack([x.sum(1).exp2() for x in b_L.split(segment // chunk, 1)], 1)
    a = a.repeat_interleave(H // b.shape[2], 2)[..., None]
    a = a[..., None] if decay == "scalar" else a
    edges[:, first] = state
    for i in reversed(range(segments)) if reverse else range(segments):
        leave[:, i].addcmul_(a[:, i], enter[:, i])
    return enter, edges[:, last].clone(), None


def _call(q, k, v, b, enter, tile, decay, reverse=False, leave=None, x=None, **others):
    """One launch of the kernel; enter and leave are (B, segments, H, K, V) of any strides."""
    (B, segments, H, K, V), (chunk, block, segment) = enter.shape, tile
    block = min(block, V)
    heads = [1 if y is None else y.shape[2] for y in (q, k, v, b, x)]
    strides = [*enter.stride(), *(enter if leave is None else leave).stride()]
    sizes = [H, *heads, K, V, chunk, block, chunk.bit_length() - 1]
    arguments = [q, k, v, b, enter, leave, x, q.shape[1], segment, *strides, *sizes, reverse, decay]
    num_warps = 4 if K * block > 1024 else 1
    with torch.cuda.device_of(q):  # Triton launches on the current device
        scan_kernel[(B * segments * H * (V // block),)](
            *arguments, **others, num_warps=num_warps, num_stages=2
        )


if triton is not None:

    @triton.jit
    def scan_kernel(
        q, k, v, b, enter, leave, x, T, segment,
        enter_b, enter_s, enter_h, enter_k, enter_v, leave_b, leave_s, leave_h, leave_k, leave_v,  # strides
        H: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HB: tl.constexpr,
        HX: tl.constexpr, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
        LEVELS: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr,  # "scalar", "key" or "value"
        o=None, qdq=None, anchor=None, dlog_a=None,  # dq call: writes o, qdq; dk call: also reads qdq
    ):  # fmt: skip
        """Any of the four calls, in the letters of its role. H heads run, q has HQ of its own, k HK ...

        x is the q or k whose gradient o is. Strides are of (B, segments, H, K, V).
        """
        BLOCKS: tl.constexpr = V // BLOCK
        dtype: tl.constexpr = q.dtype.element_ty  # what the matmuls take; they add in float32
        pid = tl.program_id(0).to(tl.int64)  # a 1-d grid: the other axes stop at 65535
        i_h, i_bs = pid // BLOCKS % H, pid // (BLOCKS * H)
        segments = tl.cdiv(T, segment)
        i_b, i_s = i_bs // segments, i_bs % segments
        start = i_s * segment
        end = tl.minimum(start + segment, T)
        t = tl.arange(0, L)
        c_k = tl.arange(0, K)
        c_v = (pid % BLOCKS * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
        if DECAY == "scalar":
            N: tl.constexpr = 1  # b is (B, T, HB, N)
            c_b = tl.arange(0, 1)
        elif DECAY == "key":
            N: tl.constexpr = K
            c_b = c_k
        else:
            N: tl.constexpr = V
            c_b = c_v

        # (B, T, heads, size): step to this batch and head, and leave the steps in time to the loop
        q += (i_b * T * HQ + i_h // (H // HQ)) * K + c_k[None, :]
        k += (i_b * T * HK + i_h // (H // HK)) * K + c_k[None, :]
        v += (i_b * T * HV + i_h // (H // HV)) * V + c_v[None, :]
        b += (i_b * T * HB + i_h // (H // HB)) * N + c_b[None, :]
        enter += i_b * enter_b + i_s * enter_s + i_h * enter_h
        S = tl.load(enter + c_k[:, None] * enter_k + c_v[None, :] * enter_v)
        if anchor is not None:
            later = tl.load(anchor + (i_bs * H + i_h) * V + c_v)[None, :]  # d log a of the step after
            if DECAY == "scalar":
                later = tl.sum(later, 1, keep_dims=True)

        same = t[:, None] == t[None, :]
        if REVERSE:
            earlier = t[:, None] < t[None, :]
        else:
            earlier = t[:, None] > t[None, :]

        chunks = tl.cdiv(end - start, L)
        for i in range(chunks):
            if REVERSE:
                t0 = start + (chunks - 1 - i) * L
            else:
                t0 = start + i * L
            n = tl.minimum(end - t0, L).to(tl.int32)
            real = t[:, None] < n
            inner = t[:, None] < (end - t0 - 1).to(tl.int32)  # all steps but the segment's last
            q_t = tl.load(q + t0 * (HQ * K) + t[:, None] * (HQ * K), mask=real, other=0.0)
            k_t = tl.load(k + t0 * (HK * K) + t[:, None] * (HK * K), mask=real, other=0.0)
            v_t = tl.load(v + t0 * (HV * V) + t[:, None] * (HV * V), mask=real, other=0.0)
            # steps past the end repeat the last b: a 0 there would be e^(+large) in reverse time, and 0 * inf
            b_t = tl.load(b + t0 * (HB * N) + tl.minimum(t, n - 1)[:, None] * (HB * N))
            b_L = tl.load(b + (t0 + n - 1) * (HB * N))  # (1, N)
            if REVERSE:
                c_in, c_out = tl.exp2(b_L - b_t), tl.exp2(b_t)
            else:
                c_in, c_out = tl.exp2(b_t), tl.exp2(b_L - b_t)

            if o is not None:
                if DECAY == "key":
                    y = tl.dot((q_t * c_in).to(dtype), S.to(dtype), input_precision="ieee")
                    A = tl.where(same, tl.sum(q_t.to(tl.float32) * k_t, 1, keep_dims=True), 0.0)
                else:
                    y = tl.dot(q_t, S.to(dtype), input_precision="ieee") * c_in
                    A = tl.dot(q_t, tl.trans(k_t), input_precision="ieee")
                if qdq is not None:  # s = t stays apart: d log a does not want it
                    own = tl.sum(tl.where(same, A, 0.0), 1, keep_dims=True) * v_t

                if DECAY == "scalar":
                    reads = earlier if qdq is not None else earlier | same
                    gap = b_t - tl.trans(b_t)
                    if REVERSE:
                        gap = -gap
                    A *= tl.exp2(tl.where(reads, gap, float("-inf")))  # mask the exponent, then exponentiate
                else:
                    for level in tl.static_range(LEVELS):
                        half = 1 << level
                        mid = tl.minimum((t | (2 * half - 1)) - half, n - 1)  # last step of the first half
                        b_mid = tl.load(b + t0 * (HB * N) + mid[:, None] * (HB * N))
                        to_mid = tl.exp2(tl.where((t & half)[:, None] == 0, b_mid - b_t, b_t - b_mid))
                        parted = t[:, None] ^ t[None, :]  # its top bit tells at which level s and t part
                        parted = earlier & (parted >= half) & (parted < 2 * half)
                        if DECAY == "key":
                            q_mid, k_mid = (q_t * to_mid).to(dtype), (k_t * to_mid).to(dtype)
                            A += tl.where(parted, tl.dot(q_mid, tl.trans(k_mid), input_precision="ieee"), 0.0)
                        else:
                            A_mid, v_mid = tl.where(parted, A, 0.0).to(dtype), (v_t * to_mid).to(dtype)
                            y += tl.dot(A_mid, v_mid, input_precision="ieee") * to_mid
                if DECAY != "value":
                    y = tl.dot(A.to(dtype), v_t, y, input_precision="ieee")

                p_o = ((i_b * T + t0) * H + i_h) * V + t[:, None] * (H * V) + c_v[None, :]
                if qdq is None:
                    tl.store(o + p_o, y.to(dtype), mask=real)
                else:
                    tl.store(o + p_o, (y + own).to(dtype), mask=real)

            if qdq is not None:
                p_x = ((i_b * T + t0) * HX + i_h // (H // HX)) * V + t[:, None] * (HX * V) + c_v[None, :]
                y *= tl.load(x + p_x, mask=real, other=0.0)
                p_y = p_o
                if DECAY == "scalar":  # one partial sum per block of columns: (B, H, BLOCKS, T)
                    y = tl.sum(y, 1, keep_dims=True)
                    p_y = ((i_b * H + i_h) * BLOCKS + pid % BLOCKS) * T + t0 + t[:, None]
                if anchor is None:
                    tl.store(qdq + p_y, y, mask=real)
                    k_t = tl.where(inner, k_t, 0.0)  # this call leaves the state before the last k v^T
                else:
                    y = tl.load(qdq + p_y, mask=real, other=0.0) - tl.where(inner, y, 0.0)
                    tl.store(dlog_a + p_y, later + tl.cumsum(y, 0, reverse=True), mask=real)
                    later += tl.sum(y, 0, keep_dims=True)

            if DECAY == "key":
                S *= tl.trans(tl.exp2(b_L))
                k_t = (k_t * c_out).to(dtype)
            else:
                S *= tl.exp2(b_L)
                v_t = (v_t * c_out).to(dtype)
            S = tl.dot(tl.trans(k_t), v_t, S, input_precision="ieee")

        if leave is not None:
            leave += i_b * leave_b + i_s * leave_s + i_h * leave_h
            tl.store(leave + c_k[:, None] * leave_k + c_v[None, :] * leave_v, S)

    INTERPRETED = not isinstance(scan_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set


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
        elif unfit := _unfit(q):
            backend, reason = "chunked", unfit
        else:
            backend, reason = "triton", "one fused kernel on NVIDIA GPUs"
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")
    _announce(backend, reason)
    with torch.autocast(q.device.type, enabled=False):  # the sums and the state stay in float32
        return BACKENDS[backend](q, k, v, log_a, state)


# ---- python kernels.py: how exact, and on a GPU how fast ----


def _inputs(B, T, G, H, K, V, vector, dtype, device):
    """Random q, k, v, log_a, state that want gradients, and random gradients for both outputs."""
    torch.manual_seed(0)
    sizes = (B, T, G, K), (B, T, G, K), (B, T, H, V), (B, T, H, K) if vector else (B, T, H), (B, H, K, V)
    q, k, v, log_a, state = (torch.randn(size, device=device) for size in sizes)
    inputs = [q.to(dtype), (k / K**0.5).to(dtype), v.to(dtype), -F.softplus(log_a - 1), state]
    return [x.requires_grad_() for x in inputs], [torch.randn_like(x.detach()) for x in (inputs[2], state)]


def _step(fn, inputs, cotangents):
    """Both outputs and all gradients, in one tuple."""
    outputs = fn(*inputs)
    return outputs + torch.autograd.grad(outputs, inputs, cotangents)


def _error_table(device):
    """Relative error of every output and gradient against the recurrence in float64."""
    names = ("o", "final", "dq", "dk", "dv", "dlog_a", "dstate")
    print(f"{'backend':<10}{'decay per':<10}{'dtype':<10}" + "".join(f"{name:>8}" for name in names))
    size = (2, 1000, 2, 4, 128, 64) if device == "cuda" else (1, 100, 1, 2, 24, 16)
    for vector in (False, True):
        for dtype in (torch.float32, torch.bfloat16 if device == "cuda" else torch.float16):
            inputs, cotangents = _inputs(*size, vector, dtype, device)
            exact = [x.detach().double().requires_grad_() for x in inputs]
            wanted = _step(recurrent_scan, exact, [x.double() for x in cotangents])
            for name, backend in BACKENDS.items():
                if name == "triton" and triton is None:
                    continue
                got = _step(backend, inputs, cotangents)
                errors = [(x.double() - y).norm() / y.norm() for x, y in zip(got, wanted, strict=True)]
                line = f"{name:<10}{'channel' if vector else 'head':<10}{str(dtype)[6:]:<10}"
                print(line + "".join(f"{error.item():8.0e}" for error in errors), flush=True)


def _simple_gla(q, k, v, log_a, state):
    from fla.ops.simple_gla import chunk_simple_gla  # it has no groups

    q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
    return chunk_simple_gla(q, k, v, log_a, scale=1.0, initial_state=state, output_final_state=True)


def _gla(q, k, v, log_a, state):
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, log_a, scale=1.0, initial_state=state, output_final_state=True)


def _mamba_ssm(q, k, v, log_a, state):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # log_a = dt A with A = -1; it also scales v by dt, so this is not our result but the same work
    A, state = -log_a.new_ones(log_a.shape[2]), state.transpose(2, 3)
    options = dict(chunk_size=256, initial_states=state, return_final_states=True)
    o, final = mamba_chunk_scan_combined(v, -log_a, A, k, q, **options)
    return o, final.transpose(2, 3)


def _time(fn):
    """Microseconds on the GPU alone: a replayed CUDA graph waits for no Python."""
    return triton.testing.do_bench_cudagraph(fn) * 1e3


def _time_table():
    """Times, and the floor's share in each: what this GPU needs to move the bytes or to do the matmuls."""
    m = torch.randn(16384, 16384, device="cuda", dtype=torch.bfloat16)
    bandwidth, rate = 2 * m.nbytes / _time(m.clone), 2 * 16384**3 / _time(lambda: m @ m)  # per us
    print(f"{torch.cuda.get_device_name()}: {bandwidth / 1e6:.2f} TB/s copied, {rate / 1e6:.0f} TFLOP/s")
    mamba, gla = [torch.compile(chunked_scan), _simple_gla, _mamba_ssm], [torch.compile(chunked_scan), _gla]
    for model, size, vector, rivals in (
        ("Mamba-2-370m", (8, 2048, 1, 32, 128, 64), False, mamba),
        ("Mamba-2-1.3b", (8, 2048, 1, 64, 128, 64), False, mamba),
        ("GLA-340M", (8, 2048, 4, 4, 128, 256), True, gla),
        # torch.compile would unroll 4096 chunks
        ("Mamba-2-370m", (1, 131072, 1, 32, 128, 64), False, mamba[1:]),
        ("GLA-340M", (1, 131072, 4, 4, 128, 256), True, gla[1:]),
    ):
        B, T, _, H, K, V = size
        inputs, cotangents = _inputs(*size, vector, torch.bfloat16, "cuda")
        read, wrote = (sum(x.nbytes for x in tensors) for tensors in (inputs, cotangents))
        flops = B * T * H * (4 * K * V + 2 * 64 * (K + V))  # chunks of 64
        # backward reads the inputs and the outputs' gradients, writes the inputs' gradients, in three calls
        floors = [max((read + wrote) / bandwidth, flops / rate)]
        floors += [max((3 * read + 2 * wrote) / bandwidth, 4 * flops / rate)]
        print(f"{model}, B {B}, T {T}: us forward and with backward; floor {floors[0]:.0f}, {floors[1]:.0f}")
        for fn in (triton_scan, *rivals):
            try:
                with torch.no_grad():
                    forward = _time(partial(fn, *inputs))
                both = _time(partial(_step, fn, inputs, cotangents))
            except (ImportError, RuntimeError) as error:  # not installed; out of memory
                print(f"  {fn.__name__:<14}{type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            shares = f"{floors[0] / forward:6.0%}{floors[1] / both:6.0%}"
            print(f"  {fn.__name__:<14}{forward:9.0f}{both:9.0f} us{shares} of the floor", flush=True)


if __name__ == "__main__":
    _error_table("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available() and triton is not None:
        _time_table()
