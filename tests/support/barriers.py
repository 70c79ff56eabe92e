"""Static check for missing barriers in a kernel, which the interpreter misses: it runs a warpgroup as one thread.

The kernels turn off the barriers that Pallas would put around every store and copy, and place their own. Between
barriers the four warps of a block run in any order, so a barrier must come between any two accesses to overlapping
shared memory of which one is a write. Between a write from registers and a read by the tensor cores or a copy it must
be `commit_smem`, which is also a fence. The interpreter checks that copies have arrived before they are read.

The check follows a kernel's jaxpr in order, with every loop body twice and every branch in turn. An index that depends
on a variable may be anywhere. A thread that overwrites elements of a matrix that it has read itself needs no barrier.
"""

import dataclasses
import math
from typing import Any

import jax

REGISTERS, PRODUCT, UNFENCED = "registers", "product", "registers, without a fence"


@dataclasses.dataclass(frozen=True)
class Place:
    """A region of an allocation in shared memory."""

    root: Any
    member: tuple  # in a union of allocations: type, shape and byte range (start, stop); () outside of a union
    key: tuple  # equal for the same region within one iteration of a loop
    intervals: tuple  # (start, stop) along every axis of the allocation; None if unknown
    matrix: bool

    def overlaps(self, other):
        if self.root is not other.root:
            return False
        if self.member != other.member:
            (a, b), (c, d) = self.member[-1], other.member[-1]
            return a < d and c < b
        if self.intervals is None or other.intervals is None:
            return True
        return all(a < d and c < b for (a, b), (c, d) in zip(self.intervals, other.intervals, strict=True))

    def is_own(self, other):
        """Return True if each thread holds the same elements of both."""
        return self.matrix and self.root is other.root and (self.member, self.key) == (other.member, other.key)


class Checker:
    """The accesses of one kernel since its last barrier, and the faults found so far."""

    def __init__(self, kernel):
        self.kernel, self.faults = kernel, []
        # Since the last barrier, as (place, accessor); writes that a barrier without a fence has followed stay, marked.
        self.reads, self.writes = set(), set()

    def check(self, kind, place, others, *, by_registers=True):
        for other, by in others:
            same_thread = by_registers and by == REGISTERS and place.is_own(other)
            if place.overlaps(other) and not same_thread:
                self.faults.append(f"{self.where}: {kind} of {place.root.aval} {place.intervals} after {by}")

    def read(self, place):
        self.check("read", place, {write for write in self.writes if write[1] != UNFENCED})
        self.reads.add((place, REGISTERS))

    def write(self, place):
        self.check("write", place, self.reads | {write for write in self.writes if write[1] != UNFENCED})
        self.writes.add((place, REGISTERS))

    def proxy_read(self, place, by):
        """Record a read by the tensor cores or by a copy."""
        self.check(by, place, self.writes, by_registers=False)
        if by == PRODUCT:
            self.reads.add((place, by))

    def arrive(self, place):
        self.check("copy into", place, self.reads | self.writes, by_registers=False)

    def barrier(self, *, fence):
        self.reads, self.writes = set(), set() if fence else {(place, UNFENCED) for place, _ in self.writes}

    def run(self, jaxpr, env):
        for eqn in jaxpr.eqns:
            self.step(eqn, env)

    def step(self, eqn, env):
        self.where = f"{self.kernel}, {line_of(eqn)}"
        name, params, args = eqn.primitive.name, eqn.params, eqn.invars
        if name in ("get", "load"):
            self.each(self.read, place(env, args[0], params["tree"], args[1:]))
        elif name in ("swap", "store"):
            self.each(self.write, place(env, args[0], params["tree"], args[2:]))
        elif name == "wgmma_ref":
            trees = [params[f"{x}_transforms_tree"] for x in ("acc", "a", "b")]
            for ref, tree, leaves in zip(args[:3], trees, leaves_of(args[3:], trees), strict=True):
                self.each(lambda x: self.proxy_read(x, PRODUCT), place(env, ref, tree, leaves))
        elif name in ("copy_gmem_to_smem", "copy_smem_to_gmem"):
            into = name == "copy_gmem_to_smem"
            kinds = ("src", "dst", "barrier") if into else ("src", "dst")
            trees = [params[f"{x}_transforms_treedef"] for x in kinds]
            leaves, which = leaves_of(args[len(kinds) :], trees), int(into)
            at = place(env, args[which], trees[which], leaves[which])
            self.each(self.arrive if into else lambda x: self.proxy_read(x, "copy out"), at)
        elif name == "commit_smem":
            self.barrier(fence=True)
        elif name == "wait_smem_to_gmem":
            self.barrier(fence=False)
        elif name == "cond":
            before, after = (self.reads, self.writes), (set(), set())
            for branch in params["branches"]:
                self.reads, self.writes = (set(x) for x in before)
                self.run(branch.jaxpr, inner(branch.jaxpr.invars, args[1:], env))
                after = after[0] | self.reads, after[1] | self.writes
            self.reads, self.writes = after
        elif name == "while":
            skip = params["cond_nconsts"]
            for _ in range(2):
                self.run(params["body_jaxpr"].jaxpr, inner(params["body_jaxpr"].jaxpr.invars, args[skip:], env))
        elif name == "run_scoped":
            self.run(params["jaxpr"], inner(params["jaxpr"].constvars, args, env))
        else:
            for value in params.values():
                body = getattr(value, "jaxpr", value)
                if hasattr(body, "eqns"):
                    for _ in range(2 if name == "scan" else 1):
                        self.run(body, inner(body.invars, args, env))

    def each(self, do, at):
        if at is not None:
            do(at)


def line_of(eqn):
    """Return the source lines in the kernels that an equation comes from, the innermost first."""
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else []
    ours = [f for f in frames if "/pallas_kernels/" in f.file_name]
    lines = [f"{f.file_name.rpartition('/pallas_kernels/')[2]}:{f.line_num}" for f in ours]
    return " < ".join(line for line in lines[:3])


def inner(variables, values, env):
    """Return the environment of a jaxpr inside another, as far as its variables are known."""
    known = zip(variables, values, strict=False)
    return {a: env.get(b, b) if hashable(b) else b for a, b in known}


def hashable(x):
    return not hasattr(x, "val")  # literals are not


def leaves_of(flat, trees):
    flat, parts = list(flat), []
    for tree in trees:
        count = 0 if tree is None else tree.num_leaves
        parts.append(flat[:count])
        flat = flat[count:]
    return parts


def place(env, ref, tree, leaves):
    """Return the region that an access touches, None if it is not in shared memory."""
    kind = str(ref.aval)
    if not kind.startswith("Ref<smem>") or "barrier" in kind:
        return None
    leaves = [leaf if hasattr(leaf, "val") else env.get(leaf, leaf) for leaf in leaves]
    transforms = () if tree is None else jax.tree.unflatten(tree, leaves)
    member, axes, intervals, key = (), None, None, []
    for transform in transforms:
        name = type(transform).__name__
        if name == "ExtractAliasedRef":
            size = math.prod(transform.shape) * transform.dtype.itemsize
            member = (str(transform.dtype), transform.shape, (transform.offset, transform.offset + size))
        elif name == "NDIndexer":
            if axes is None:
                intervals = [(0, size) for size in transform.shape]
                axes = list(range(len(transform.shape)))
            left = []
            for axis, index in zip(axes, transform.indices, strict=True):
                start, size, stays = (index.start, index.size, True) if hasattr(index, "size") else (index, 1, False)
                start = getattr(start, "val", start)
                start = int(start) if hasattr(start, "item") else start
                key.append((axis, start if isinstance(start, int) else id(start), size))
                if isinstance(start, int):
                    low = intervals[axis][0]
                    intervals[axis] = (low + start, low + start + size)
                left += [axis] * stays
            axes = left
    shape = member[1] if member else ref.aval.shape
    matrix = len(shape) > 1 and (axes is None or len(axes) > 1)
    return Place(env.get(ref, ref), member, tuple(key), intervals and tuple(intervals), matrix)


def kernels_of(jaxpr):
    """Yield (name, jaxpr, whether it places its own barriers) for every kernel in a jaxpr."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            places_barriers = eqn.params["compiler_params"].unsafe_no_auto_barriers
            for body in eqn.params["jaxprs"]:
                yield eqn.params["name"], getattr(body, "jaxpr", body), places_barriers
            continue
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else [value]:
                body = getattr(body, "jaxpr", body)
                if hasattr(body, "eqns"):
                    yield from kernels_of(body)


def faults(function, *arguments):
    """Check the kernels that a function calls.

    Returns:
        (the missing barriers, the names of the kernels that place their own barriers).
    """
    found, names = [], set()
    for name, jaxpr, places_barriers in kernels_of(jax.make_jaxpr(function)(*arguments).jaxpr):
        if places_barriers:
            checker = Checker(name)
            checker.run(jaxpr, {})
            found += checker.faults
            names.add(name)
    return list(dict.fromkeys(found)), names
