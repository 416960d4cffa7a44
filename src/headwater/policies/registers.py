"""Sixteen float32 numbers that lie side by side, as a value inside numba's functions.

Numba leaves it to LLVM to find what can be done side by side, and with short loops of known length it unrolls them
first and then finds nothing. These say it outright, in LLVM's vectors, which fit one register of AVX-512, two of AVX2
and four of NEON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

SUMS = 16 if binding.get_host_cpu_features().get("avx512f") else 4
"""Registers' worth of sums that a processor can keep while it adds to them: AVX-512 has 32 registers of this size, AVX2
and NEON have room for 8.
"""

_lowered: Any = intrinsic


class _Register(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


_register = _Register()


@register_model(_Register)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, _FLOATS)  # type: ignore[no-untyped-call]


def _operation(count: int, emit: Callable[..., Any]) -> Any:
    """A function of `count` registers that gives one."""
    takes = [_register] * count

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    if count == 1:
        return _lowered(lambda typing, x: (_register(*takes), code))
    if count == 2:
        return _lowered(lambda typing, x, y: (_register(*takes), code))
    return _lowered(lambda typing, x, y, z: (_register(*takes), code))


def _constant(type_: Any, number: float) -> Any:
    return ir.Constant(type_, [number] * LANES)


def _emit_multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")  # type: ignore[no-untyped-call]
    return builder.call(function, [x, y, z])


def _in_every_lane(builder: Any, number: Any, kind: Any = _FLOATS) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * LANES))


def _emit_power_of_two(builder: Any, x: Any) -> Any:
    lowest = _constant(_FLOATS, -127.0)
    x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
    whole = builder.fptosi(builder.fsub(x, _constant(_FLOATS, 0.5)), _INTEGERS)
    rest = builder.fsub(x, builder.sitofp(whole, _FLOATS))
    y = _constant(_FLOATS, _POWER_OF_TWO[0])
    for coefficient in _POWER_OF_TWO[1:]:
        y = _emit_multiply_add(builder, y, rest, _constant(_FLOATS, coefficient))
    bits = builder.shl(builder.add(whole, _constant(_INTEGERS, 127)), _constant(_INTEGERS, 23))
    return builder.fmul(y, builder.bitcast(bits, _FLOATS))


# Coefficients of 2^x on [-1/2, 1/2], highest first, for the least relative error that leaves 1 at 0: 2e-9.
_POWER_OF_TWO = (0.00015353362, 0.0013398875, 0.00961843692, 0.0555033237, 0.240226477, 0.693147182, 1.0)

_ZERO, _EXPONENT = _constant(_FLOATS, 0.0), _constant(_INTEGERS, 0x7F800000)


def _emit_exponent(builder: Any, x: Any) -> Any:
    bits = builder.and_(builder.bitcast(x, _INTEGERS), _EXPONENT)
    return builder.sitofp(builder.sub(builder.lshr(bits, _constant(_INTEGERS, 23)), _constant(_INTEGERS, 127)), _FLOATS)


def _emit_unit(builder: Any, x: Any) -> Any:
    bits = builder.and_(builder.bitcast(x, _INTEGERS), _EXPONENT)
    return builder.bitcast(builder.sub(_constant(_INTEGERS, 254 << 23), bits), _FLOATS)


add = _operation(2, lambda builder, x, y: builder.fadd(x, y))
subtract = _operation(2, lambda builder, x, y: builder.fsub(x, y))
multiply = _operation(2, lambda builder, x, y: builder.fmul(x, y))
multiply_add = _operation(3, _emit_multiply_add)
maximum = _operation(2, lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))
where_positive = _operation(2, lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, _ZERO), y, _ZERO))
"""y where x > 0, else 0."""
reciprocal = _operation(1, lambda builder, x: builder.fdiv(_constant(_FLOATS, 1.0), x))
power_of_two = _operation(1, _emit_power_of_two)
"""2^x for x <= 0 to a relative error of 2e-7, and 0 below -126.5: bits of the exponent times a polynomial."""

exponent = _operation(1, _emit_exponent)
"""The exponent e of x = m 2^e, 1 <= m < 2, for x > 0; -127 for 0."""
power_to_unit = _operation(1, _emit_unit)
"""2^-e for that e, by which x becomes m, exactly."""


@_lowered
def broadcast(typing, number):  # type: ignore[no-untyped-def]
    """One number in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _in_every_lane(builder, arguments[0])

    return _register(types.float32), code


@_lowered
def load(typing, numbers, start):  # type: ignore[no-untyped-def]
    """Of a flat contiguous array, the numbers from `start` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], *arguments), align=4)

    return _register(numbers, types.int64), code


@_lowered
def store(typing, numbers, start, register):  # type: ignore[no-untyped-def]
    """Into a flat contiguous array from `start` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature.args[0], *arguments[:2]), align=4)
        return context.get_dummy_value()

    return types.void(numbers, types.int64, _register), code


@_lowered
def positive(typing, numbers, start, places, places_start):  # type: ignore[no-untyped-def]
    """ReLU of a register's worth of `numbers`, in place; the places of those that are left go into `places` (int32),
    which needs room for a whole register, one after another. Returns how many there are."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature.args[0], *arguments[:2])
        x, zero = builder.load(place, align=4), _constant(_FLOATS, 0.0)
        above = builder.fcmp_unordered(">", x, zero)  # or not a number, which is not to be hidden
        builder.store(builder.select(above, x, zero), place, align=4)
        first = _in_every_lane(builder, builder.trunc(arguments[1], ir.IntType(32)), _INTEGERS)
        every = builder.add(first, ir.Constant(_INTEGERS, list(range(LANES))))
        kind = ir.FunctionType(_INTEGERS, [_INTEGERS, above.type, _INTEGERS])
        name = f"llvm.experimental.vector.compress.v{LANES}i32"
        compress = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        chosen = builder.call(compress, [every, above, ir.Constant(_INTEGERS, ir.Undefined)])
        target = _place(context, builder, signature.args[2], arguments[2], arguments[3], _INTEGERS)
        builder.store(chosen, target, align=4)
        bits = builder.bitcast(above, ir.IntType(LANES))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.int64(numbers, types.int64, places, types.int64), code


def adding(count: int) -> Any:
    """`add_rows` for so many registers side by side, at most `SUMS`."""

    @_lowered
    def add_rows(typing, rows, stride, first, chosen, start, stop, x, y, y_start):  # type: ignore[no-untyped-def]
        """Add to `count` registers of `y` from `y_start` on, for the numbers n in `chosen[start:stop]` (int32), what
        stands in `rows` from `n * stride + first` on, times `x[n]`. The sums stay in registers while the rows go by."""

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def pointer(argument: int, place: Any) -> Any:
                return _pointer(context, builder, signature.args[argument], arguments[argument], place)

            def register(argument: int, start: Any, number: int) -> Any:
                place = builder.add(start, start.type(number * LANES))
                return _place(context, builder, signature.args[argument], arguments[argument], place)

            _, stride, first, _, start, stop, _, _, y_start = arguments
            places = [register(7, y_start, number) for number in range(count)]
            sums = [
                cgutils.alloca_once_value(builder, builder.load(place, align=4))  # type: ignore[no-untyped-call]
                for place in places
            ]
            with cgutils.for_range_slice(builder, start, stop, start.type(1)) as (i, _):
                number = builder.sext(builder.load(pointer(3, i)), start.type)
                value = _in_every_lane(builder, builder.load(pointer(6, number)))
                row = builder.add(builder.mul(number, stride), first)
                for number, total in enumerate(sums):
                    weight = builder.load(register(0, row, number), align=4)
                    builder.store(_emit_multiply_add(builder, weight, value, builder.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(rows, integer, integer, chosen, integer, integer, x, y, integer), code

    return add_rows


@_lowered
def turn(typing, rows, start, stride, last, out, out_start):  # type: ignore[no-untyped-def]
    """Transpose LANES numbers of LANES rows, `stride` apart, into `out`, where rows follow one another; rows after the
    one numbered `last` are not read but that one again."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, stride_, last_, target, target_first = arguments
        registers = []
        for row in range(LANES):
            number = first.type(row)
            number = builder.select(builder.icmp_signed("<", number, last_), number, last_)
            offset = builder.add(first, builder.mul(number, stride_))
            registers.append(builder.load(_place(context, builder, signature.args[0], array, offset), align=4))
        for step in (8, 4, 2, 1):  # exchange the off-diagonal quarters of every square of 2 * step
            for row in (row for row in range(LANES) if not row & step):
                x, y = registers[row], registers[row + step]
                lower = [LANES + lane - step if lane & step else lane for lane in range(LANES)]
                upper = [LANES + lane if lane & step else lane + step for lane in range(LANES)]
                registers[row] = builder.shuffle_vector(x, y, ir.Constant(_INTEGERS, lower))
                registers[row + step] = builder.shuffle_vector(x, y, ir.Constant(_INTEGERS, upper))
        for row, register in enumerate(registers):
            offset = builder.add(target_first, target_first.type(row * LANES))
            builder.store(register, _place(context, builder, signature.args[4], target, offset), align=4)
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64, types.int64, out, types.int64), code


def _place(context: Any, builder: Any, array_type: Any, array: Any, start: Any, kind: Any = _FLOATS) -> Any:
    """Pointer to a register's worth of numbers."""
    return builder.bitcast(_pointer(context, builder, array_type, array, start), kind.as_pointer())


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, place: Any) -> Any:
    """To one number of a contiguous array."""
    fields = cgutils.create_struct_proxy(array_type)  # type: ignore[no-untyped-call]
    return builder.gep(fields(context, builder, value=array).data, [place])
