"""Spills inside of loops, found in the machine code of a kernel.

The assembler says how many bytes a kernel spills, but not where. Outside of loops a spill costs a few cycles once; in a
loop over chunks it is paid for every chunk.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_LABEL = re.compile(r"^([\w$.]+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_REFERENCE = re.compile(r"`\(([\w$.]+)\)")
_LOCAL = ("LDL", "STL")  # loads and stores of local memory, which is where spills are
_ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX", "KILL")  # without a predicate nothing runs after them


class Spills(NamedTuple):
    """Instructions that load or store spilled values.

    Attributes:
        inside: of a loop.
        outside: of every loop.
    """

    inside: int
    outside: int


class _Instruction(NamedTuple):
    predicated: bool
    opcode: str  # without modifiers
    operands: str


def spills(text: str) -> Spills:
    """Return the number of spill instructions of a kernel inside and outside of loops.

    An instruction is in a loop if the program can reach it again from itself, by the branches in the code. Loads and
    stores of arrays in local memory count too; a kernel that Triton has compiled has none.

    Args:
        text: what `nvdisasm -c` prints of a cubin.

    Raises:
        ValueError: there is no code in the text, or it branches to addresses that are only known when it runs.
    """
    code, labels = _read(text)
    if not code:
        raise ValueError("got no machine code, expected the output of nvdisasm -c")
    looping = _in_cycles(_successors(code, labels))
    local = [i for i, instruction in enumerate(code) if instruction.opcode in _LOCAL]
    inside = sum(i in looping for i in local)
    return Spills(inside, len(local) - inside)


def _read(text: str) -> tuple[list[_Instruction], dict[str, int]]:
    """Return the instructions and, by label, the index of the instruction after it."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(_Instruction(found[1] is not None, found[2].partition(".")[0], found[3]))
    return code, labels


def _successors(code: Sequence[_Instruction], labels: Mapping[str, int]) -> list[list[int]]:
    """Return the instructions that may run after each one."""
    returns = [i + 1 for i, instruction in enumerate(code) if instruction.opcode == "CALL"]
    joins: dict[str, list[int]] = {}  # where threads wait for each other, by barrier
    for instruction in code:
        if instruction.opcode == "BSSY":
            barrier = instruction.operands.partition(",")[0]
            joins.setdefault(barrier, []).extend(_targets(instruction, labels))
    found = []
    for i, instruction in enumerate(code):
        after = [] if instruction.opcode in _ENDS and not instruction.predicated else [i + 1]
        match instruction.opcode:
            case "BRA" | "CALL" | "JMP":
                after += _targets(instruction, labels)
            case "RET":
                after += returns
            case "BSYNC" | "BREAK":
                after += joins.get(instruction.operands.strip().rpartition(" ")[2], [])
            case "BRX" | "JMX":
                raise ValueError(f"got {instruction.opcode}, expected branches to addresses that the code names")
        found.append([j for j in after if j < len(code)])
    return found


def _targets(instruction: _Instruction, labels: Mapping[str, int]) -> list[int]:
    found = [labels[name] for name in _REFERENCE.findall(instruction.operands) if name in labels]
    if not found:
        raise ValueError(f"got {instruction.opcode} {instruction.operands.strip()}, expected a label in the code")
    return found


def _in_cycles(successors: Sequence[Sequence[int]]) -> set[int]:
    """Return the nodes of a directed graph that can reach themselves: Tarjan's algorithm, without recursion."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    looping: set[int] = set()
    for root in range(len(successors)):
        work = [(root, iter(successors[root]))] if root not in order else []
        while work:
            node, rest = work[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
                on_stack.add(node)
            for other in rest:
                if other not in order:
                    work.append((other, iter(successors[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], order[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component: list[int] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                    on_stack.difference_update(component)
                    if len(component) > 1 or node in successors[node]:
                        looping.update(component)
    return looping
