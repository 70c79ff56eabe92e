"""FLOPs per token: counted by hand, and by the compiler for a model of matrix products only."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from osdn_jax.nn import CausalLM, ModelConfig, mixer_config
from osdn_jax.nn.flops import per_token
from osdn_jax.nn.split import split_model

WIDTH, HEADS, SIZE, MLP, LAYERS, WORDS = 64, 2, 32, 96, 3, 50


def counted(rule, length=128, tied=True, **fields):
    mixer = mixer_config(rule, width=WIDTH, heads=HEADS, key_dim=SIZE, value_dim=SIZE, **fields)
    config = ModelConfig(vocab_size=WORDS, layers=LAYERS, mixer=mixer, mlp_dim=MLP, tied_embeddings=tied)
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    apply, parameters = split_model(model)
    return per_token(config, parameters, length), apply, parameters


@pytest.mark.parametrize("tied", [True, False])
def test_a_delta_net_by_hand(tied):
    flops, *_ = counted("delta_net", tied=tied)
    projections = 4 * WIDTH * WIDTH + WIDTH * HEADS + 4 * 3 * WIDTH  # q, k, v and output; beta; convolutions
    assert flops.matrices == LAYERS * 2 * (projections + 3 * WIDTH * MLP)
    assert flops.head == 2 * WIDTH * WORDS
    assert flops.mixing == LAYERS * 6 * HEADS * SIZE * SIZE
    assert flops.chunks == LAYERS * 4 * HEADS * 64 * (SIZE + SIZE)
    assert flops.training == 3 * (flops.matrices + flops.head + flops.mixing)


def test_chunks_and_what_is_not_erased():
    assert counted("linear_attention")[0].mixing == LAYERS * 4 * HEADS * SIZE * SIZE
    assert counted("delta_net", chunk_size=16)[0].chunks == LAYERS * 4 * HEADS * 16 * 2 * SIZE
    assert counted("delta_net", length=8)[0].chunks == LAYERS * 4 * HEADS * 8 * 2 * SIZE
    attention = counted("transformer", length=127)[0]
    assert (attention.mixing, attention.chunks) == (LAYERS * 128 * HEADS * 2 * SIZE, 0)


def test_what_rematerialisation_computes_again():
    flops, *_ = counted("osdn")
    none, blocks, full = (flops.executed(remat) for remat in ("none", "blocks", "full"))
    assert none == flops.training + 3 * flops.chunks + flops.head
    assert blocks - none == flops.mixing + flops.chunks
    assert full - none == flops.matrices + flops.mixing + flops.chunks


def test_the_compiler_counts_the_same_products():
    # With one token mixing is negligible, and the rest are matrix products. The taps see one token of four.
    length = 256
    flops, apply, parameters = counted("linear_attention", length=length)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    program = jax.jit(lambda parameters, tokens: apply(parameters, tokens)[0]).lower(parameters, tokens)
    measured = program.compile().cost_analysis()["flops"] / length
    assert flops.matrices + flops.head < measured  # elementwise work is added to it
    assert measured < 1.5 * (flops.matrices + flops.head + flops.mixing + flops.chunks)
