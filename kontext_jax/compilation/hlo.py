"""What an optimized XLA program executes: FLOPs, collectives and memory traffic, loops unrolled.

``Compiled.cost_analysis`` counts the body of a loop once. Here ``Compiled.as_text`` is read instead
and everything is multiplied by the loops around it. Numbers are those of one device.

FLOPs are two a multiply-add of products of matrices and convolutions; positions of a window that
see only padding or holes do no work (XLA's own rule), for the TPU compiler writes batched products
as such convolutions. What a custom call does is not in the text: the caller may know; other calls
are listed as ``opaque``.

A chip sends, of an operand of b bytes in a group of n: all-gather b (n - 1), reduce-scatter and
all-to-all b (n - 1) / n, all-reduce 2 b (n - 1) / n, and collective-permute b. These are what rings
need, and no algorithm needs less (Thakur et al. 2005, doi 10.1177/1094342005051521).
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_COPIES = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")
_FREE = {
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "iota",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
_BOOKKEEPING = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
}
"""Custom calls of the TPU compiler that compute nothing."""


KernelFlops = Callable[[list[tuple[int, ...]]], float]
"""FLOPs of a kernel whose operands have these shapes."""


class Traffic(NamedTuple):
    """Collectives of a kind: how many are executed, and the bytes one device sends for them."""

    count: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one device does in one call of the program.

    Attributes:
      flops: of products of matrices and convolutions.
      bytes: read from and written to the device's main memory, by every fusion and operation on
        its own, the operands of a kernel once; what stays in a TPU's vector memory is not counted.
      collectives: by kind.
      opaque: custom calls by target, whose FLOPs are in none of these.
      unknown_loops: loops whose length the text does not tell; their bodies count once.
    """

    flops: float
    bytes: float
    collectives: dict[str, Traffic]
    opaque: dict[str, float]
    unknown_loops: int


def analyse(text: str, kernels: Mapping[str, KernelFlops] | None = None) -> Cost:
    """The cost of the program that ``Compiled.as_text`` gave.

    Args:
      text: of the optimized program.
      kernels: FLOPs of custom calls, by how their names begin.

    Raises:
      ValueError: it is no HLO module with an entry computation.
    """
    program = Program(text)
    flops = traffic = 0.0
    sent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    opaque: Counter[str] = Counter()
    unknown_loops = 0
    started = _started_channels(program)
    for computation, instruction, times, fused in program.executed():
        flops += times * _flops(computation, instruction)
        if not fused:
            traffic += times * _bytes(program, computation, instruction)
        if kind := _collective(computation, instruction, started):
            sent[kind][0] += times
            sent[kind][1] += times * _sent(program, computation, instruction, kind)
        if instruction.opcode == "while":
            unknown_loops += program.trip_count(computation, instruction) is None
        if instruction.opcode == "custom-call":
            target = _attribute(instruction, r'custom_call_target="([^"]*)"') or ""
            known = next((k for k in kernels or () if instruction.name.startswith(k)), None)
            if known is not None:
                operands = (computation.instructions[name] for name in instruction.operands)
                flops += times * kernels[known]([_dims(operand.shape) for operand in operands])
            elif target not in _BOOKKEEPING:
                opaque[target] += times
    return Cost(
        flops=flops,
        bytes=traffic,
        collectives={kind: Traffic(*sent[kind]) for kind in sorted(sent)},
        opaque=dict(opaque),
        unknown_loops=unknown_loops,
    )


class Instruction(NamedTuple):
    """One line of a computation; ``shape`` and ``attributes`` are left as text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str


@dataclass
class Computation:
    """Instructions in order, by name; the root is what it returns."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """In the order in which callers give them."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads each instruction."""
        users = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operand(self, instruction: Instruction, i: int) -> Instruction:
        """Where its i-th operand comes from."""
        return self.instructions[instruction.operands[i]]


class Program:
    """A parsed module."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        partitions = re.search(r"num_partitions=(\d+)", text)
        replicas = re.search(r"replica_count=(\d+)", text)
        self.num_devices = max(int(m[1]) if m else 1 for m in (partitions, replicas))
        entry = None
        current = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations[head[2]] = Computation(head[2])
                entry = current if head[1] else entry
            elif current and (found := _INSTRUCTION.match(line)):
                instruction = _parse(found[2], found[3])
                current.instructions[instruction.name] = instruction
                current.root = instruction if found[1] else current.root
        if entry is None:
            raise ValueError("this is no HLO module: it has no entry computation.")
        self.entry = entry
        # Who runs the body of each loop, to look up what the loop started from.
        self._loops = {
            _attribute(i, r"body=%([\w.\-]+)"): (computation, i)
            for computation in self.computations.values()
            for i in computation.instructions.values()
            if i.opcode == "while"
        }

    def executed(self) -> Iterator[tuple[Computation, Instruction, float, bool]]:
        """(computation, instruction, how often, whether inside a fusion) of all that is run."""
        yield from self._executed(self.entry, 1.0, False)

    def _executed(self, computation, times, fused):
        for instruction in computation.instructions.values():
            yield computation, instruction, times, fused
            for name, factor in self._called(computation, instruction):
                inside = fused or instruction.opcode == "fusion"
                yield from self._executed(self.computations[name], times * factor, inside)

    def _called(self, computation, instruction) -> list[tuple[str, float]]:
        """Computations that it runs, and how often; of branches, each once."""
        opcode = instruction.opcode
        if opcode == "while":
            count = self.trip_count(computation, instruction)
            body = _attribute(instruction, r"body=%([\w.\-]+)")
            return [(body, 1.0 if count is None else float(count))]
        if opcode == "conditional":
            listed = _attribute(instruction, r"branch_computations=\{([^}]*)\}")
            return [(name, 1.0) for name in _NAME.findall(listed or "")] or [
                (name, 1.0) for name in _CALLED.findall(instruction.attributes)
            ]
        if opcode in ("fusion", "call", "async-start"):
            return [(name, 1.0) for name in _CALLED.findall(instruction.attributes)[:1]]
        return []  # what reductions, sorts and collectives apply to scalars

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Rounds of a loop, as XLA says or, on TPUs, as ``i = first; i < end; i += step`` gives."""
        known = _attribute(loop, r'"known_trip_count":\{"n":"(\d+)"')
        if known is not None:
            return int(known)
        condition = self.computations[_attribute(loop, r"condition=%([\w.\-]+)")]
        body = self.computations[_attribute(loop, r"body=%([\w.\-]+)")]
        test = condition.root
        if test.opcode != "compare" or _attribute(test, r"direction=(\w+)") != "LT":
            return None
        counter, bound = (condition.operand(test, i) for i in (0, 1))
        if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
            return None
        index = int(_attribute(counter, r"index=(\d+)"))
        first = self._element(computation, computation.operand(loop, 0), index)
        step = self._step(body, index)
        if first is None or not step:
            return None
        return max(0, -(-(int(bound.arguments) - first) // step))

    def _step(self, body: Computation, index: int) -> int | None:
        """By how much a round of a loop moves its state's element on."""
        if body.root.opcode != "tuple":
            return None
        new = body.operand(body.root, index)
        while new.opcode in _COPIES:
            new = body.operand(new, 0)
        if new.opcode != "add":
            return None
        steps = [self._constant(body, body.operand(new, i)) for i in (0, 1)]
        return next((step for step in steps if step is not None), None)

    def _constant(self, computation: Computation, instruction: Instruction) -> int | None:
        """The integer that an instruction gives, if it is the same every time."""
        while instruction.opcode in _COPIES:
            instruction = computation.operand(instruction, 0)
        if instruction.opcode == "constant":
            return int(instruction.arguments) if instruction.arguments.isdecimal() else None
        if instruction.opcode == "get-tuple-element":
            index = int(_attribute(instruction, r"index=(\d+)"))
            return self._element(computation, computation.operand(instruction, 0), index)
        return None

    def _element(self, computation: Computation, source: Instruction, index: int) -> int | None:
        """The same of an element of a tuple, also of one that a loop hands on unchanged."""
        if source.opcode == "tuple":
            return self._constant(computation, computation.operand(source, index))
        if source.opcode == "while":
            body = self.computations[_attribute(source, r"body=%([\w.\-]+)")]
            if self._hands_on(body, index):
                return self._element(computation, computation.operand(source, 0), index)
        elif source.opcode == "parameter" and computation.name in self._loops:
            if self._hands_on(computation, index):
                outer, loop = self._loops[computation.name]
                return self._element(outer, outer.operand(loop, 0), index)
        return None

    def _hands_on(self, body: Computation, index: int) -> bool:
        if body.root.opcode != "tuple":
            return False
        new = body.operand(body.root, index)
        return (
            new.opcode == "get-tuple-element"
            and body.operand(new, 0).opcode == "parameter"
            and int(_attribute(new, r"index=(\d+)")) == index
        )


def _parse(name: str, rest: str) -> Instruction:
    """From ``SHAPE opcode(operands), attributes``."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    arguments = rest[start + 1 : close]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, shape, rest[:start], operands, arguments, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` is closed."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _attribute(instruction: Instruction, pattern: str) -> str | None:
    found = re.search(pattern, instruction.attributes)
    return found[1] if found else None


def _dims(shape: str) -> tuple[int, ...]:
    """Of an array, or of the first one of a tuple."""
    return tuple(int(size) for size in _ARRAY.search(shape)[2].split(",") if size)


def _num_bytes(shape: str, in_main_memory: bool = False) -> float:
    """Of an array, or of all of a tuple; memory spaces other than 0 are not the main memory."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(shape):
        if in_main_memory and re.search(r"S\([1-9]", layout):
            continue
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        total += math.prod(int(size) for size in dims.split(",") if size) * bits / 8
    return total


def _flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        lhs = _dims(computation.operand(instruction, 0).shape)
        contracted = _attribute(instruction, r"lhs_contracting_dims=\{([\d,]*)\}")
        depth = math.prod(lhs[int(dim)] for dim in contracted.split(",") if dim)
        return 2.0 * math.prod(_dims(instruction.shape)) * depth
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0.0


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    shapes = (
        *(_dims(computation.operand(instruction, i).shape) for i in (0, 1)),
        _dims(instruction.shape),
    )
    lhs, rhs, out = (
        dict(zip(label, shape, strict=True)) for label, shape in zip(labels, shapes, strict=True)
    )
    groups, batch_groups = (
        int(_attribute(instruction, rf"{name}_group_count=(\d+)") or 1)
        for name in ("feature", "batch")
    )
    window = _attribute(instruction, r"window=\{([^}]*)\}") or ""
    settings = dict(part.split("=") for part in window.split())
    positions = 1
    for i in range(len(lhs) - 2):
        place = {name: value.split("x")[i] for name, value in settings.items()}
        positions *= _valid_positions(
            lhs[str(i)],
            rhs[str(i)],
            out[str(i)],
            stride=int(place.get("stride", 1)),
            padding=int(place.get("pad", "0_0").split("_")[0]),
            holes=int(place.get("lhs_dilate", 1)),
            spread=int(place.get("rhs_dilate", 1)),
        )
    return 2.0 * (lhs["f"] // groups) * rhs["o"] * (lhs["b"] // batch_groups) * positions


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    size: int, kernel: int, out: int, *, stride: int, padding: int, holes: int, spread: int
) -> int:
    """Pairs of an output and a kernel place that meet an input (XLA's HloCostAnalysis)."""
    at = np.arange(out)[:, None] * stride - padding + np.arange(kernel)[None] * spread
    return int(np.sum((at % holes == 0) & (at >= 0) & (at < size * holes)))


def _started_channels(program: Program) -> dict[str, str]:
    """Channels of collectives that a TPU carries out along with other work, and where they start.

    Such a collective stands once more in every fusion that it goes on in, and in its end.
    """
    started = {}
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            if '"AsyncCollectiveStart"' in instruction.attributes:
                start = computation.operand(instruction, 0)
                started[_attribute(start, r"channel_id=(\d+)")] = start.name
    return started


def _collective(
    computation: Computation, instruction: Instruction, started: dict[str, str]
) -> str | None:
    """Its kind, if it is a collective that is not counted elsewhere."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    channel = _attribute(instruction, r"channel_id=(\d+)")
    if started.get(channel, instruction.name) != instruction.name:
        return None
    if kind == "all-reduce":
        users = computation.users[instruction.name]
        if users and all(user.opcode == "dynamic-slice" for user in users):
            return "reduce-scatter"  # as the TPU compiler writes it
    return kind


def _sent(program: Program, computation: Computation, instruction: Instruction, kind: str) -> float:
    size = sum(
        _num_bytes(computation.instructions[operand].shape) for operand in instruction.operands
    )
    n = _group_size(instruction, program.num_devices)
    return size * {
        "all-gather": n - 1,
        "all-reduce": 2 * (n - 1) / n,
        "collective-permute": 1,
    }.get(kind, (n - 1) / n)


def _group_size(instruction: Instruction, num_devices: int) -> int:
    """Devices that take part in a collective, from each way to write it."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.attributes):
        return len(found[1].split(","))
    mesh = r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}"
    if found := re.search(mesh, instruction.attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    return num_devices


def _bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Main-memory traffic of one operation outside fusions."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-start", "-update")):
        return 0.0
    if opcode == "custom-call" and '"AllocateBuffer"' in instruction.attributes:
        return 0.0
    if opcode.endswith("-done"):  # moved from one memory to another, or between devices
        return _num_bytes(instruction.shape)
    read = 0.0
    for i in range(len(instruction.operands)):
        size = _num_bytes(computation.operand(instruction, i).shape, in_main_memory=True)
        read += min(size, _read(program, instruction, i, size))
    written = _num_bytes(instruction.shape, in_main_memory=True)
    return read + min(written, _written(program, computation, instruction))


def _read(program: Program, user: Instruction, i: int, size: float) -> float:
    """Bytes of its i-th operand, of ``size`` bytes, that an operation or fusion reads."""
    if user.opcode in _SLICES and i == 0:
        return _num_bytes(user.shape)
    if user.opcode in _UPDATES and i == 0 or user.opcode == "tuple":
        return 0.0
    if user.opcode != "fusion":
        return size
    inside = program.computations[_attribute(user, _CALLED.pattern)]
    return _read_inside(program, inside, inside.parameters[i], size)


def _read_inside(
    program: Program, computation: Computation, source: Instruction, size: float
) -> float:
    """The same of what all users inside a fusion read together."""
    total = 0.0
    for user in computation.users[source.name]:
        if user.opcode == "bitcast":
            total += _read_inside(program, computation, user, size)
        else:
            places = [i for i, name in enumerate(user.operands) if name == source.name]
            total += max(_read(program, user, i, size) for i in places)
    return min(total, size)


def _written(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an operation or fusion writes; updates are done in place."""
    if instruction.opcode == "fusion":
        inside = program.computations[_attribute(instruction, _CALLED.pattern)]
        return _written(program, inside, inside.root)
    if instruction.opcode == "tuple":
        elements = (computation.instructions[name] for name in instruction.operands)
        return sum(_written(program, computation, element) for element in elements)
    if instruction.opcode == "bitcast":
        return _written(program, computation, computation.operand(instruction, 0))
    if instruction.opcode == "dynamic-update-slice":
        return _num_bytes(computation.operand(instruction, 1).shape)
    if instruction.opcode == "parameter":  # handed on
        return 0.0
    return _num_bytes(instruction.shape)
