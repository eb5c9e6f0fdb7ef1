"""tests/benchmarks/step.py on a tiny network: table, files, the bytes that must move, and what is refused."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import must_move
import step

TINY = step.Size(growthRate=4, layers=(1, 1, 1), batchSz=4, imageSize=8)


@pytest.fixture
def measure(monkeypatch):
    """-> step.main with flags for two steps of the size "tiny" on the CPU"""
    monkeypatch.setitem(step.SIZES, "tiny", TINY)
    gc.freeze()  # otherwise each collection visits all objects of torch, which takes 0.15 s
    yield lambda *flags: step.main(["--size", "tiny", "--device", "cpu", "--steps", "2", "--warmup", "1", *flags])
    gc.unfreeze()


def test_bytes_to_move_of_a_small_network_counted_by_hand():
    """k=2, two blocks of one layer, an image of 4x4. Channels: 4, 6 after the layer, 3 after the transition, then 5."""
    size = step.Size(growthRate=2, layers=(1, 1), batchSz=1, imageSize=4)
    stem = 2 * 4 * 16
    block1 = (5 * 4 + 4 * 4 + 29 * 2 + 3 * 6) * 16 + 2 * 3 * 4
    block2 = (5 * 3 + 4 * 3 + 29 * 2 + 3 * 5) * 4 + 2 * 5
    assert must_move.values_to_move(size) == stem + block1 + block2 == 2354
    parameters = 108 + (8 + 32 + 16 + 144) + (12 + 18) + (6 + 24 + 16 + 144) + 10 + (50 + 10)
    fixed = 4 * 2 * 3 * 16 + 32 * parameters
    assert step.bytes_to_move(size, "fp32") == step.bytes_to_move(size, "tf32") == 4 * 2354 + fixed
    assert step.bytes_to_move(size, "bf16") == 2 * 2354 + fixed


def test_bytes_to_move_of_the_paper_networks():
    """The layers of BC 100-12 make 4 passes over 2.925 million values per image; activations grow with the batch."""
    bc100 = must_move.values_to_move(step.SIZES["bc100-64"])
    assert 4 * 2_925_000 * 64 < bc100 < 2 * 4 * 2_925_000 * 64
    assert must_move.values_to_move(step.SIZES["bc100-256"]) == 4 * bc100
    imagenet = must_move.values_to_move(step.SIZES["densenet121-64"])
    stem = 64 * 64 * (4 * 112**2 + 3 * 56**2)
    assert imagenet > stem and imagenet / 64 == imagenet // 64


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_every_implementation_is_measured_into_table_json_and_plot(measure, tmp_path, capsys):
    file, figure = tmp_path / "step.jsonl", tmp_path / "step.png"
    assert measure("--precision", "fp32", "bf16", "--json", str(file), "--plot", str(figure)) == 0
    rows, output = read(file), capsys.readouterr()
    assert "ratios only" in output.out and "left out: torchvision compiled" in output.out and not output.err
    assert figure.read_bytes().startswith(b"\x89PNG")
    names = [name for name, implementation in step.IMPLEMENTATIONS.items() if not implementation.graph]
    assert [(r["precision"], r["implementation"]) for r in rows] == [(p, n) for p in ("fp32", "bf16") for n in names]
    for row in rows:
        assert row["size"] == "tiny" and row["device"] == "cpu" and row["torch"] == str(torch.__version__)
        assert row["seconds"] > 0 and len(row["steps"]) == 2 and row["operations"] > 50 and row["peak"] >= 0
        assert row["bytes"] == step.bytes_to_move(TINY, row["precision"]) and row["copyBytesPerSecond"] > 0
        assert row["imagesPerSecond"] == pytest.approx(4 / row["seconds"])
        assert row["shareOfCopy"] == pytest.approx(row["bytes"] / row["seconds"] / row["copyBytesPerSecond"])
        assert row.get("path") == {"ours plain": "textbook", "ours efficient": "efficient",
                                   "ours max": "max"}.get(row["implementation"])


@pytest.mark.slow
def test_a_repeated_command_measures_only_the_rows_that_the_file_lacks(measure, monkeypatch, tmp_path, capsys):
    file = tmp_path / "step.jsonl"
    flags = ["--only", "ours plain", "ours max", "--json", str(file)]
    measured = []

    def fake(implementation, *rest):
        measured.append(implementation.option)
        return {"seconds": 1.0, "steps": [1.0], "peak": 0, "operations": 1}
    monkeypatch.setattr(step, "measure", fake)
    assert measure(*flags, "--minutes", "0") == 0
    assert measured == [] and "stopped before the end; repeat the command" in capsys.readouterr().out
    assert measure("--only", "ours plain", "--json", str(file)) == 0
    with open(file, "a") as incomplete:
        incomplete.write('{"implementation": "ours m')  # as a process leaves it that was killed while writing
    assert measure(*flags) == 0
    assert measured == [False, "max"]
    capsys.readouterr()
    assert measure(*flags) == 0
    assert measured == [False, "max"] and "ours max fp32" in capsys.readouterr().out  # all rows are shown
    assert len(file.read_text().splitlines()) == 3


def test_after_a_failed_capture_no_other_row_is_measured(measure, monkeypatch, tmp_path):
    def fails(implementation, *rest):
        raise step.CaptureFailed("the step cannot be captured")
    monkeypatch.setattr(step, "measure", fails)
    file = tmp_path / "step.jsonl"
    assert measure("--json", str(file)) == 1
    assert [row["error"] for row in read(file)] == ["the step cannot be captured"]


def test_only_outermost_operations_that_compute_are_counted():
    x = torch.ones(4, 4)
    device = torch.device("cpu")
    assert step.count_kernels(lambda: torch.nn.functional.linear(x, x), device)["operations"] == 1  # not those inside
    assert step.count_kernels(lambda: x.view(2, 8).t()[0].to(torch.float32), device)["operations"] == 0
    assert step.count_kernels(lambda: x.to(torch.bfloat16).add_(1), device)["operations"] == 2


@pytest.mark.slow
def test_after_out_of_memory_the_other_rows_are_measured(measure, monkeypatch, tmp_path, capsys):
    original = step.measure

    def fails(implementation, *rest):
        if implementation.option is True:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(implementation, *rest)
    monkeypatch.setattr(step, "measure", fails)
    file = tmp_path / "step.jsonl"
    assert measure("--only", "ours", "--json", str(file), "--plot", str(tmp_path / "step.png")) == 0
    assert [row.get("error") for row in read(file)] == [None, "out of memory", None]
    assert any(line.split() == ["ours", "efficient", "fp32", "out", "of", "memory"]
               for line in capsys.readouterr().out.splitlines())


def test_columns_of_a_gpus_table_are_aligned(capsys):
    device = torch.device("cuda")
    step.print_header("tiny", TINY, device)
    step.print_row({"implementation": "ours efficient graph", "precision": "bf16", "seconds": 0.002,
                    "imagesPerSecond": 2000.0, "peak": 3 * 2**20, "launches": 7, "kernels": 4321, "bytes": 10**6,
                    "shareOfCopy": 0.25}, 0.017, device)
    _, _, header, row = capsys.readouterr().out.splitlines()
    assert row.split() == "ours efficient graph bf16 0.0020 2000.0 8.50 3 7 4,321 1.0 25.0%".split()  # noqa: SIM905
    assert len(header) == len(row)


@pytest.mark.parametrize("flags, message", [
    (["--size", "bc39"], "bc39"),
    (["--steps", "0"], "from 1"),
    (["--precision", "tf32"], "tf32 needs a CUDA GPU"),
    (["--device", "cuda:99"], "valid are cpu"),
    (["--only", "keras"], "keras"),
    (["--only", "graph"], "graph"),
    (["--json", "missing/step.jsonl"], "missing/step.jsonl"),
    (["--plot", "step.pdf"], ".png"),
])
def test_bad_input_is_refused_in_one_line(flags, message, measure, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert measure(*flags) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and not output.out
