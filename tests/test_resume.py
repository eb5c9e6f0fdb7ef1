"""A run that is stopped at any moment and resumed ends with the same bytes as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from common import (
    EPOCHS,
    ROOT,
    SMALL,
    contents,
    cut_sample,
    differences,
    edit_checkpoint,
    flip,
    one_line,
    resume,
    run_refused,
    slow,
    stopped_at,
)

import lib.batches
import train
from lib import sets
from lib.flags import MAY_CHANGE

pytestmark = pytest.mark.usefixtures("one_thread")


# --- stopped and resumed ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("function, call, kept", [
    slow("train_step", 1, 0), slow("train_step", 3, 0), slow("evaluate", 1, 0), ("train_step", 5, 1),
    slow("train_step", 10, 3), slow("evaluate", 4, 3), slow("train_epoch", 2, 1)])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), slow(signal.SIGINT, 130)])
def test_a_signal_stops_at_once_and_says_how_to_continue(
        flags, whole, tmp_path, capfd, function, call, kept, number, status):
    save = tmp_path / "run"
    assert stopped_at(function, call, [*flags, "--save", str(save)], number) == status
    err = capfd.readouterr().err
    one_line(err, f"train.py: stopped by {number.name}; ./train.py --save {save} --resume continues")
    assert torch.load(save / "latest.pth", weights_only=True)["epoch"] == kept
    assert train.main([*flags, "--save", str(save), "--resume"]) == 0  # the same command
    assert differences(whole, save) == []


@pytest.mark.parametrize("function, call", [
    ("replace", 3), slow("fsync", 8), *(slow("fsync", call) for call in range(1, 16, 2)),
    *(slow("replace", call) for call in (1, 2, 4, 5)), slow("ftruncate", 1), slow("unlink", 1)])
def test_a_signal_inside_a_write_leaves_the_old_file_or_the_new(flags, whole, tmp_path, function, call):
    save = tmp_path / "run"
    argv = [*flags, "--save", str(save)]
    assert stopped_at(function, call, argv, module=os) in (143, 0)  # 0: there are not that many calls
    assert train.main([*argv, "--resume"]) == 0 and differences(whole, save) == []
    assert not [name for name in contents(save) if name.endswith(".tmp")]


@pytest.mark.parametrize("module, function", [
    (sets.data, "load"), (sets.data, "mean_and_std"), (train, "set_up_device"), (train, "prepare")])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_training_leaves_no_directory(flags, tmp_path, capfd, module, function, number, status):
    argv = [*flags, "--save", str(tmp_path / "run")]
    assert stopped_at(function, 1, argv, number, module=module) == status
    assert capfd.readouterr().err == f"train.py: stopped by {number.name}\n" and not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # restored


@pytest.mark.slow
def test_signals_stop_the_imports_and_a_second_one_ends_the_process(flags, tmp_path):
    """In the script itself: no traceback during its imports; a second signal works while the first is handled."""
    argv = [*flags, "--save", str(tmp_path / "run")]
    slow_end = ("import os, signal, sys, time, train\n"
                "def step(*_):\n"
                "    os.kill(os.getpid(), signal.SIGINT)\n"
                "    time.sleep(60)\n"
                "def end():\n"
                "    os.kill(os.getpid(), signal.SIGTERM)\n"
                "    time.sleep(60)\n"
                "train.train_step, train.distributed.end = step, end\n"
                "sys.exit(train.main(sys.argv[1:]))\n")
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    importing = subprocess.Popen([sys.executable, "train.py", *argv[:-1], str(tmp_path / "none")], **options)
    ending = subprocess.Popen([sys.executable, "-c", slow_end, *argv], **options)
    try:
        importing.wait(timeout=1)  # it takes longer
    except subprocess.TimeoutExpired:
        importing.send_signal(signal.SIGINT)
    assert importing.communicate(timeout=60) == (b"", b"") and importing.returncode == -signal.SIGINT  # 130 in a shell
    _, err = ending.communicate(timeout=60)
    assert ending.returncode == -signal.SIGTERM and err == b""


@pytest.mark.slow
def test_a_training_runs_in_a_thread_without_signal_handlers(flags, whole, tmp_path):
    """As in notebooks and services: only the main thread may set signal handlers."""
    status = []
    thread = threading.Thread(target=lambda: status.append(train.main([*flags, "--save", str(tmp_path / "run")])))
    thread.start()
    thread.join()
    assert status == [0] and differences(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(flags, tmp_path):
    """As under nohup, and in a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stopped_at("train_step", 1, [*flags, "--save", str(tmp_path / "run")], signal.SIGINT) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("more", [
    slow(["--opt", "adam", "--dropRate", "0.2"]), slow(["--opt", "rmsprop", "--no-augment"]),
    slow(["--no-nesterov", "--no-bottleneck", "--efficient", "max", "--dropRate", "0.1"]), slow(["--efficient", "no"]),
], ids=" ".join)
def test_every_optimiser_and_path_resumes_exactly(flags, tmp_path, more):
    argv = [*flags, *more, "--save"]
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    for step in (5, 4):  # in epoch 2; then, resumed after epoch 1, in epoch 3
        assert stopped_at("train_step", step, [*argv, str(tmp_path / "run"), "--resume"]) == 143
    assert train.main([*argv, str(tmp_path / "run"), "--resume"]) == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_the_comparison_of_runs_sees_a_changed_momentum_and_a_lost_byte(whole, run):
    assert differences(whole, run) == []
    checkpoint = torch.load(run / "latest.pth", weights_only=True)
    checkpoint["optimizer"]["state"][0]["momentum_buffer"][0, 0, 0, 0] += 1e-7
    torch.save(checkpoint, run / "latest.pth")
    (run / "test.csv").write_bytes((run / "test.csv").read_bytes()[:-1])
    assert differences(whole, run) == ["test.csv", "latest.pth/optimizer/state/0/momentum_buffer"]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes():
    """A short run of tests/benchmarks/kill.py."""
    command = [sys.executable, ROOT / "tests/benchmarks/kill.py", "--n", "1", "--kills", "3", "--images", "80",
               "--threads", "1", "--nEpochs", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 of 1 identical" in done.stdout, done.stdout + done.stderr


def test_csvs_are_cut_back_to_the_checkpoint(interrupted, whole, flags):
    assert len((interrupted / "train.csv").read_text().splitlines()) == 1 + 6 + 1  # two epochs, one step
    for name in ("train.csv", "test.csv"):
        with open(interrupted / name, "ab") as file:
            file.write(b"2.5,1.0,50\n3,torn")
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []
    text = (interrupted / "train.csv").read_text()
    epochs = [line.split(",")[0] for line in text.splitlines()[1:]]
    assert text.count("epoch") == 1 and len(epochs) == len(set(epochs)) == 3 * EPOCHS
    assert list(map(float, epochs)) == sorted(map(float, epochs))


@pytest.mark.slow
def test_a_run_stopped_in_its_first_epoch_keeps_its_flags(images, tmp_path):
    argv = ["--data", images, *SMALL, "--nEpochs", "2", "--lr", "0.05", "--weightDecay", "0", "--seed", "0", "--save"]
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    assert stopped_at("train_step", 2, [*argv, str(tmp_path / "run")]) == 143
    older = shutil.copytree(tmp_path / "run", tmp_path / "older")
    assert resume(tmp_path / "run") == 0 and differences(tmp_path / "whole", tmp_path / "run") == []
    (older / "latest.pth").unlink()  # version 1.0 wrote no checkpoint before the end of epoch 1
    assert resume(older) == 0 and differences(tmp_path / "whole", older) == []


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(images, tmp_path, flags, whole):
    (tmp_path / "train.csv").write_bytes(b"epoch,lo")
    assert train.main([*flags, "--save", str(tmp_path), "--resume"]) == 0
    assert differences(whole, tmp_path) == []


@pytest.mark.parametrize("content", [
    b"{", b"null", slow(b""), slow(b"[]"), slow(b'{"flags": {}}'), slow(b"\xff")])
def test_a_damaged_run_json_is_made_again(interrupted, whole, content):
    (interrupted / "run.json").write_bytes(content)
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []


def test_resuming_a_finished_run_prints_its_last_line_and_changes_nothing(run, capfd):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir() if p.name != ".lock"}
    assert resume(run, "--data", "nowhere") == 0  # no images are needed
    out, err = capfd.readouterr()
    assert out.startswith("final test error ") and out.count("\n") == 1 and str(run) in out and err == ""
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir() if p.name != ".lock"} == before


# --- what may change, and what may not --------------------------------------------------------------------------

@pytest.mark.parametrize("contradiction, of_run", [
    ("--depth=16", "--depth=10"), ("--growthRate=5", "--growthRate=4"), ("--batchSz=16", "--batchSz=32"),
    ("--lr=0.2", "--lr=0.1"), ("--opt=adam", "--opt=sgd"), ("--weightDecay=0", "--weightDecay=0.0001"),
    ("--seed=2", "--seed=1"), ("--dropRate=0.1", "--dropRate=0.0"), ("--reduction=1", "--reduction=0.5"),
    ("--initChannels=9", "not set"), ("--no-bottleneck", "not set"), ("--no-augment", "not set"),
    ("--no-nesterov", "not set"), ("--efficient=no", "--efficient=auto"),
    ("--border=mean", "--border=black"), ("--deterministic", "not set"),
    ("--nEpochs=3", "valid are 4 or more")])
def test_a_flag_that_contradicts_the_run_is_named(interrupted, capfd, contradiction, of_run):
    said = run_refused(capfd, interrupted, "--resume", contradiction)
    assert contradiction.partition("=")[0] in said and of_run in said and str(interrupted) in said


def test_these_flags_and_no_others_may_change():
    names = set(vars(train.parse_args([])[0]))
    assert set(MAY_CHANGE) == {"device", "no_cuda", "no_graph", "data", "save", "no_plot", "resume", "overwrite",
                               "evaluate"}
    assert names > set(MAY_CHANGE)


def test_data_device_and_directory_may_change(interrupted, whole, images, tmp_path):
    moved = shutil.move(interrupted, tmp_path / "moved")
    shutil.copytree(images, tmp_path / "copy")
    argv = ["--data", str(tmp_path / "copy"), "--device", "cpu"]
    assert resume(moved, *argv) == 0
    assert {name.partition("/")[2] for name in differences(whole, moved)} == {
        "flags/data", "flags/device", "flags/no_cuda"}  # --device replaces --no-cuda
    assert json.loads((moved / "run.json").read_text())["flags"]["device"] == "cpu"


@pytest.mark.slow
def test_one_device_flag_replaces_the_other(flags, tmp_path):
    assert stopped_at("train_step", 4, [*flags, "--device", "cpu", "--save", str(tmp_path / "run")]) == 143
    assert resume(tmp_path / "run", "--no-cuda") == 0
    about = json.loads((tmp_path / "run/run.json").read_text())["flags"]
    assert (about["device"], about["no_cuda"]) == (None, True)


@pytest.mark.slow
def test_added_epochs_use_the_last_learning_rate(run, whole, capfd):
    before = (whole / "train.csv").read_bytes()
    assert stopped_at("train_step", 4, ["--resume", "--save", str(run), "--nEpochs", "7", "--no-plot"]) == 143
    assert json.loads((run / "run.json").read_text())["flags"]["nEpochs"] == 7
    assert torch.load(run / "latest.pth", weights_only=True)["flags"]["nEpochs"] == 7  # saved after epoch 5
    assert resume(run) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["5/7", "6/7", "7/7"]
    assert [line.split()[3] for line in lines] == ["0.001"] * 3
    checkpoint = torch.load(run / "latest.pth", weights_only=True)
    assert (checkpoint["flags"]["nEpochs"], checkpoint["scheduleEpochs"], checkpoint["epoch"]) == (7, 4, 7)
    assert (run / "train.csv").read_bytes().startswith(before) and before


@pytest.mark.parametrize("step", [1, 2])
def test_a_prolonged_run_stopped_before_its_next_save_keeps_its_new_length(run, tmp_path, step):
    previous = (run / "previous.pth").read_bytes()
    argv = ["--resume", "--save", str(run), "--no-plot"]
    assert stopped_at("train_step", step, [*argv, "--nEpochs", "5"]) == 143
    checkpoint = torch.load(run / "latest.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["flags"]["nEpochs"]) == (EPOCHS, 5)
    assert (run / "previous.pth").read_bytes() == previous
    assert resume(run) == 0
    assert torch.load(run / "latest.pth", weights_only=True)["epoch"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_a_prolonged_run_with_validation_is_tested_once_at_its_new_end(flags, tmp_path, step):
    argv = [*flags, "--valSize", "20"]
    assert train.main([*argv, "--save", str(tmp_path / "run")]) == 0
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert resume(whole, "--nEpochs", "5") == 0
    assert stopped_at("train_step", step, ["--resume", "--save", str(tmp_path / "run"), "--nEpochs", "5",
                                           "--no-plot"]) == 143
    assert (tmp_path / "run/test.csv").read_text() == "epoch,loss,error\n"
    assert resume(tmp_path / "run") == 0
    assert differences(whole, tmp_path / "run") == []
    assert (whole / "test.csv").read_text().count("\n") == 2  # header, one test


def test_other_images_are_refused(interrupted, capfd, tmp_path):
    for train_images, test_images in ((79, 40), (80, 39)):
        other = cut_sample(tmp_path / f"{train_images}", train_images, test_images)
        assert "holds other images" in run_refused(capfd, interrupted, "--resume", "--data", other)
    for file, at in (("data_batch_1.bin", 5), ("test_batch.bin", 5), ("test_batch.bin", 0), ("data_batch_1.bin", 0)):
        other = cut_sample(tmp_path / f"{file} {at}")
        flip(Path(other, file), at, bits=1)  # byte 0 is a label, byte 5 a pixel
        assert "holds other images" in run_refused(capfd, interrupted, "--resume", "--data", other)


def test_without_digests_the_images_are_compared_by_number_and_mean(interrupted, whole, capfd, tmp_path):
    edit_checkpoint(interrupted / "latest.pth", digests=None, csvDigests=None)
    other = cut_sample(tmp_path / "other", 79)
    assert "holds other images" in run_refused(capfd, interrupted, "--resume", "--data", other)
    assert resume(interrupted) == 0


def test_thread_count_is_restored_and_other_differences_are_named(flags, whole, interrupted, capfd):
    torch.set_num_threads(2)
    try:
        assert stopped_at("train_step", 2, ["--resume", "--save", str(interrupted), "--no-plot"]) == 143
        assert torch.get_num_threads() == 1 and "warning" not in capfd.readouterr().err
        environment = torch.load(interrupted / "latest.pth", weights_only=True)["environment"]
        assert {"device", "threads", "precision", "torch", "numpy", "cpuCapability"} <= environment.keys()
        edit_checkpoint(interrupted / "latest.pth", environment=environment | {"torch": "1.0", "device": "abacus"})
        assert resume(interrupted) == 0
    finally:
        torch.set_num_threads(1)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(line.startswith("train.py: warning: ") for line in warnings)
    assert "the run had abacus" in warnings[0] and f"torch is {torch.__version__}, the run had 1.0" in warnings[1]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [10**6, slow(0), slow(-1), "many"])
def test_an_impossible_saved_thread_count_is_not_restored(interrupted, threads, capfd):
    environment = torch.load(interrupted / "latest.pth", weights_only=True)["environment"]
    edit_checkpoint(interrupted / "latest.pth", environment=environment | {"threads": threads})
    try:
        assert resume(interrupted) == 0
        assert torch.get_num_threads() <= os.cpu_count()
        assert f"the run had {threads}" in capfd.readouterr().err
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_a_saved_deterministic_flag_holds_in_resuming_and_evaluating(flags, tmp_path):
    """The checkpoint's flags are read before the device is set up."""
    argv = [*flags, "--deterministic", "--save", str(tmp_path / "run")]
    try:
        assert stopped_at("train_step", 4, argv) == 143
        torch.use_deterministic_algorithms(False)
        assert resume(tmp_path / "run") == 0
        assert torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        assert train.main(["--evaluate", str(tmp_path / "run/latest.pth")]) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_dropout_of_an_older_run_continues_with_one_warning(flags, tmp_path, capfd):
    assert stopped_at("train_step", 4, [*flags, "--dropRate", "0.2", "--save", str(tmp_path / "run")]) == 143
    edit_checkpoint(tmp_path / "run/latest.pth", version=None)
    capfd.readouterr()
    assert resume(tmp_path / "run") == 0
    assert "version 1.0" in one_line(capfd.readouterr().err, "train.py: warning: ")


@pytest.mark.slow
def test_dropout_has_random_numbers_of_its_own(flags, tmp_path, monkeypatch):
    """Each epoch seeds it with another seed than that of permutation, crops and flips."""
    seeds, manual_seed = [], torch.manual_seed

    def record_seed(seed):
        seeds.append(seed)
        return manual_seed(seed)

    monkeypatch.setattr(torch, "manual_seed", record_seed)
    assert train.main([*flags, "--dropRate", "0.2", "--save", str(tmp_path / "run")]) == 0
    of_epochs = seeds[1:]  # the first one, --seed, is for the initialisation
    assert len(set(of_epochs)) == EPOCHS
    assert not {seed % 2**32 for seed in of_epochs} & {lib.batches.epoch_seed(1, epoch) for epoch in range(1000)}


def test_overwrite_is_refused_after_a_restart_by_a_scheduler(run, flags, capfd, monkeypatch):
    for variable in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(variable, "1")
        assert variable in run_refused(capfd, run, *flags, "--overwrite")
        monkeypatch.delenv(variable)
