"""Rotary positions as config.json of Transformers describes them: `rope_parameters`, or older entries for the same."""

from osdn_jax.interop.options import Options

_DEFAULT_BASE = 10_000.0  # of Transformers, where neither entry has one


def rotary(options: Options, head_dim: int, share: float, *without_effect: str) -> tuple[float | None, int | None]:
    """Return the base of the rotary frequencies (None: no positions) and the rotated channels (None: all).

    Args:
        options: the entries of config.json.
        head_dim: channels of a head.
        share: rotated share of the channels, where the config has none.
        without_effect: further keys, of `rope_parameters` or next to it, that change nothing for text.
    """
    options.without_effect("rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling", *without_effect)
    name = "rope_scaling" if options.any("rope_scaling") else "rope_parameters"
    parameters = options.section(name)
    kind = parameters.name_of("rope_type", "type")
    parameters.require(kind, "default")
    scaled = parameters.any(kind, "default") != "default"  # then the other keys belong to what is refused
    parameters.without_effect(*(parameters.config if scaled else without_effect))
    # An entry with null is another thing than none: without a base there are no positions.
    places = [place for place in (parameters, options) if "rope_theta" in place.config]
    base: float | None = _DEFAULT_BASE
    if places:
        base = places[0].number("rope_theta", None, above=1.0)
    holder = parameters if "partial_rotary_factor" in parameters else options
    share = holder.number("partial_rotary_factor", share)
    if share > 1:
        holder.problem("partial_rotary_factor", share, "a share of at most 1")
    rotated = int(head_dim * share)
    if rotated < 2 or rotated % 2:
        holder.problem("partial_rotary_factor", share, f"an even number of at least 2 of the {head_dim} channels")
        return None, None
    return base, None if base is None or rotated >= head_dim else rotated
