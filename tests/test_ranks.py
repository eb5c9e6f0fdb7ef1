"""Several ranks: over gloo on a CPU, started by torchrun as a user starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import SMALL, Stopped, checkpoint, cut_sample, differences, flat, refused, rows

import train
from lib import data
from lib.device import choose_device
from lib.distributed import World


def torchrun(script, *argv, restarts=0) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               f"--max-restarts={restarts}", str(script), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"})


def finished(process: subprocess.Popen) -> str:
    """Waits for the process, which must exit with 0. -> its output"""
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """159 training images are steps of 32 and a last one of 31: rank 0 has an image more."""
    return ["--data", cut_sample(tmp_path_factory.mktemp("data") / "images", train=159), *SMALL, "--nEpochs", "3"]


# --- whole runs -------------------------------------------------------------------------------------------------

def step_of_two_halves(net, optimizer, precision, images, labels, images_per_rank):
    """train_step of one process that does what two ranks do: each half is normalised by itself."""
    optimizer.zero_grad(set_to_none=True)
    results, n = [], images_per_rank / 2
    for rank in (0, 1):
        own = images[rank::2].contiguous(memory_format=torch.channels_last), labels[rank::2]
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        output = net(own[0])
        if rank == 1:  # rank 0's running statistics are those that are saved
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name])
        loss = nn.functional.nll_loss(output, own[1], reduction="sum") / n
        loss.backward()
        results.append(torch.stack((loss.detach(), (output.argmax(1) != own[1]).sum() * 100 / n)))
    for parameter in net.parameters():
        parameter.grad /= 2
    optimizer.step()
    return sum(results) / 2


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_take_the_steps_of_one_process_that_averages_the_gradients_of_both_halves(argv, tmp_path, capsys,
                                                                                            monkeypatch):
    out = finished(torchrun(ROOT / "train.py", *argv, "--save", tmp_path / "two"))
    assert "Warning" not in out and out.count("epoch 3/3") == 1 and " x 2, efficient block" in out
    monkeypatch.setattr(train, "train_step", step_of_two_halves)
    assert train.main([*argv, "--save", str(tmp_path / "one")]) == 0
    one, two = (flat({key: checkpoint(tmp_path / name)[key] for key in ("model", "optimizer")})
                for name in ("one", "two"))
    assert [name for name in one if one[name] != two[name]] == []
    assert (tmp_path / "one/train.csv").read_bytes() == (tmp_path / "two/train.csv").read_bytes()
    a, b = (torch.tensor(rows(tmp_path / f"{name}/test.csv"), dtype=torch.float64) for name in ("one", "two"))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)  # sums in another order

    monkeypatch.undo()
    resumed = [*argv[:-1], "4", "--resume", "--save", str(tmp_path / "two")]
    assert train.main(resumed) == 0 and len(rows(tmp_path / "two/test.csv")) == 4  # one process can continue them


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_restarted_and_the_run_ends_in_the_same_bytes(argv, tmp_path):
    argv = [*argv[:-1], "5", "--dropRate", "0.1", "--resume"]
    finished(torchrun(ROOT / "train.py", *argv, "--save", tmp_path / "whole"))
    process = torchrun(ROOT / "train.py", *argv, "--save", tmp_path / "killed", restarts=1)
    wait_for_two_epochs(tmp_path / "killed", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    finished(process)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_ranks_with_one_line_and_leaves_a_run_to_resume(argv, tmp_path):
    process = torchrun(ROOT / "train.py", *argv[:-1], "300", "--save", tmp_path / "run")
    wait_for_two_epochs(tmp_path / "run", process)
    process.terminate()
    out = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and "train.py\", line" not in out
    assert out.count("stopped by SIGTERM; --resume continues from the last epoch saved") == 1
    assert len(rows(tmp_path / "run/test.csv")) - checkpoint(tmp_path / "run")["epoch"] in (0, 1)


def wait_for_two_epochs(run: Path, process: subprocess.Popen) -> None:
    while not ((run / "test.csv").exists() and (run / "test.csv").read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


# --- refusals ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_ranks_end_together_when_one_of_them_fails(argv, tmp_path):
    """Four trainings in a row in one start of two ranks; a rank that did not end would wait for ever."""
    out = finished(torchrun(__file__, *argv, "--save", tmp_path / "run"))
    assert out.count("all ended") == 2 and "Traceback" not in out, out
    lines = [line for line in out.splitlines() if line.startswith("train.py: ")]
    assert lines == [
        "train.py: error: no images on 0", "train.py: error: another process has ended",
        "train.py: error: another process has ended",
        "train.py: error: --batchSz 31 cannot be shared by 2 processes; valid are multiples of 2"], out
    assert not (tmp_path / "run").exists()


def refused_trainings(argv: list[str], rank: int) -> None:
    """What each rank of the test above runs: the images are missing on a rank, or are others on rank 1."""
    load = data.load

    def fail_on(failing):
        def load_or_fail(*args, **more):
            if rank == failing:
                raise data.DataError(f"no images on {rank}")
            return load(*args, **more)
        return load_or_fail

    def others_on_rank_1(*args, **more):
        return [images.keep(torch.arange(len(images.labels)) >= rank) for images in load(*args, **more)]

    for i, data.load in enumerate((fail_on(0), fail_on(1), others_on_rank_1)):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(i)  # a group must not meet in the keys of the one before
        assert train.main(argv) in (1, 2)
    data.load = load
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "3"
    assert train.main([*argv, "--batchSz", "31"]) == 2
    print("all ended", flush=True)


@pytest.mark.parametrize("environment, said", [
    ({}, "several processes are started by torchrun, for a single one unset MASTER_ADDR"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, "valid ranks are below the number")])
def test_an_environment_that_torchrun_does_not_make_is_refused(environment, said, monkeypatch, capsys, tmp_path):
    for name, value in (environment | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, value)
    assert said in refused(train.main, capsys, "--save", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_rank_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def device(*flags, rank):
        return choose_device(train.parse_args([*flags])[0], World(rank, 4, rank, 4))

    for flags in ([], ["--device", "cuda"]):
        assert [device(*flags, rank=rank) for rank in range(4)] == [torch.device("cuda", rank) for rank in range(4)]
    assert device("--no-cuda", rank=1) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda:1 for 4 processes; valid are cpu, cuda"):
        device("--device", "cuda:1", rank=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc-per-node 4 is more than the 2 GPUs here"):
        device(rank=3)


def test_sync_bn_synchronises_every_norm(argv, tmp_path, monkeypatch):
    """Up to the optimizer: NCCL and two GPUs are not there to train with it."""
    def stop(args, net, *_):
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == 9
        assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
        raise Stopped

    monkeypatch.setattr(train.distributed, "start", lambda: World(0, 2, 0, 2))
    monkeypatch.setattr(train.distributed, "barrier", lambda world: None)
    monkeypatch.setattr(train, "broadcast", lambda value, world: value)
    monkeypatch.setattr(train, "check_flags", lambda *_: None)  # which refuses --syncBN on a CPU
    monkeypatch.setattr(train, "make_optimizer", stop)
    with pytest.raises(Stopped):
        train.main([*argv, "--syncBN", "--save", str(tmp_path)])


if __name__ == "__main__":
    refused_trainings(sys.argv[1:], int(os.environ["RANK"]))
