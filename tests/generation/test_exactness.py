"""Prefill and steps are the whole forward pass, in batches too; a row depends on itself alone."""

import functools

import jax
import numpy as np
import pytest

from osdn_jax.generation import Generator
from osdn_jax.nn import RULES
from support import relative_error
from support.continuations import MODELS, STACKS, language_model, logits_after, prompts

# All places at which a text can start in a batch that is read in two pieces of 16 tokens: in the first piece, in a
# later one, at the borders of pieces (n - 1 tokens are read: 16 and 32), and after all of them.
LENGTHS = (1, 2, 5, 16, 17, 18, 33, 30)
STEPS = 12
FILTERS = {"temperature": 1.3, "top_k": 12, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
SAMPLED = {"max_tokens": STEPS, **FILTERS}


@functools.cache
def generator(name):
    return Generator(language_model(name), piece=16)


def test_every_rule_is_in_a_stack():
    assert sorted(rule for rules in STACKS.values() for rule in rules) == sorted(RULES)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_steps_are_the_whole_forward_pass(name):
    texts = prompts(*LENGTHS)
    state = generator(name).prefill(texts)
    assert relative_error(generator(name).logits(state), logits_after(name, texts)) < 1e-5
    found = generator(name).generate([[]] * len(texts), state=state, max_tokens=STEPS, temperature=0.0)
    for step in range(STEPS):
        so_far = [text + row.tokens[:step] for text, row in zip(texts, found, strict=True)]
        likeliest = logits_after(name, so_far).argmax(axis=-1)
        assert [row.tokens[step] for row in found] == likeliest.tolist()
    again = generator(name).generate(texts, max_tokens=STEPS, temperature=0.0)
    assert again == found


@pytest.mark.parametrize("name", ["osdn", "latent_experts"])
def test_a_row_depends_on_itself_alone(name):
    """Not on its neighbours, nor its place, nor the padding; each has its own options and seed."""
    texts, order = prompts(*LENGTHS), [5, 0, 7, 2]
    options = {
        **SAMPLED,
        "temperature": np.linspace(0, 1.5, len(texts)),
        "top_k": [0, 3, 5, 0, 9, 1, 0, 4],
        "seed": [2**40 + 3 * row for row in range(len(texts))],
        "max_tokens": [STEPS - row % 3 for row in range(len(texts))],
    }
    together = generator(name).generate(texts, **options)
    some = {key: [value[row] for row in order] if np.ndim(value) else value for key, value in options.items()}
    assert generator(name).generate([texts[row] for row in order], **some) == [together[row] for row in order]
    single = {key: value[3] if np.ndim(value) else value for key, value in options.items()}
    assert generator(name).generate([texts[3]], **single) == [together[3]]
    assert len({tuple(row.tokens) for row in together}) > 4


def test_one_seed_gives_the_prompts_the_seeds_that_follow_it():
    [text] = prompts(7)
    three = generator("osdn").generate([text] * 3, seed=2**64 - 2, **SAMPLED)
    apart = [generator("osdn").generate([text], seed=seed, **SAMPLED)[0] for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert three == apart
    assert len({tuple(row.tokens) for row in three}) == 3


def compilations():
    """Return a list to which the name of everything that XLA compiles from now on is added."""
    names = []

    def heard(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(more.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(heard)
    return names


@pytest.mark.parametrize("name", ["delta_net", "delta_attention"])
def test_requests_of_one_bucket_compile_nothing_new(name):
    fresh = Generator(language_model(name), piece=16)
    fresh.generate(prompts(3, 20, 39), max_tokens=5, temperature=0.0)
    before, compiled = fresh.compilations, compilations()
    fresh.generate(prompts(33, 2, 17, seed=1), max_tokens=7, **FILTERS)
    fresh.generate(prompts(38, 35, 1, seed=2), max_tokens=[1, 8, 3], forbidden=[1, 2], stop_tokens=[4], seed=[1, 2, 3])
    assert (compiled, fresh.compilations) == ([], before)
    fresh.generate(prompts(3), max_tokens=5)
    assert len(compiled) > 0
    assert fresh.compilations > before


@pytest.mark.parametrize("name", ["osdn", "window"])
def test_the_state_and_the_step_do_not_depend_on_the_position(name):
    """At token 100,000 the state has the size that it has at token 10, and the same programs run."""
    model = generator(name)
    state = model.prefill(prompts(10))
    model.generate([[1]], state=state, max_tokens=3, seed=4)
    far = state._replace(length=np.asarray([100_000], np.int32))
    far = far._replace(blocks=jax.tree.map(lambda x: _far(x), far.blocks))
    before = model.compilations
    if name == "osdn":
        compiled = compilations()
        assert len(model.generate([[1]], state=far, max_tokens=3, seed=4)[0].tokens) == 3
        assert (compiled, model.compilations) == ([], before)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s.blocks) for s in (model.prefill(prompts(40)), state)]
    assert shapes[0] == shapes[1]


def _far(x):
    return x + 99_990 if x.ndim == 0 else x


def test_other_pieces_and_batches_give_the_same():
    texts = prompts(*LENGTHS)
    want = generator("osdn").generate(texts, seed=3, **SAMPLED)
    assert Generator(language_model("osdn"), piece=32, batch_size=3).generate(texts, seed=3, **SAMPLED) == want
    short = [text for text in texts if len(text) == 5]
    by_token = Generator(language_model("osdn"), token_by_token=64)
    assert by_token.generate(short, seed=5, **SAMPLED) == [want[2]]
    assert by_token.compilations == 2  # the start and the loop
