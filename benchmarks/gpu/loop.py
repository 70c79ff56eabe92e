"""The delta rule and its gradient as plain loops over tokens in NumPy and float64; they share nothing with the package.

    S- = a S,  e = v - S-^T k,  S = S- + beta w e^T,  o = scale S^T q

The gradient is written out by hand, from the last token to the first.
"""

import numpy as np

Arrays = dict[str, np.ndarray]


def value_and_gradient(x: Arrays, cotangents: Arrays, *, erase: bool = True) -> Arrays:
    """Return o, the final state, and the gradient of every argument as d_NAME.

    Args:
        x: q, k, v [B, T, H, D], beta [B, T, H], initial_state [B, H, K, V]; optionally write_key, shaped as k, and
            log_decay [B, T, H] or [B, T, H, K].
        cotangents: of o and state.
        erase: False leaves out S-^T k.
    """
    x = {name: np.asarray(a).astype(np.float64) for name, a in x.items()}
    d_out, d_state = (np.asarray(cotangents[name]).astype(np.float64) for name in ("o", "state"))
    q, k, v, beta, state = (x[name] for name in ("q", "k", "v", "beta", "initial_state"))
    w = x.get("write_key", k)
    if not q.shape[2] == k.shape[2] == w.shape[2] == v.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} heads, expected {v.shape[2]}, the number of v")
    decay = np.exp(x["log_decay"]) if "log_decay" in x else np.ones(beta.shape)
    decay = decay if decay.ndim == 4 else decay[..., None]  # [B, T, H, K or 1]
    scale = q.shape[-1] ** -0.5

    before, residual = [], []
    out = np.zeros_like(v)
    for t in range(v.shape[1]):
        before.append(state)
        state = decay[:, t, :, :, None] * state
        residual.append(v[:, t] - erase * np.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], w[:, t], residual[t])
        out[:, t] = scale * np.einsum("bhkv,bhk->bhv", state, q[:, t])

    d = {name: np.zeros_like(a) for name, a in {"q": q, "k": k, "w": w, "v": v, "beta": beta, "decay": decay}.items()}
    last = state
    for t in reversed(range(v.shape[1])):
        d["q"][:, t] = scale * np.einsum("bhkv,bhv->bhk", state, d_out[:, t])
        d_state = d_state + scale * np.einsum("bhk,bhv->bhkv", q[:, t], d_out[:, t])
        written = np.einsum("bhkv,bhv->bhk", d_state, residual[t])
        d["beta"][:, t] = np.sum(w[:, t] * written, axis=-1)
        d["w"][:, t] = beta[:, t, :, None] * written
        d["v"][:, t] = beta[:, t, :, None] * np.einsum("bhkv,bhk->bhv", d_state, w[:, t])
        decayed = decay[:, t, :, :, None] * before[t]
        d["k"][:, t] = -erase * np.einsum("bhkv,bhv->bhk", decayed, d["v"][:, t])
        d_state = d_state - erase * np.einsum("bhk,bhv->bhkv", k[:, t], d["v"][:, t])
        by_channel = np.sum(decayed * d_state, axis=-1)  # of log_decay
        d["decay"][:, t] = by_channel if decay.shape[-1] > 1 else by_channel.sum(-1, keepdims=True)
        state, d_state = before[t], decay[:, t, :, :, None] * d_state

    found = {"o": out, "state": last, "d_q": d["q"], "d_v": d["v"], "d_beta": d["beta"], "d_initial_state": d_state}
    found["d_k"] = d["k"] if "write_key" in x else d["k"] + d["w"]
    if "write_key" in x:
        found["d_write_key"] = d["w"]
    if "log_decay" in x:
        found["d_log_decay"] = d["decay"].reshape(x["log_decay"].shape)
    return found
