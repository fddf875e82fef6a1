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
