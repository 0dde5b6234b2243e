"""A trace comes back from its file as it was; a file that is none, or hostile, is refused in one sentence."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from traces import FACTS, made_trace

from tokenselect.trace import Trace, TraceError, load_trace, save_trace


def _same(a: Trace, b: Trace) -> bool:
    pairs = [(getattr(a, item.name), getattr(b, item.name)) for item in fields(Trace)]
    return all(
        np.array_equal(x, y, equal_nan=x.dtype.kind == "f") and x.dtype == y.dtype
        if isinstance(x, np.ndarray)
        else x == y
        for x, y in pairs
    )


@pytest.mark.parametrize(
    "trace",
    [
        made_trace(),
        made_trace(" ".join(["née", "\U0001f600", "\ud800", "</script>", "\x00"] * 21)),
        made_trace(
            layers=np.zeros(0, np.int32),
            start_loc=np.zeros(1, np.int64),
            indices=np.zeros(0, np.int32),
            votes=np.zeros(0, np.float16),
            head_shares=np.zeros((0, 0), np.uint8),
            windows=np.zeros((3, 0), np.int32),
            served=np.zeros((3, 0), np.int8),
            mass=np.zeros((3, 0), np.float32),
        ),
    ],
    ids=["plain", "any text", "nothing selected"],
)
def test_round_trip(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "trace.npz")
    assert _same(load_trace(tmp_path / "trace.npz"), trace)


def test_numpy_reads_it(tmp_path: Path) -> None:
    save_trace(made_trace(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["indices"].tolist() == made_trace().indices.tolist()


def _members(tmp_path: Path) -> dict[str, bytes]:
    save_trace(made_trace(), tmp_path / "good.npz")
    with zipfile.ZipFile(tmp_path / "good.npz") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _refused(members: dict[str, bytes], tmp_path: Path) -> str:
    file = tmp_path / "bad.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(TraceError) as caught:
        load_trace(file)
    assert str(caught.value).startswith(f"{file} is not a trace of tokenselect: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _npy(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no trace")
    with pytest.raises(TraceError, match="not a trace"):
        load_trace(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "nothing")


def test_a_missing_array(tmp_path: Path) -> None:
    members = _members(tmp_path)
    del members["votes.npy"]
    assert "votes.npy" in _refused(members, tmp_path)


class _Boom:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    members = _members(tmp_path)
    members["indices.npy"] = _npy(np.array([_Boom()], dtype=object), allow_pickle=True)
    assert "indices" in _refused(members, tmp_path)
    members["indices.npy"] = pickle.dumps(_Boom())
    _refused(members, tmp_path)


def test_a_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    members = _members(tmp_path)
    header = _npy(np.zeros(6, np.int32)).replace(b"(6,)", b"(99999999999,)"[:14])
    members["indices.npy"] = header
    _refused(members, tmp_path)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i4", "fortran_order": False, "shape": (1 << 60,)})
    members["indices.npy"] = huge.getvalue()
    assert "bytes, not" in _refused(members, tmp_path)


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenselect.trace.files._MAX_BYTES", 1 << 20)
    members = _members(tmp_path)
    members["text.npy"] = _npy(np.zeros(1 << 21, np.uint8))  # 2 KB in the file
    assert "more than 1 MiB" in _refused(members, tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        json.dumps({**FACTS, "format": 99, "num_prompt_tokens": 100}).encode(),
        json.dumps({**FACTS, "format": 1}).encode(),
        json.dumps({"format": 1, "num_prompt_tokens": 100, "config": {"num_sink_tokens": -1}}).encode(),
        json.dumps({"format": 1, "num_prompt_tokens": 100, "config": []}).encode(),
        json.dumps({**FACTS, "format": 1, "num_prompt_tokens": 100, "dropped_steps": "many"}).encode(),
        json.dumps({**FACTS, "format": 1, "num_prompt_tokens": 0}).encode(),
        json.dumps({**FACTS, "format": 1, "num_prompt_tokens": 104}).encode(),
        json.dumps({**FACTS, "format": 1, "num_prompt_tokens": "100"}).encode(),
        b"\xff",
    ],
)
def test_wrong_facts(facts: bytes, tmp_path: Path) -> None:
    members = _members(tmp_path)
    members["facts.npy"] = _npy(np.frombuffer(facts, np.uint8))
    _refused(members, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("starts", np.asarray([5, 3] * 50, np.int32)),
        ("starts", np.asarray([-1, *range(102)], np.int32)),
        ("starts", np.asarray([*range(102), 10_000], np.int32)),
        ("layers", np.asarray([5, 0], np.int32)),
        ("start_loc", np.asarray([0, 2, 3, 4, 4, 5, 99], np.int64)),
        ("start_loc", np.asarray([0, 3, 2, 4, 4, 5, 7], np.int64)),
        ("start_loc", np.zeros(0, np.int64)),
        ("indices", np.asarray([10, 30, 30, 50, 10, 30, 103], np.int32)),
        ("indices", np.asarray([-1, 30, 30, 50, 10, 30, 90], np.int32)),
        ("votes", np.full(7, np.nan, np.float16)),
        ("votes", np.full(7, -1, np.float16)),
        ("votes", np.full(6, 0.1, np.float16)),
        ("head_shares", np.zeros((6, 3), np.uint8)),
        ("windows", np.full((3, 2), 1000, np.int32)),
        ("windows", np.zeros((2, 2), np.int32)),
        ("served", np.zeros((3, 2), np.int16)),
        ("served", np.full((3, 2), 2, np.int8)),
        ("mass", np.full((3, 2), 2, np.float32)),
        ("mass", np.zeros(6, np.float32)),
        ("text", np.frombuffer(b"\xff" * 10, np.uint8)),
    ],
)
def test_wrong_arrays(name: str, value: Any, tmp_path: Path) -> None:
    members = _members(tmp_path)
    members[f"{name}.npy"] = _npy(value)
    _refused(members, tmp_path)


def test_damage_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    save_trace(made_trace(), tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    refused = 0
    for at in range(0, len(good), 7):
        (tmp_path / "bad.npz").write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            load_trace(tmp_path / "bad.npz")
        except TraceError:
            refused += 1
    assert refused > len(good) // 7 // 2
    for size in range(0, len(good), 97):
        (tmp_path / "bad.npz").write_bytes(good[:size])
        with pytest.raises(TraceError):
            load_trace(tmp_path / "bad.npz")
