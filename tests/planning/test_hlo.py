"""Collectives parsed from texts of the compiler, and from programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from osdn_jax.planning.hlo import Collective, parse

# Shortened output of the compiler for GPUs: asynchronous forms, nested loops, three notations of groups.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %gather-start = ((bf16[8,4]{1,0}), bf16[8,32]{0,1}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], \
dimensions={1}, use_global_device_ids=true
  %gather-done = bf16[8,32]{0,1} all-gather-done(%gather-start)
}

%inner_condition (p: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer_body.1 (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %while.1 = (s32[], /*index=1*/bf16[8,4]{1,0}) while(%t), condition=%inner_condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %scatter = (f32[2,4]{1,0}, f32[5]{0}) reduce-scatter(%y, %z), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, to_apply=%add
}

%wrapped (q: f32[16]) -> f32[16] {
  ROOT %exchange = f32[16]{0} all-to-all(%q), channel_id=5, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

ENTRY %main (a: f32[16]) -> f32[] {
  %while.2 = (s32[], bf16[8,4]{1,0}) while(%s), condition=%inner_condition, body=%outer_body.1, \
backend_config={"known_trip_count":{"n":"5"}}
  %kernel = f32[16]{0} custom-call(%a), custom_call_target="mosaic_gpu_v2", backend_config={code="all-gather(%x)"}
  %sum-start = ((f32[7]{0}), f32[7]{0}) all-reduce-start(%r), channel_id=3, \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, use_global_device_ids=true, to_apply=%add
  %alone = f32[9]{0} all-reduce(%r), channel_id=4, replica_groups=[8,1]<=[8], to_apply=%add
  %exchange-start = ((f32[16]{0}), f32[16]{0}, u32[]) async-start(%a), calls=%wrapped
  %shift-start = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=6, \
source_target_pairs={{0,1},{1,2},{2,3}}
  ROOT %all = f32[] all-reduce(%r), channel_id=7, replica_groups={}, to_apply=%add
}
""".replace("\\\n", "")

EIGHT = (tuple(range(8)),)
HALVES = ((0, 1, 2, 3), (4, 5, 6, 7))


def test_reads_every_form():
    found = parse(TEXT, 8)
    assert found.uncounted_loops == 0
    assert set(found.collectives) == {
        Collective("all-gather", EIGHT, 8 * 32 * 2, 15),
        Collective("reduce-scatter", HALVES, (8 + 5) * 4 * 4, 5),
        Collective("all-reduce", HALVES, 7 * 4, 1),
        Collective("all-to-all", ((0, 4), (1, 5), (2, 6), (3, 7)), 16 * 4, 1),
        Collective("collective-permute", ((0, 1), (1, 2), (2, 3)), 6 * 4, 1),
        Collective("all-reduce", EIGHT, 4, 1),
    }


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    found = parse(TEXT.replace('"known_trip_count":{"n":"5"}', ""), 8)
    assert found.uncounted_loops == 1
    assert Collective("all-gather", EIGHT, 512, 3) in found.collectives


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("mesh['x'=8] {'x'}", EIGHT),
        ("mesh['data'=2,'fsdp'=4] {'data'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['data'=2,'fsdp'=2,'t'=2] {'data','t'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=8] {'x':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=8] {'x':(2)4}", HALVES),
        ("[2,4]<=[8]", HALVES),
        ("{{0,1,2,3},{4,5,6,7}}", HALVES),
    ],
)
def test_reads_groups(notation, groups):
    text = TEXT.replace("mesh['data'=2,'fsdp'=4] {'fsdp'}", notation)
    (found,) = (one for one in parse(text, 8).collectives if one.size == 28)
    assert found.groups == groups


def test_another_notation_is_refused():
    with pytest.raises(ValueError, match="replica_groups: got .*mesh.*no notation that is known"):
        parse(TEXT.replace("mesh['data'=2,'fsdp'=4] {'fsdp'}", "mesh[@hosts] {'fsdp'}"), 8)
    with pytest.raises(ValueError, match="expected one with an ENTRY"):
        parse("module @jit_step {\n}", 8)


def test_bytes_sent_along_a_ring():
    sent = lambda kind, groups: Collective(kind, groups, size=800, count=2).sent
    assert sent("all-gather", EIGHT) == sent("reduce-scatter", EIGHT) == sent("all-to-all", EIGHT) == 2 * 700
    assert sent("all-reduce", EIGHT) == 2 * 1400
    assert sent("all-reduce", HALVES) == 2 * 1200
    assert sent("collective-permute", ((0, 1), (1, 2))) == 2 * 800


def test_groups_that_span_hosts():
    hosts = [0, 0, 0, 0, 1, 1, 1, 1]
    over = lambda *groups: Collective("all-reduce", groups, 1, 1).per_host(hosts)
    assert over(*HALVES) is None
    assert over(*EIGHT) == 4
    assert over((0, 4), (1, 5), (2, 6), (3, 7)) == 1
    assert over((0, 1, 4, 5), (2, 3, 6, 7)) == 2


def test_a_compiled_loop():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(w, x):
        def layer(x, _):
            whole = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        return jax.lax.psum(jnp.sum(jax.lax.scan(layer, x, None, length=6)[0]), ("data", "fsdp"))

    split = jax.shard_map(body, mesh=mesh, in_specs=(P("fsdp"), P(("data", "fsdp"))), out_specs=P(), check_vma=False)
    w, x = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    found = parse(jax.jit(split).lower(w, x).compile().as_text(), 8)
    gathers = [one for one in found.collectives if one.kind == "all-gather"]
    assert sum(one.count for one in gathers) in (1, 6)  # the compiler may hoist it out of the loop
    assert {(one.size, one.groups) for one in gathers} == {(16 * 16 * 4, HALVES)}
    (total,) = (one for one in found.collectives if one.kind == "all-reduce")
    assert (total.size, total.count, total.groups) == (4, 1, EIGHT)


def test_a_compiled_loop_counts_its_collectives():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(x):
        def step(x, _):
            return jnp.tanh(jax.lax.psum(x, "x") + x), None  # each depends on the previous one

        return jax.lax.scan(step, x, None, length=6)[0]

    split = jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    text = jax.jit(split).lower(jax.ShapeDtypeStruct((8, 32), jnp.float32)).compile().as_text()
    (found,) = parse(text, 8).collectives
    assert (found.kind, found.size, found.count, found.groups) == ("all-reduce", 32 * 4, 6, EIGHT)
    assert found.sent == 6 * 2 * 128 * 7 / 8
