"""Eight words of 64 bits that lie side by side, as a value inside numba's functions.

As `policies/registers.py` does for numbers: said outright in LLVM's vectors, so that bits of 512 sites are joined and
counted by one instruction each where the processor has AVX-512, and by a few elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WORDS = 8
_WORDS = ir.VectorType(ir.IntType(64), WORDS)

_lowered: Any = intrinsic


class _Register(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"uint64x{WORDS}")


_register = _Register()


@register_model(_Register)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: Any) -> None:
        super().__init__(manager, frontend_type, _WORDS)  # type: ignore[no-untyped-call]


def _operation(emit: Callable[..., Any]) -> Any:
    """A function of two registers that gives one."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    return _lowered(lambda typing, x, y: (_register(_register, _register), code))


def _all_ones(builder: Any, x: Any) -> Any:
    return builder.xor(x, ir.Constant(_WORDS, [-1] * WORDS))


def _add_zeros(builder: Any, count: Any, x: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{WORDS}i64")  # type: ignore[no-untyped-call]
    return builder.add(count, builder.call(function, [_all_ones(builder, x)]))


both = _operation(lambda builder, x, y: builder.and_(x, y))
either = _operation(lambda builder, x, y: builder.or_(x, y))
without = _operation(lambda builder, x, y: builder.and_(x, _all_ones(builder, y)))
"""The bits of the first that the second has not."""
add_zeros = _operation(_add_zeros)
"""To eight counts, add how many bits of the second are 0, word by word."""


@_lowered
def none(typing):  # type: ignore[no-untyped-def]
    """No bit set; a count of zero."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_WORDS, [0] * WORDS)

    return _register(), code


@_lowered
def total(typing, counts):  # type: ignore[no-untyped-def]
    """Sum of the eight counts."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [_WORDS])
        name = f"llvm.vector.reduce.add.v{WORDS}i64"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)  # type: ignore[no-untyped-call]

    return types.int64(_register), code


@_lowered
def load(typing, words, start):  # type: ignore[no-untyped-def]
    """Of a flat contiguous array, the words from `start` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], *arguments), align=8)

    return _register(words, types.int64), code


@_lowered
def store(typing, words, start, register):  # type: ignore[no-untyped-def]
    """Into a flat contiguous array from `start` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature.args[0], *arguments[:2]), align=8)
        return context.get_dummy_value()

    return types.void(words, types.int64, _register), code


def _place(context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> Any:
    """Pointer to a register's worth of words."""
    fields = cgutils.create_struct_proxy(array_type)  # type: ignore[no-untyped-call]
    return builder.bitcast(builder.gep(fields(context, builder, value=array).data, [start]), _WORDS.as_pointer())
