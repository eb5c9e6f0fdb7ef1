"""Several processes over gloo on a CPU, started by torchrun as a user starts them."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import SMALL, cut_sample, differences, rows

import train
from densenet import DenseNet
from lib import distributed, sets
from lib.device import choose_device
from lib.distributed import SyncBatchNorm2d, World, average_gradients, broadcast, sum_over_ranks


def torchrun(script, *argv, processes=2, restarts=0, **more) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               f"--max-restarts={restarts}", str(script), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}, **more)


def finished(process: subprocess.Popen) -> str:
    """Waits for the process, which must exit with 0. -> its output"""
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def table(path: Path) -> torch.Tensor:
    return torch.tensor(rows(path), dtype=torch.float64)


# --- checks that each rank runs when torchrun starts this file ---------------------------------------------------

def check_sync_batch_norm(world: World) -> None:
    """Over the ranks' parts of x it gives the same as nn.BatchNorm2d over all of x, forward and backward."""
    torch.manual_seed(0)
    x = 3 + torch.randn(7, 5, 4, 3, dtype=torch.float64)
    weights, own = torch.randn_like(x), slice(world.rank, None, world.size)
    norms = SyncBatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    for norm in norms:
        nn.init.normal_(norm.weight)
        norm.bias.data.fill_(0.3)
    norms[1].load_state_dict(norms[0].state_dict())
    parts = x[own].clone().requires_grad_(), x.clone().requires_grad_()
    outs = [norm(part) for norm, part in zip(norms, parts, strict=True)]
    (outs[0] * weights[own]).sum().backward()
    (outs[1] * weights).sum().backward()
    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outs[0], outs[1][own], **close)
    torch.testing.assert_close(parts[0].grad, parts[1].grad[own], **close)
    for name in ("weight", "bias"):
        summed = sum_over_ranks(getattr(norms[0], name).grad, world)
        torch.testing.assert_close(summed, getattr(norms[1], name).grad, **close)
    for name, buffer in norms[1].named_buffers():
        torch.testing.assert_close(getattr(norms[0], name), buffer, **close)
    norms[1].load_state_dict(norms[0].state_dict())
    assert norms[0].eval()(x).equal(norms[1].eval()(x))


def check_gradients(world: World, sync: bool) -> None:
    """The mean of the ranks' gradients is the whole batch's, even if one rank has an image more."""
    torch.manual_seed(0)
    net = DenseNet(4, 10).double()
    alone = copy.deepcopy(net)
    if sync:
        SyncBatchNorm2d.replace_all(net)
    images, labels = torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.arange(7)
    own = slice(world.rank, None, world.size)
    wrapped = average_gradients(net, world)
    loss = F.nll_loss(wrapped(images[own]), labels[own], reduction="sum") / (7 / world.size)
    loss.backward()
    assert net.dense1.last_path == net.dense3.last_path == ("textbook" if sync else "efficient")
    if sync:
        F.nll_loss(alone(images), labels).backward()
    else:  # batch norm normalises each rank's images by themselves
        sum(F.nll_loss(alone(images[r::world.size]), labels[r::world.size], reduction="sum") / 7
            for r in range(world.size)).backward()
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def check_refusals(argv: list[str], rank: int) -> None:
    """Four trainings in a row, each refused by one rank or by all: every rank must end each of them."""
    load = sets.load_sets

    def fail_on(failing_rank: int):
        def load_or_fail(args):
            if rank == failing_rank:
                raise ValueError(f"no images on {rank}")
            return load(args)
        return load_or_fail

    def load_others_on_rank_1(args):
        return load(args)._replace(digests={"train": "other"}) if rank == 1 else load(args)

    for loader in (fail_on(0), fail_on(1), load_others_on_rank_1):
        sets.load_sets = loader
        assert train.main(argv) != 0
    sets.load_sets = load
    assert train.main([*argv, "--batchSz", "31"]) != 0


# --- whole runs -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return cut_sample(tmp_path_factory.mktemp("data") / "images", train=161)  # 5 steps: 4 of 32 images and one of 33


@pytest.fixture(scope="module")
def argv(images):
    return ["--data", images, *SMALL, "--no-cuda", "--resume"]


@pytest.mark.slow
def test_two_ranks_with_sync_bn_match_one_process_and_one_process_can_resume_them(tmp_path, capfd):
    images = cut_sample(tmp_path / "images", train=159)  # the last batch has 31: one rank has an image more
    # a rate at which no ReLU changes sides by rounding, from where on two runs drift apart
    more = ["--data", images, *SMALL, "--no-cuda", "--no-augment", "--nEpochs", "4", "--lr", "0.03"]
    out = finished(torchrun(ROOT / "train.py", *more, "--syncBN", "--save", tmp_path / "two"))
    assert "Warning" not in out and out.count("epoch 4/4") == 1
    assert train.main([*more, "--save", str(tmp_path / "one")]) == 0
    one, two = (table(tmp_path / name / "train.csv") for name in ("one", "two"))
    assert len(one) == 20
    assert one[:, 0].equal(two[:, 0])
    torch.testing.assert_close(two[:, 1], one[:, 1], rtol=1e-4, atol=0)
    assert (two[0, 1] - one[0, 1]).abs() < 1.5e-6  # one in the last of the CSVs' seven digits
    for name in ("one", "two"):
        assert abs(table(tmp_path / name / "test.csv")[-1, 1] - table(tmp_path / "one/test.csv")[-1, 1]) < 1e-3

    assert train.main([*more, "--syncBN", "--nEpochs", "5", "--resume", "--save", str(tmp_path / "two")]) == 0
    assert "processes is 1, the run had 2" in capfd.readouterr().err
    assert len(rows(tmp_path / "two/test.csv")) == 5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_restarted_and_the_run_ends_the_same(argv, tmp_path, capfd):
    more = [*argv, "--nEpochs", "6", "--dropRate", "0.1"]
    finished(torchrun(ROOT / "train.py", *more, "--save", tmp_path / "whole"))
    process = torchrun(ROOT / "train.py", *more, "--save", tmp_path / "killed", restarts=1)
    wait_for(lambda: has_tested_twice(tmp_path / "killed"), process)
    os.kill(worker(process.pid), signal.SIGKILL)
    finished(process)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    assert len(rows(tmp_path / "killed" / "train.csv")) == 30

    # without --syncBN each rank normalises by its own part of the batch: in one process more than rounding changes
    assert train.main([*argv, "--nEpochs", "7", "--save", str(tmp_path / "killed")]) == 0
    err = capfd.readouterr().err
    assert "statistics over 32 images and not 16" in err and "last digits" not in err


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_and_leaves_a_run_to_resume(argv, tmp_path):
    process = torchrun(ROOT / "train.py", *argv, "--nEpochs", "300", "--save", tmp_path / "run")
    wait_for(lambda: has_tested_twice(tmp_path / "run"), process)
    process.terminate()
    out = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert out.count("stopped by SIGTERM; the same command with --resume continues from the last epoch saved") == 1
    assert "train.py\", line" not in out
    latest = torch.load(tmp_path / "run" / "latest.pth", weights_only=True)
    assert len(rows(tmp_path / "run" / "test.csv")) - latest["epoch"] in (0, 1)  # stopped between the row and the save


def has_tested_twice(run: Path) -> bool:
    return (run / "test.csv").exists() and (run / "test.csv").read_text().count("\n") >= 3  # the header, two rows


def wait_for(reached, process) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def worker(pid: int) -> int:
    """-> the process id of torchrun's last worker"""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


@pytest.mark.slow
def test_two_ranks_compute_the_same_and_refuse_together(argv, tmp_path):
    """All of these checks share one start of two ranks, which takes most of the time."""
    out = finished(torchrun(__file__, *argv, "--save", tmp_path / "run"))  # a rank that is not ended waits for ever
    assert out.count("all right") == 2, out
    lines = [line for line in out.splitlines() if line.startswith("train.py: ")]
    assert lines.count("train.py: error: another process has ended") == 2  # by rank 0, whenever rank 1 refuses
    assert [line for line in lines if "another process" not in line] == [
        "train.py: error: no images on 0", "train.py: error: rank 1: no images on 1",
        f"train.py: error: rank 1: --data {argv[1]} holds other images than on rank 0",
        "train.py: error: --batchSz 31 cannot be shared by 2 processes; valid are multiples of 2"], out
    assert "Traceback" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("environment", "message"), [
    ({"MASTER_ADDR": "localhost", "RANK": "x", "WORLD_SIZE": "2"}, "the environment has RANK=x"),
    ({"MASTER_ADDR": "localhost"}, "no RANK; several processes are started by torchrun, for a single one unset "
                                   "MASTER_ADDR")])
def test_an_environment_that_torchrun_does_not_make_is_refused(environment, message, monkeypatch, capsys, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(["--save", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def of_four(rank: int) -> World:
    return World(rank, 4, rank, 4)


def parsed(*flags):
    return train.parse_args([*flags])[0]


def test_each_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for flags in ([], ["--device", "cuda"]):
        devices = [choose_device(parsed(*flags), of_four(rank)) for rank in range(4)]
        assert devices == [torch.device("cuda", rank) for rank in range(4)]
    assert choose_device(parsed("--no-cuda"), of_four(1)) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:1 for 4 processes; valid are cpu, cuda"):
        choose_device(parsed("--device", "cuda:1"), of_four(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc-per-node 4 is more than the 2 GPUs here"):
        choose_device(parsed(), of_four(3))


def test_one_process_that_finds_several_gpus_says_how_to_use_them(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    state = {"parameters": 1, "environment": {"device": "H"}, "trainImages": 2, "testImages": 1, "path": "textbook",
             "pathReason": "it fits"}
    train.announce(parsed(), state, None, torch.device("cuda:0"), World())
    out = capsys.readouterr().out
    assert "torchrun --nproc-per-node=4 train.py" in out and "textbook path (it fits)" in out
    train.announce(parsed(), state, None, torch.device("cuda:0"), of_four(0))
    assert capsys.readouterr().out.count("\n") == 1


def test_a_single_process_starts_no_process_group(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group"))
    assert train.main([*argv, "--nEpochs", "1", "--save", str(tmp_path / "run")]) == 0


if __name__ == "__main__":
    world = distributed.read_world()
    distributed.start(world)
    assert broadcast(f"rank {world.rank}'s", world) == "rank 0's"
    check_sync_batch_norm(world)
    check_gradients(world, sync=False)
    check_gradients(world, sync=True)
    distributed.end()
    check_refusals(sys.argv[1:], world.rank)
    print("all right", flush=True)
