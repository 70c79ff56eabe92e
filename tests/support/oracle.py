"""The definitions as plain NumPy loops over tokens, independent of the package: the reference for its scan.

Nothing here conjugates a complex number or takes its absolute value, so the derivative in a direction is the imaginary
part at x + i h (the complex step), which is exact to rounding; a finite difference is not.
"""

import numpy as np


def delta_rule(
    q, k, v, beta, *, write_key=None, log_decay=None, erase=True, scale=None, initial_state=None, segment_ids=None
):
    """Return (o, final state) of `osdn_jax.ops.delta_rule`."""
    batch, length, heads, value_dim = v.shape
    key_dim = q.shape[-1]
    scale = key_dim**-0.5 if scale is None else scale
    write_key = k if write_key is None else write_key
    q, k, write_key = (np.repeat(x, heads // x.shape[2], axis=2) for x in (q, k, write_key))
    dtype = np.result_type(q, k, v, beta, write_key, *(x for x in (log_decay, initial_state) if x is not None))
    state = np.zeros((batch, heads, key_dim, value_dim), dtype)
    if initial_state is not None:
        state = state + initial_state
    o = np.zeros(v.shape, dtype)
    for t in range(length):
        state = _reset(state, 0.0, segment_ids, t)
        if log_decay is not None:
            a = np.exp(log_decay[:, t])
            state = state * (a[..., None] if a.ndim == 3 else a[..., None, None])
        residual = v[:, t]
        if erase:
            residual = residual - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + beta[:, t, :, None, None] * write_key[:, t, :, :, None] * residual[:, :, None, :]
        o[:, t] = scale * np.einsum("bhkv,bhk->bhv", state, q[:, t])
    return o, state


def hypergradient(
    k,
    beta=None,
    *,
    eta,
    log_forget=None,
    initial=None,
    anchor=0.0,
    bounds=None,
    normalize=False,
    restart=None,
    segment_ids=None,
):
    """Return (d before each token, final d) of `osdn_jax.ops.hypergradient_preconditioner`."""
    batch, length, heads, key_dim = k.shape
    arrays = (x for x in (beta, eta, log_forget, initial, anchor, restart) if x is not None)
    state = np.zeros((batch, heads, key_dim), np.result_type(k, *arrays))
    initial = 0.0 if initial is None else initial
    restart = initial if restart is None else restart
    d = state + initial
    used, rate = np.zeros(k.shape, state.dtype), np.broadcast_to(eta, (heads,))[:, None]
    for t in range(length):
        d = _reset(d, state + restart, segment_ids, t)
        used[:, t] = d
        u = k[:, t] ** 2
        b = np.ones((batch, heads)) if beta is None else beta[:, t]
        gradient = (b * (1 - b * np.sum(d * u, axis=-1)))[..., None] * u
        if normalize:
            gradient = gradient / (np.sum(u, axis=-1, keepdims=True) + 1e-5)
        forget = np.ones((batch, heads, 1)) if log_forget is None else np.exp(log_forget[:, t])[..., None]
        d = forget * d + (1 - forget) * anchor + rate * gradient
        if bounds is not None:
            lo, hi = bounds
            d = np.where(d.real < lo, lo, np.where(d.real > hi, hi, d))
    return used, d


def gram(k, log_decay, gain, *, center, squash=1.5, log_squash=None, initial=None, segment_ids=None):
    """Return (multiplier, final A) of `osdn_jax.ops.gram_preconditioner`."""
    batch, length, heads, key_dim = k.shape
    arrays = (x for x in (log_decay, gain, center, log_squash, initial) if x is not None)
    running = np.zeros((batch, heads, key_dim), np.result_type(k, *arrays))
    if initial is not None:
        running = running + initial
    log_squash = np.log(squash) if log_squash is None else log_squash
    center, log_squash = (np.broadcast_to(x, (heads,)) for x in (center, log_squash))
    multiplier = np.zeros(k.shape, running.dtype)
    for t in range(length):
        running = _reset(running, 0.0, segment_ids, t)
        running = np.exp(log_decay[:, t])[..., None] * running + gain[:, t, :, None] * k[:, t] ** 2
        r = np.log(running + 1e-6) - center[:, None]
        multiplier[:, t] = np.exp(-log_squash[:, None] * r / (1 + r * np.sign(r.real)))
    return multiplier, running


def squares(k, *, average=None, normalize=False, initial=None, restart=None, segment_ids=None):
    """Return (multiplier, final sum or average) of `osdn_jax.ops.squares_preconditioner`."""
    batch, length, heads, key_dim = k.shape
    arrays = (x for x in (initial, restart) if x is not None)
    state = np.zeros((batch, heads, key_dim), np.result_type(k, *arrays))
    initial = 0.0 if initial is None else initial
    restart = initial if restart is None else restart
    kept = state + initial
    multiplier = np.zeros(k.shape, state.dtype)
    for t in range(length):
        kept = _reset(kept, state + restart, segment_ids, t)
        u = k[:, t] ** 2
        if average is None:
            kept = kept + u
            multiplier[:, t] = 1 / (kept + 1)
            continue
        d = 1 / (kept + 1e-6)
        multiplier[:, t] = d / (np.sum(d * u, axis=-1, keepdims=True) + 1e-6) if normalize else d
        kept = average * kept + (1 - average) * u
    return multiplier, kept


def _reset(state, fresh, segment_ids, t):
    """Return fresh in the rows where a segment starts at token t > 0."""
    if segment_ids is None or t == 0:
        return state
    new = segment_ids[:, t] != segment_ids[:, t - 1]
    return np.where(new.reshape(-1, *[1] * (state.ndim - 1)), fresh, state)


def derivative(f, inputs, direction):
    """Return the derivative of f(**inputs), a dict of arrays, along the arrays in `direction`, by the complex step."""
    h = 1e-30
    moved = {name: x + 1j * h * direction[name] if name in direction else x for name, x in inputs.items()}
    return {name: x.imag / h for name, x in f(**moved).items()}
