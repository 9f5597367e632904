"""Load pickles of plain data and refuse all others: a pickle is a program, and a foreign one may run anything.

Allowed are lists, dicts, tuples, numbers, strings and bytes (for which a pickle names no class), numpy arrays and
scalars of numbers and strings, and torch tensors. A pickle that names any other class or function is refused before
that is called.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ehr_embed.core.errors import UserError

ARRAY_KINDS = "biufcSU"
"""Kinds of numpy dtypes that hold numbers or strings; objects (O) and records (V) may hold anything."""


def load_pickle(path: Path) -> Any:
    """Return the plain data in a pickle file.

    Raises:
        UserError: the pickle names a class or function that plain data do not need, is damaged, or is no pickle at all.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except _RefusedError as error:
            raise UserError(
                f"{path}: the pickle names {error}, and loading it would run that code. Expected lists, dicts, numbers, "
                "strings, numpy arrays and torch tensors only. Nothing of it was run; write the file again as plain data."
            ) from error
        # A damaged pickle can raise any of the errors that its instructions can raise.
        except (
            pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError,
            MemoryError, RuntimeError, struct.error,
        ) as error:  # fmt: skip
            raise UserError(
                f"{path}: not a readable pickle ({type(error).__name__}: {error}). It may be truncated; write it again."
            ) from error


class _RefusedError(Exception):
    """The pickle names a class or function that plain data do not need."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return "numpy.ndarray"  # pickles name the class only as an argument of `_reconstruct`, which ignores it
        try:
            # A pickle can set attributes of what find_class returns (its BUILD instruction): a new wrapper for each use keeps it
            # from changing the function itself.
            return functools.partial(ALLOWED[module, name])
        except KeyError:
            raise _RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"a persistent object {pid!r}")


class _PlainDtype:
    """Stand-in for a dtype during unpickling: a pickle could change more of numpy's own dtype than its byte order."""

    def __init__(self, spec: Any, *_: Any) -> None:
        dtype = np.dtype(spec) if isinstance(spec, str) else None
        if dtype is None or dtype.kind not in ARRAY_KINDS:
            raise _RefusedError(f"numpy.dtype({spec!r})")
        self.dtype: np.dtype[Any] = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PlainArray(np.ndarray):
    """Array that checks its pickled state before it hands the state to numpy."""

    def __setstate__(self, state: Any) -> None:
        _, shape, plain, is_fortran, data = state
        dtype = plain.dtype
        expected = math.prod(shape) * dtype.itemsize
        if not isinstance(data, bytes) or len(data) != expected:
            raise ValueError(f"an array's data are not the {expected} bytes that its shape and type need")
        super().__setstate__((1, shape, dtype, bool(is_fortran), data))  # type: ignore[arg-type]


def _reconstruct(*_: Any) -> npt.NDArray[Any]:
    return np.ndarray.__new__(_PlainArray, (0,), np.int8)


def _frombuffer(buffer: Any, plain: _PlainDtype, shape: tuple[int, ...], order: Any) -> npt.NDArray[Any]:
    return np.frombuffer(buffer, plain.dtype).reshape(shape, order=order)


def _scalar(plain: _PlainDtype, data: bytes) -> Any:
    return np.frombuffer(data, plain.dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes from the text as which pickle protocols below 3 write them."""
    if encoding != "latin1":
        raise _RefusedError(f"_codecs.encode(..., {encoding!r})")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    """Return empty bytes; pickle protocols below 3 write a call of `bytes` for them."""
    return b""


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _allowed() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _empty_bytes,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("numpy", "dtype"): _PlainDtype,
    }
    functions: dict[str, Callable[..., Any]] = {"_reconstruct": _reconstruct, "scalar": _scalar}
    for package in ("numpy.core", "numpy._core"):  # before and after numpy 2
        names |= {(f"{package}.multiarray", name): function for name, function in functions.items()}
        names[f"{package}.numeric", "_frombuffer"] = _frombuffer
    return names


ALLOWED = _allowed()
"""Maps each class or function that a pickle may name, by module and name, to the object that is called in its place."""
