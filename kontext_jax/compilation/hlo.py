"""FLOPs, collectives and memory traffic of an optimized XLA program, counting every loop iteration.

``Compiled.cost_analysis`` counts the body of a loop once. This module parses ``Compiled.as_text``
instead, and multiplies each instruction by the trip counts of the loops around it. All numbers are
per device.

FLOPs are two per multiply-add of matrix products and convolutions. Window positions that cover only
padding or holes count as no work, as in XLA's own cost analysis: the TPU compiler writes batched
matrix products as convolutions of that kind. The text does not say what a custom call computes: the
caller may supply its FLOPs, and other calls are listed as ``opaque``.

For an operand of b bytes in a group of n devices, a device sends b (n - 1) bytes in an all-gather,
b (n - 1) / n in a reduce-scatter or all-to-all, 2 b (n - 1) / n in an all-reduce, and b in a
collective-permute. Ring algorithms send this much, and no algorithm sends less (Thakur et al. 2005,
doi 10.1177/1094342005051521).
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
"""Returns the FLOPs of a kernel, given the shapes of its operands."""


class Traffic(NamedTuple):
    """All collectives of one kind: the number executed, and the bytes that a device sends."""

    count: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one call of the program, per device.

    Attributes:
      flops: FLOPs of matrix products, convolutions and known kernels.
      bytes: main-memory traffic, summed over fusions and unfused operations, with each operand of a
        kernel counted once; data in a TPU's vector memory is not counted.
      collectives: collectives by kind.
      opaque: number of custom calls by target, whose FLOPs are not counted.
      unknown_loops: number of loops of unknown length; their bodies count once.
    """

    flops: float
    bytes: float
    collectives: dict[str, Traffic]
    opaque: dict[str, float]
    unknown_loops: int


def analyse(text: str, kernels: Mapping[str, KernelFlops] | None = None) -> Cost:
    """Returns the cost of a program, given its HLO text.

    Args:
      text: the optimized program, from ``Compiled.as_text``.
      kernels: FLOPs of custom calls, by the prefix of their names.

    Raises:
      ValueError: the text is not an HLO module with an entry computation.
    """
    program = Program(text)
    flops = traffic = 0.0
    sent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    opaque: Counter[str] = Counter()
    unknown_loops = 0
    starts = _async_starts(program)
    for computation, instruction, times, fused in program.executed():
        flops += times * _flops(computation, instruction)
        if not fused:
            traffic += times * _bytes(program, computation, instruction)
        if kind := _collective_kind(computation, instruction, starts):
            sent[kind][0] += times
            sent[kind][1] += times * _sent_bytes(program, computation, instruction, kind)
        if instruction.opcode == "while":
            unknown_loops += program.trip_count(computation, instruction) is None
        if instruction.opcode == "custom-call":
            target = _attribute(instruction, r'custom_call_target="([^"]*)"') or ""
            kernel = next((k for k in kernels or () if instruction.name.startswith(k)), None)
            if kernel is not None:
                operands = (computation.instructions[name] for name in instruction.operands)
                flops += times * kernels[kernel]([_dims(operand.shape) for operand in operands])
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
    """One line of a computation; ``shape``, ``arguments`` and ``attributes`` are unparsed text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str


@dataclass
class Computation:
    """A computation: its instructions by name, in order, and the root, which it returns."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, in the order of the caller's operands."""
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction, by its name."""
        users = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operand(self, instruction: Instruction, i: int) -> Instruction:
        """Returns the instruction that computes the i-th operand of ``instruction``."""
        return self.instructions[instruction.operands[i]]


class Program:
    """A parsed HLO module."""

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
            elif current and (match := _INSTRUCTION.match(line)):
                instruction = _parse(match[2], match[3])
                current.instructions[instruction.name] = instruction
                current.root = instruction if match[1] else current.root
        if entry is None:
            raise ValueError("The text is not an HLO module: it has no entry computation.")
        self.entry = entry
        # (computation, loop) by the loop's body, to look up the loop's initial state.
        self._loops = {
            _attribute(i, r"body=%([\w.\-]+)"): (computation, i)
            for computation in self.computations.values()
            for i in computation.instructions.values()
            if i.opcode == "while"
        }

    def executed(self) -> Iterator[tuple[Computation, Instruction, float, bool]]:
        """Yields (computation, instruction, count, whether it is fused) of all instructions run."""
        yield from self._executed(self.entry, 1.0, False)

    def _executed(self, computation, times, fused):
        for instruction in computation.instructions.values():
            yield computation, instruction, times, fused
            for name, factor in self._called(computation, instruction):
                inside = fused or instruction.opcode == "fusion"
                yield from self._executed(self.computations[name], times * factor, inside)

    def _called(self, computation, instruction) -> list[tuple[str, float]]:
        """Returns (computation, count) of what an instruction runs; each branch counts once."""
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
        return []  # reductions, sorts and collectives call computations of scalars

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns a loop's number of iterations; None if unknown.

        The TPU compiler does not state it, so it is derived from the loop counter if that has the
        form ``i = first; i < end; i += step``.
        """
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
        """Returns the constant that an iteration adds to an element of the state; None if none."""
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
        """Returns the integer that an instruction computes; None if it is not a constant."""
        while instruction.opcode in _COPIES:
            instruction = computation.operand(instruction, 0)
        if instruction.opcode == "constant":
            return int(instruction.arguments) if instruction.arguments.isdecimal() else None
        if instruction.opcode == "get-tuple-element":
            index = int(_attribute(instruction, r"index=(\d+)"))
            return self._element(computation, computation.operand(instruction, 0), index)
        return None

    def _element(self, computation: Computation, source: Instruction, index: int) -> int | None:
        """Like `_constant`, of a tuple's element, also if a loop passes it through unchanged."""
        if source.opcode == "tuple":
            return self._constant(computation, computation.operand(source, index))
        if source.opcode == "while":
            body = self.computations[_attribute(source, r"body=%([\w.\-]+)")]
            if self._passes_through(body, index):
                return self._element(computation, computation.operand(source, 0), index)
        elif source.opcode == "parameter" and computation.name in self._loops:
            if self._passes_through(computation, index):
                outer, loop = self._loops[computation.name]
                return self._element(outer, outer.operand(loop, 0), index)
        return None

    def _passes_through(self, body: Computation, index: int) -> bool:
        if body.root.opcode != "tuple":
            return False
        new = body.operand(body.root, index)
        return (
            new.opcode == "get-tuple-element"
            and body.operand(new, 0).opcode == "parameter"
            and int(_attribute(new, r"index=(\d+)")) == index
        )


def _parse(name: str, rest: str) -> Instruction:
    """Parses ``SHAPE opcode(operands), attributes``."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    arguments = rest[start + 1 : close]
    operands = tuple(_NAME.findall(arguments))
    return Instruction(name, shape, rest[:start], operands, arguments, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"Unbalanced parentheses in HLO: {text[:80]}")


def _attribute(instruction: Instruction, pattern: str) -> str | None:
    match = re.search(pattern, instruction.attributes)
    return match[1] if match else None


def _dims(shape: str) -> tuple[int, ...]:
    """Returns the dimensions of an array, or of the first array of a tuple."""
    return tuple(int(size) for size in _ARRAY.search(shape)[2].split(",") if size)


def _num_bytes(shape: str, in_main_memory: bool = False) -> float:
    """Returns the bytes of an array, or of all arrays of a tuple.

    ``in_main_memory`` counts arrays in memory space 0 only.
    """
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
        of_dim = {name: value.split("x")[i] for name, value in settings.items()}
        positions *= _valid_positions(
            lhs[str(i)],
            rhs[str(i)],
            out[str(i)],
            stride=int(of_dim.get("stride", 1)),
            padding=int(of_dim.get("pad", "0_0").split("_")[0]),
            lhs_dilation=int(of_dim.get("lhs_dilate", 1)),
            rhs_dilation=int(of_dim.get("rhs_dilate", 1)),
        )
    return 2.0 * (lhs["f"] // groups) * rhs["o"] * (lhs["b"] // batch_groups) * positions


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    size: int,
    kernel: int,
    out: int,
    *,
    stride: int,
    padding: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Counts (output, kernel position) pairs that cover an input, like XLA's HloCostAnalysis."""
    at = np.arange(out)[:, None] * stride - padding + np.arange(kernel)[None] * rhs_dilation
    return int(np.sum((at % lhs_dilation == 0) & (at >= 0) & (at < size * lhs_dilation)))


def _async_starts(program: Program) -> dict[str, str]:
    """Returns the instruction that starts each asynchronous TPU collective, by its channel.

    The collective is repeated in every fusion that overlaps with it and where it ends; only its
    start is counted.
    """
    starts = {}
    for computation in program.computations.values():
        for instruction in computation.instructions.values():
            if '"AsyncCollectiveStart"' in instruction.attributes:
                start = computation.operand(instruction, 0)
                starts[_attribute(start, r"channel_id=(\d+)")] = start.name
    return starts


def _collective_kind(
    computation: Computation, instruction: Instruction, starts: dict[str, str]
) -> str | None:
    """Returns the kind of a collective; None for other instructions and for repeated ones."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    channel = _attribute(instruction, r"channel_id=(\d+)")
    if starts.get(channel, instruction.name) != instruction.name:
        return None
    if kind == "all-reduce":
        users = computation.users[instruction.name]
        if users and all(user.opcode == "dynamic-slice" for user in users):
            return "reduce-scatter"  # as the TPU compiler writes it
    return kind


def _sent_bytes(
    program: Program, computation: Computation, instruction: Instruction, kind: str
) -> float:
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
    """Returns the number of devices in a group of a collective, in any of HLO's notations."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", instruction.attributes):
        return len(match[1].split(","))
    mesh = r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}"
    if match := re.search(mesh, instruction.attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    return num_devices


def _bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Returns the main-memory traffic of an instruction that is not inside a fusion."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-start", "-update")):
        return 0.0
    if opcode == "custom-call" and '"AllocateBuffer"' in instruction.attributes:
        return 0.0
    if opcode.endswith("-done"):  # a copy between memories, or between devices
        return _num_bytes(instruction.shape)
    read = 0.0
    for i in range(len(instruction.operands)):
        size = _num_bytes(computation.operand(instruction, i).shape, in_main_memory=True)
        read += min(size, _read_bytes(program, instruction, i, size))
    written = _num_bytes(instruction.shape, in_main_memory=True)
    return read + min(written, _written_bytes(program, computation, instruction))


def _read_bytes(program: Program, user: Instruction, i: int, size: float) -> float:
    """Returns the bytes that an instruction reads of its i-th operand, which has ``size`` bytes."""
    if user.opcode in _SLICES and i == 0:
        return _num_bytes(user.shape)
    if user.opcode in _UPDATES and i == 0 or user.opcode == "tuple":
        return 0.0
    if user.opcode != "fusion":
        return size
    fused = program.computations[_attribute(user, _CALLED.pattern)]
    return _fusion_read_bytes(program, fused, fused.parameters[i], size)


def _fusion_read_bytes(
    program: Program, computation: Computation, source: Instruction, size: float
) -> float:
    """Returns the bytes of ``source`` that all its users inside a fusion read together."""
    total = 0.0
    for user in computation.users[source.name]:
        if user.opcode == "bitcast":
            total += _fusion_read_bytes(program, computation, user, size)
        else:
            indices = [i for i, name in enumerate(user.operands) if name == source.name]
            total += max(_read_bytes(program, user, i, size) for i in indices)
    return min(total, size)


def _written_bytes(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes that an instruction writes; updates are in place."""
    if instruction.opcode == "fusion":
        fused = program.computations[_attribute(instruction, _CALLED.pattern)]
        return _written_bytes(program, fused, fused.root)
    if instruction.opcode == "tuple":
        elements = (computation.instructions[name] for name in instruction.operands)
        return sum(_written_bytes(program, computation, element) for element in elements)
    if instruction.opcode == "bitcast":
        return _written_bytes(program, computation, computation.operand(instruction, 0))
    if instruction.opcode == "dynamic-update-slice":
        return _num_bytes(computation.operand(instruction, 1).shape)
    if instruction.opcode == "parameter":  # forwarded
        return 0.0
    return _num_bytes(instruction.shape)
