"""The hypergradient preconditioner of OSDN: a diagonal step size per key channel, learned inside the sequence."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, collectives, hypergradient_chunk, hypergradient_context, mosaic_gpu
from osdn_jax.ops.containment import contained, scan_in_blocks
from osdn_jax.ops.gram import write_key
from osdn_jax.ops.hypergradient_chunk import Bounds, Start, Tokens
from osdn_jax.ops.selection import on_cpu
from osdn_jax.ops.shards import over_shards
from osdn_jax.ops.tiling import fitting_chunk, from_chunks, to_chunks

_EPSILON = 1e-5
_DEFAULT_CHUNK = 64

Implementation = Callable[..., tuple[jax.Array, jax.Array]]


class Options(NamedTuple):
    """What is static in a call."""

    bounds: Bounds
    chunk_size: int | None
    context_axis: str | None
    multiply: bool


class Call(NamedTuple):
    """The arrays of a call."""

    k: jax.Array  # [B, T, P, K]
    tokens: Tokens
    start: Start


def _scan(
    k: jax.Array, tokens: Tokens, start: Start, bounds: Bounds, chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    del k, chunk_size  # the tokens have k squared, and the scan has no chunks
    final, used = hypergradient_chunk.token_by_token(start.initial, tokens, start, bounds)
    return used, final


def _chunk(
    k: jax.Array, tokens: Tokens, start: Start, bounds: Bounds, chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    del k
    length = tokens.u.shape[1]
    size = fitting_chunk(chunk_size or _DEFAULT_CHUNK, length)
    chunks = jax.tree.map(lambda x: to_chunks(x, size), tokens)
    final, used = hypergradient_chunk.chunked(start.initial, chunks, start, bounds)
    return from_chunks(used, length), final


def _contained(
    run: Implementation,
    k: jax.Array,
    tokens: Tokens,
    start: Start,
    bounds: Bounds,
    chunk_size: int | None,
    **options: bool,
) -> tuple[jax.Array, jax.Array]:
    """The call by run, and a document in it that is not finite by the scan."""

    def fast(call: Call, restarts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return run(call.k, call.tokens._replace(restart=restarts), call.start, bounds, chunk_size, **options)

    def exact(call: Call, restarts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        tokens = call.tokens._replace(restart=restarts)
        final, used = hypergradient_chunk.token_by_token(
            call.start.initial, tokens, call.start, bounds, loop=scan_in_blocks
        )
        return write_key(used, call.k) if options.get("multiply") else used, final

    return contained(fast, exact, Call(k, tokens._replace(restart=None), start), tokens.restart)


# A new kernel joins here: (k, Tokens, Start, bounds, chunk_size) -> (d before each token [B, T, P, K], final d).
# Those of Mosaic GPU take multiply=True, too, for write keys and not d.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "scan": _scan,
    "chunk": functools.partial(_contained, _chunk),
    "mosaic_gpu": functools.partial(_contained, mosaic_gpu.hypergradient),
    "mosaic_gpu_interpret": functools.partial(_contained, functools.partial(mosaic_gpu.hypergradient, interpret=True)),
}


def hypergradient_preset(name: str) -> dict[str, object]:
    """Keyword arguments eta, bounds and initial of the two published settings.

    "paper" (arXiv 2605.13473): eta 1, bounds (0, 1e9), d_0 = 0, so that the first token writes nothing.
    "trust": eta 0.003, bounds (2/3, 3/2), d_0 = 1: never far from plain DeltaNet.

    Raises:
        ValueError: another name.
    """
    presets: dict[str, dict[str, object]] = {
        "paper": {"eta": 1.0, "bounds": (0.0, 1e9), "initial": 0.0},
        "trust": {"eta": 0.003, "bounds": (2 / 3, 3 / 2), "initial": 1.0},
    }
    if name not in presets:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(sorted(presets))}")
    return presets[name]


def hypergradient_preconditioner(
    k: Float[Array, "B T Hk K"],
    beta: Float[Array, "B T Hk"] | None = None,
    *,
    eta: float,
    log_forget: Float[Array, "B T Hk"] | None = None,
    initial: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    anchor: Float[Array, "Hk K"] | float = 0.0,
    bounds: tuple[float, float] | None = None,
    normalize: bool = False,
    restart: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Diagonal preconditioner by hypergradient feedback, with Adaptive Preconditioner Forgetting (arXiv 2605.13473).

    The write key of token t is d_t * k_t. After that write the token's residual is (1 - beta <d_t, k_t^2>) times what
    it was, so the hypergradient of the squared residual needs nothing but d and u_t = k_t^2:

        d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + eta b_t (1 - b_t <d_t, u_t>) u_t),    g_t = exp(log_forget_t)

    Args:
        k: keys, [B, T, Hk, K], as the delta rule reads them (L2-normalised in the paper).
        beta: b_t, the write strengths, one per key head [B, T, Hk]; None is 1, the paper's first form.
        eta: step size of the preconditioner.
        log_forget: log of g_t, [B, T, Hk], at most 0; -inf forgets everything, None nothing.
        initial: d_0, [B, Hk, K], [Hk, K] or a number; default 0. It is used as it is, outside the bounds too.
        anchor: what forgetting draws d toward, [Hk, K] or a number: 0 in the paper, 1 for plain DeltaNet.
        bounds: (lo, hi) of the projection of every update, or None for no projection; either may be infinite. The
            projection is exact, token by token, in every implementation.
        normalize: divides the update by sum(u_t) + 1e-5.
        restart: what documents that start inside the sequence begin with; default `initial`. Differs from it where
            `initial` is the state carried over from an earlier piece of the sequence.
        segment_ids: [B, T], packed documents: the state restarts where the id changes.
        chunk_size: tokens per chunk of the implementations that have chunks; default 64.
        implementation: "scan" (the specification), "chunk", "mosaic_gpu" (kernels for Hopper GPUs: K of 64, 128 or
            256), "mosaic_gpu_interpret" (the same kernels on any machine, slowly), or None for the
            fastest of "scan" and "chunk" here.
        context_axis: as for `delta_rule`. The devices work at once where no projection binds in any of their tokens,
            and in order, one after the other, where one does.

    Returns:
        (d [B, T, Hk, K], at each token before that token's update; d after the last token [B, Hk, K]), float32, or
        float64 where an input is.

    Raises:
        ValueError: a shape does not fit k, bounds are empty, chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected kind.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.
    """
    return preconditioned(
        k,
        beta,
        eta=eta,
        log_forget=log_forget,
        initial=initial,
        anchor=anchor,
        bounds=bounds,
        normalize=normalize,
        restart=restart,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
        multiply=False,
    )


def preconditioned(
    k: jax.Array,
    beta: jax.Array | None = None,
    *,
    eta: float,
    log_forget: jax.Array | None = None,
    initial: jax.Array | float | None = None,
    anchor: jax.Array | float = 0.0,
    bounds: tuple[float, float] | None = None,
    normalize: bool = False,
    restart: jax.Array | float | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
    multiply: bool,
) -> tuple[jax.Array, jax.Array]:
    """`hypergradient_preconditioner`, or with multiply the write keys, in the type of k, which kernels make at once."""
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = collectives.check_axis(context_axis)
    bounds = checks.bounds(bounds)
    eta = checks.number("eta", eta)
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, length, heads, key_dim = k.shape
    if beta is not None:
        beta = checks.shaped_array("beta", beta, (batch, length, heads), "[B, T, Hk], one per key head")
    if log_forget is not None:
        log_forget = checks.shaped_array("log_forget", log_forget, (batch, length, heads), "[B, T, Hk]")
    normalize = checks.flag("normalize", normalize)
    shapes: list[tuple[int, ...]] = [(batch, heads, key_dim), (heads, key_dim), ()]
    layout = "a number, [Hk, K] or [B, Hk, K]"
    floats = {"initial": initial, "anchor": anchor, "restart": restart}
    arrays = {name: _state(name, x, shapes, layout) for name, x in floats.items()}
    dtype = checks.accumulator_dtype(k, beta, log_forget, *(x for x in arrays.values() if isinstance(x, jax.Array)))

    def full(x: jax.Array | float | None) -> jax.Array:
        if not isinstance(x, jax.Array):
            x = jnp.full((), 0.0 if x is None else x, dtype)
        state = jnp.broadcast_to(x.astype(dtype), shapes[0])
        return checks.varying_like(state, *tokens)

    restarts = None
    if segment_ids is not None:
        restarts = checks.restarts(checks.segment_ids(segment_ids, (batch, length)), context_axis)
    if log_forget is not None:
        log_forget = checks.bounded_log(log_forget.astype(dtype))
    u = jnp.square(k.astype(dtype))
    b = None if beta is None else beta.astype(dtype)
    step = jnp.full(u.shape[:-1], eta, dtype) if b is None else eta * b
    if normalize:
        step = step / (jnp.sum(u, axis=-1) + _EPSILON)
    tokens = Tokens(
        u=u,
        beta=b,
        step=step,
        log_forget=log_forget,
        restart=restarts,
    )
    # Without forgetting nothing is drawn anywhere, and an anchor of 0 draws by forgetting alone.
    anchored = log_forget is not None and not (checks.is_number(anchor) and anchor == 0)
    start = Start(
        initial=full(arrays["initial"]),
        restart=full(arrays["initial"] if restart is None else arrays["restart"]),
        anchor=full(arrays["anchor"]) if anchored else None,
    )
    name = implementation or _fastest(k, tokens, chunk_size)
    by_kernel = multiply and name.startswith("mosaic_gpu") and context_axis is None
    call, options = Call(k, tokens, start), Options(bounds, chunk_size, context_axis, multiply=by_kernel)
    static = (IMPLEMENTATIONS[name], options)
    out, final = over_shards(_by_implementation, static, call, _axes(call), ("bthk", "bhk"), _names(call))
    return (write_key(out, k) if multiply and not by_kernel else out), final


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_implementation(run: Implementation, options: Options, call: Call) -> tuple[jax.Array, jax.Array]:
    """Compiles once for equal calls, also where nothing around it is under jit."""
    if options.context_axis is not None:
        run = functools.partial(run, chunk_size=options.chunk_size)
        return hypergradient_context.split_over(run, *call, options.bounds, options.context_axis)
    more = {"multiply": True} if options.multiply else {}
    return run(*call, options.bounds, options.chunk_size, **more)


def _axes(call: Call) -> Call:
    """A letter for each axis of each array, as `over_shards` reads them."""
    gates = Tokens(u="bthk", beta="bth", step="bth", log_forget="bth", restart="bt")  # type: ignore[arg-type]
    tokens = [axes if x is not None else None for axes, x in zip(gates, call.tokens, strict=True)]
    start = [None if x is None else "bhk" for x in call.start]
    return Call("bthk", Tokens(*tokens), Start(*start))  # type: ignore[arg-type]


def _names(call: Call) -> list[str]:
    """What a user calls the arguments that the arrays come from."""
    tokens = zip(("k", "beta", "beta", "log_forget", "segment_ids"), call.tokens, strict=True)
    start = zip(("initial", "restart", "anchor"), call.start, strict=True)
    return ["k", *(name for name, x in (*tokens, *start) if x is not None)]


def _fastest(k: jax.Array, tokens: Tokens, chunk_size: int | None) -> str:
    if mosaic_gpu.by_default() and mosaic_gpu.hypergradient_limitation(k, tokens, chunk_size) is None:
        return "mosaic_gpu"
    # One token costs a CPU a few hundred nanoseconds, less than its share of a chunk's small products.
    return "scan" if on_cpu() else "chunk"


def _state(name: str, value: object, shapes: list[tuple[int, ...]], layout: str) -> jax.Array | float | None:
    if value is None:
        return None
    if checks.is_number(value):
        return checks.number(name, value)  # it takes the type of the state, not that of an array of its own
    return checks.shaped_array(name, value, shapes, layout)
