"""Pickles of plain data load; whatever names more is refused before it runs."""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ehr_embed.core.errors import UserError
from ehr_embed.core.plain_pickle import load_pickle
from tests.helpers.pickles import Call
from tests.helpers.refusals import refused

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def written(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_load_as_they_were(tmp_path, protocol):
    arrays = {
        "rows": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "names": np.array(["a", "bcd"]),
        "none": np.empty((0, 4), np.float16),
    }
    plain = {
        "subject_id": np.int64(2**40),
        "tokens": [1, 2],
        "rest": (1.5, None, True, "é", b"\xff"),
        "o": OrderedDict(a=1),
    }
    found = load_pickle(written(tmp_path / "a.pkl", [{**plain, **arrays, "tensor": torch.arange(4.0)}], protocol))[0]
    assert {key: found[key] for key in plain} == plain
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape
    assert torch.equal(found["tensor"], torch.arange(4.0))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Call(os.system, "touch pwned"), "posix.system"),
        (Call(subprocess.check_call, ["touch", "pwned"]), "check_call"),
        (Call(eval, "open('pwned', 'w')"), "eval"),
        (Call(getattr, [], "append"), "getattr"),
        ([{"tokens": Call(exec, "open('pwned', 'w')")}], "exec"),
        (np.array([Call(os.system, "touch pwned")], dtype=object), "numpy.dtype"),
        (np.array([1, "a"], dtype=object), "numpy.dtype"),
        (np.zeros(2, dtype=[("a", "i4")]), "numpy.dtype"),
        (datetime.datetime(2020, 1, 1), "datetime.datetime"),
        (Path("x"), "pathlib"),
        (torch.nn.Linear, "torch.nn"),
        (np.load, "numpy.load"),
        ({1, 2}.__class__, "set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_refused_before_it_runs(tmp_path, monkeypatch, value, named, protocol):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "a.pkl", value, protocol)
    with pytest.raises(UserError, match=rf"a\.pkl: .*\b{named}.*write the file again as plain data"):
        load_pickle(path)
    assert not (tmp_path / "pwned").exists()


def test_a_tensor_cannot_carry_a_pickle_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Call(os.system, "touch pwned"), tmp_path / "inner.pt")
    inner = (tmp_path / "inner.pt").read_bytes()
    path = written(tmp_path / "a.pkl", Call(torch.storage._load_from_bytes, inner))
    with pytest.raises(UserError, match=r"(?s)a\.pkl: .*write it again\."):
        load_pickle(path)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_cannot_change_what_it_names(tmp_path):
    """The BUILD opcode sets attributes of whatever lies on the stack, functions of torch included."""
    state = b"N}X\x0c\x00\x00\x00__defaults__)s\x86b."
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\ndtype\n"):
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + name + state)
        before = torch._utils._rebuild_tensor_v2.__defaults__
        with pytest.raises(UserError, match=r"(?s)a\.pkl: .*write it again\."):
            load_pickle(tmp_path / "a.pkl")
        assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_an_array_whose_bytes_do_not_fit_is_refused(tmp_path):
    data = pickle.dumps(np.arange(4, dtype=np.int64), 2).replace(b"K\x04\x85", b"K\x05\x85")
    (tmp_path / "a.pkl").write_bytes(data)
    with refused("40 bytes"):
        load_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04", pickle.dumps([1] * 1000)[:-100]])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)a\.pkl: .*write it again\."):
        load_pickle(tmp_path / "a.pkl")
