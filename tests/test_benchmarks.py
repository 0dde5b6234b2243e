"""What makes the numbers trustworthy: gates, turns, rows and the page that is made of them."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer

from benchmarks import block_attention, buffers, latency, losses, must_hold, ops, performance, report, stream
from benchmarks.dense_block import KERNELS
from benchmarks.llama_gguf import _interleaved
from benchmarks.operations import attention, score
from benchmarks.shapes import SHAPES
from benchmarks.stream import READERS, StreamReader
from tokenselect.measure import Run
from tokenselect.ops import cpu, reference
from tokenselect.ops.reference import rotate

if TYPE_CHECKING:
    from pathlib import Path

LENGTH = 4096


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows go elsewhere, and buffers are small."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(buffers, "POOL_BYTES", 1 << 20)
    return tmp_path


# ---- rows


def test_a_row_replaces_the_one_with_its_key() -> None:
    for length, ms in ((1, "a"), (2, "b"), (1, "c")):
        report.put_rows("x", [{"length": length, "ms": ms}], ("length", "threads"))
    rows = report.read_rows("x")
    assert [(row["length"], row["ms"]) for row in rows] == [("1", "c"), ("2", "b")]
    assert {("1", "1"), ("2", "1")} == report.known_rows("x", ("length", "threads"))
    assert rows[0]["torch"] == torch.__version__


def test_all_rows_of_a_key_are_replaced() -> None:
    report.put_rows(
        "x", [{"length": 1, "phase": "block"}, {"length": 1, "phase": "decode"}, {"length": 2}], ("length",)
    )
    report.put_rows("x", [{"length": 1, "phase": "prefill"}], ("length",))
    assert [(row["length"], row["phase"]) for row in report.read_rows("x")] == [("1", "prefill"), ("2", "")]


def test_rows_of_another_commit_are_measured_again(results: Path) -> None:
    report.put_rows("x", [{"length": 1}], ("length",))
    path = results / "x.csv"
    path.write_text(path.read_text().replace(report.environment()["commit"], "0000000"))
    assert report.known_rows("x", ("length",)) == set()


# ---- operations


@pytest.mark.parametrize("operation", ["score_tokens", "topk_tokens", "sparse_attention"])
def test_everybody_computes_the_same(operation: str) -> None:
    kinds = (list(score.SCORINGS), list(score.KEYS), list(score.LAYOUTS), list(attention.QUERIES))
    cases = list(ops.Choice([operation], ["smollm2"], *kinds).cases([LENGTH]))
    assert len(cases) == {"score_tokens": 24, "topk_tokens": 1, "sparse_attention": 2}[operation]
    for case in cases:
        ops.refuse_wrong_results(case)


@pytest.mark.parametrize("operation", ["score_tokens", "topk_tokens", "sparse_attention"])
def test_no_numbers_for_wrong_results(
    operation: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = getattr(reference, operation)(*args, **kwargs)
        if isinstance(result, tuple):
            return result[0] * 1.1, result[1]
        return result * 1.1 if result.is_floating_point() else result.flip(1)

    monkeypatch.setattr(cpu, operation, wrong)
    monkeypatch.setattr(cpu, "why_not", lambda *args: None)
    with pytest.raises(typer.Exit) as ended:
        ops.main(
            *([operation], ["smollm2"], [LENGTH], [1], ["mix"], ["bf16"], ["contiguous"], [1]),
            method=None,
            repeats=1,
            seconds=1.0,
        )
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err.startswith(f"No numbers: cpu fails on operation {operation}")
    assert not list(results.iterdir())


def test_a_run_of_operations_can_be_continued(capsys: pytest.CaptureFixture[str]) -> None:
    given: Any = (["topk_tokens"], ["smollm2"], [LENGTH], [1], ["mix"], ["bf16"], ["contiguous"], [1])
    ops.main(*given, method=["reference"], repeats=2, seconds=1.0)
    ops.main(*given, method=None, repeats=3, seconds=1.0, resume=True)
    rows = {row["method"]: row for row in report.read_rows("ops")}
    assert rows["reference"]["repeats"] == "2"
    assert rows["torch.topk + sort"]["repeats"] == "3"
    assert all(0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) for row in rows.values())


def test_a_stream_read_reads_everything_or_a_share() -> None:
    pools = [torch.rand(3, 200_001), torch.randint(-9, 9, (1 << 20,), dtype=torch.int8)]
    in_all = 3 * 200_001 * 4 // 8 * 8 + (1 << 20)
    reader = StreamReader(pools, 1 << 30, 1 << 30)
    assert reader.num_bytes == in_all
    assert reader.name in READERS
    assert reader.read(0.4) > 0
    assert StreamReader(pools, 1 << 30, in_all // 2).num_bytes == pytest.approx(in_all / 2, rel=1e-3)


def test_a_share_goes_around() -> None:
    words = torch.arange(640)
    assert torch.cat(stream._around(words, 0.8, 0.3)).tolist() == [*range(512, 640), *range(64)]
    assert torch.cat(stream._around(words, 0.1, 0.3)).tolist() == [*range(64, 256)]


def test_random_numbers() -> None:
    numbers = buffers.random_bf16(3, 1001).float()
    assert bool(((numbers.abs() >= 0.5) & (numbers.abs() < 1)).all())
    assert -0.1 < float(numbers.mean()) < 0.1
    assert int(buffers.random_int8(10_000).min()) == -127


# ---- a block


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_kernels(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.dense_block._KEYS_AT_ONCE", 100)
    monkeypatch.setattr("benchmarks.dense_block._LOGITS_AT_ONCE", 20_000)
    q, k, v = torch.randn(6, 40, 16), torch.randn(2, 333, 16), torch.randn(2, 333, 16)
    seen = torch.ones(40, 333, dtype=torch.bool).tril(333 - 40)
    given = (q[None], k[None], v[None])
    expected = torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=seen, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(KERNELS[kernel](q, k, v), expected[0], atol=1e-5, rtol=1e-4)


def test_a_block_is_measured() -> None:
    layer = block_attention.Layer(SHAPES["smollm2"], LENGTH)
    config = block_attention.TokenSelectConfig(num_selected_tokens=1024, num_dense_tokens=0)
    calls = layer.calls([config], ["bf16", "int8"])
    assert [*calls] == [
        "tokenselect, merged, bf16",
        "tokenselect, merged, int8",
        *(f"dense {name}, , " for name in KERNELS),
    ]
    for keys in ("bf16", "int8"):
        seconds = calls[f"tokenselect, merged, {keys}"]()
        copied = {"quantize_rows"} if keys == "int8" else set()
        steps = {"all", "pool_queries", "score_tokens", "topk_tokens", "fill_slots", "sparse_attention"}
        assert set(seconds) == steps | copied
        assert 2 * seconds["all"] > sum(seconds.values())


# ---- end to end


class SlowEngine:
    """Dense attention at a second for every 1,000 tokens before a block, and what it was asked."""

    version, is_quadratic = "slow", True

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def warm_up(self, ids: torch.Tensor) -> None:
        pass

    def fill(self, ids: torch.Tensor) -> None:
        self.asked.append(("fill", ids.shape[1]))

    def read(self, ids: torch.Tensor, steps: int) -> Run:
        self.asked.append(("read", ids.shape[1]))
        return Run(9.0, [0.1] * steps)

    def read_after(self, depth: int, ids: torch.Tensor, steps: int) -> Run:
        self.asked.append(("read_after", depth))
        return Run(depth / 1000, [0.1] * steps)


@pytest.mark.parametrize(
    ("limit", "phase", "asked"),
    [
        (1300.0, "block", [("fill", 32256), ("read_after", 32256), ("read_after", 32256)]),
        (1400.0, "prefill", [("fill", 32256), ("read_after", 32256), ("read", 32768)]),
    ],
)
def test_a_dense_prompt_that_takes_too_long_is_read_at_its_depth_only(
    limit: float, phase: str, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = SlowEngine()
    # the estimate: 64 blocks of 32.256 s at the end and nothing at the beginning, or 1,032 s
    phases = latency._prepare(engine, torch.zeros(1, 32768), 2, limit - 300)()
    assert engine.asked == asked
    assert [*phases] == [phase, "first step", "decode"]
    assert len(phases["decode"]) == 2


def test_a_block_at_its_depth_is_the_chunk_before_the_last() -> None:
    run = Run(9.0, [0.1], [], [(1024, 1.0), (3072, 2.0), (5120, 4.0), (5632, 9.0)])
    assert latency._whole(run)["block"] == [0.5]


def test_heads_for_llama_cpp_rotate_alike() -> None:
    rows = torch.randn(2 * 8, 5)
    angle = torch.rand(4)
    moved = torch.from_numpy(_interleaved(rows.numpy(), 2)).view(2, 8, 5)
    ours = rotate(rows.view(2, 8, 5).transpose(1, 2), angle.cos(), angle.sin()).transpose(1, 2)
    theirs = rotate(moved.transpose(1, 2), angle.cos(), angle.sin(), interleaved=True).transpose(1, 2)
    torch.testing.assert_close(theirs, torch.from_numpy(_interleaved(ours.reshape(16, 5).numpy(), 2)).view(2, 8, 5))


# ---- the page

TIMES = {"p20_ms": 1, "p80_ms": 1000, "repeats": 3}
ORIGIN = {"device": "CPU", "threads": 2, "torch": "2", "transformers": "5", "commit": "c", "when": "d", "command": "x"}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def measured(results: Path) -> None:
    """Dense attention is 9 times slower in reading, and faster in writing at 4K."""
    cells = {("tokenselect", "prefill", 32768): 100, ("dense", "prefill", 32768): 900}
    cells |= {("tokenselect", "decode", 4096): 20, ("dense", "decode", 4096): 10}
    rows = [
        {"method": method, "phase": phase, "length": length, "p50_ms": ms, "engine": "e", **TIMES, **ORIGIN}
        for (method, phase, length), ms in cells.items()
    ]
    write(results, "latency", [rows[0] | {"device": "the one before", "p50_ms": 7}, *rows])


@pytest.mark.usefixtures("measured")
def test_promises() -> None:
    checks = {check.promise: check for check in must_hold.checks()}
    kept = checks["prefill of 32K: 8x Transformers dense"]
    assert (kept.holds, kept.shown) == (True, "9.00x (32,768 tokens)")
    broken = checks["decode at 4K: no slower than Transformers dense"]
    assert (broken.holds, broken.shown) == (False, "0.50x (4,096 tokens)")
    unknown = checks["decode at 64K: 6x Transformers dense"]
    assert (unknown.holds, unknown.shown) == (None, "not measured")


@pytest.mark.usefixtures("measured")
def test_losses_are_found() -> None:
    assert [*losses.losses()] == [losses.Loss("decode, SmolLM2, 4,096 tokens", "dense", 20, 10)]


@pytest.mark.usefixtures("measured")
def test_the_page() -> None:
    page = performance.render()
    assert page is not None
    assert "| prefill of 32K: 8x Transformers dense | 9.00x (32,768 tokens) | yes |" in page
    assert "| Transformers dense |  | 0.900 |" in page
    assert "| decode, SmolLM2, 4,096 tokens | dense | 20.0 | 10.0 |" in page
    assert "## Operations" not in page
    assert "- CPU: latency\n" in page
    assert "the one before" not in page


def test_no_page_without_numbers() -> None:
    assert performance.render() is None
