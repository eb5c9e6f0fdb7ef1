"""A run that is stopped at any moment and resumed ends with the same bytes as an uninterrupted one."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import (
    EPOCHS,
    RECORD,
    ROOT,
    SMALL,
    checkpoint,
    cut_sample,
    differences,
    edit_checkpoint,
    one_line,
    resume,
    rows,
    run_refused,
    run_script,
    slow,
    stopped_at,
)
from PIL import Image

import train
from lib.batches import dropout_seed
from lib.stop import stop

pytestmark = pytest.mark.usefixtures("one_thread")


# --- stopped and resumed ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [
    slow(["--opt", "adam", "--dropRate", "0.2"]), slow(["--opt", "rmsprop", "--no-augment"]),
    slow(["--no-nesterov", "--no-bottleneck", "--efficient", "max", "--dropRate", "0.1"]), slow(["--efficient", "no"]),
    slow(["--schedule", "cosine", "--border", "mean", "--precision", "bf16", "--deterministic"]),
    ["--valSize", "20", "--seed", "0"]], ids=" ".join)
def test_every_optimizer_and_mode_resumes_exactly(flags, tmp_path, more):
    argv, run = [*flags, *more, "--save"], tmp_path / "run"
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    for step in (5, 4):  # in epoch 2; then, resumed after epoch 1, in epoch 3
        assert stopped_at("train_step", step, [*argv, str(run), "--resume"]) in (143, 0)
    assert resume(run) == 0  # with the run's flags
    torch.use_deterministic_algorithms(False)
    assert differences(tmp_path / "whole", run) == []


def test_the_comparison_of_runs_sees_a_changed_momentum_and_a_lost_byte(whole, run):
    assert differences(whole, run) == []
    changed = checkpoint(run)
    changed["optimizer"]["state"][0]["momentum_buffer"][0, 0, 0, 0] += 1e-7
    torch.save(changed, run / "latest.pth")
    (run / "test.csv").write_bytes((run / "test.csv").read_bytes()[:-1])
    assert differences(whole, run) == ["test.csv", "latest.pth/optimizer/state/0/momentum_buffer"]


def test_resume_without_a_run_starts_one_and_says_so(flags, whole, tmp_path, capsys):
    assert train.main([*flags, "--save", str(tmp_path / "typo"), "--resume"]) == 0
    assert f"there is no run in {tmp_path}/typo yet: this starts one" in capsys.readouterr().out.splitlines()[0]
    assert differences(whole, tmp_path / "typo") == []


def test_a_finished_run_prints_its_last_line_changes_nothing_and_needs_no_images(run, capsys):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir() if p.name != ".lock"}
    assert resume(run, "--data", "nowhere") == 0
    out, err = capsys.readouterr()
    assert out.startswith("final test error ") and out.count("\n") == 1 and str(run) in out and err == ""
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir() if p.name != ".lock"} == before


def test_each_epoch_seeds_dropout_anew(flags, tmp_path, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    assert train.main([*flags, "--dropRate", "0.2", "--save", str(tmp_path / "run")]) == 0
    assert seeds[1:] == [dropout_seed(1, epoch, 0) for epoch in (1, 2, 3)]  # the first is for the initial weights


# --- what may change, and what may not --------------------------------------------------------------------------

@pytest.mark.parametrize("contradiction, of_run", [
    ("--depth=16", "--depth=10"), ("--valSize=20", "--valSize=0"), ("--deterministic", "not set"),
    ("--init=weights.pth", "not set"), ("--nEpochs=2", "valid are 3 or more")])
def test_a_flag_that_contradicts_the_run_is_named(interrupted, capsys, contradiction, of_run):
    said = run_refused(capsys, interrupted, "--resume", contradiction)
    assert contradiction.partition("=")[0] in said and of_run in said and str(interrupted) in said


def test_data_and_device_may_change(interrupted, whole, images, tmp_path):
    copy = shutil.copytree(images, tmp_path / "copy")
    assert resume(interrupted, "--data", str(copy), "--device", "cpu") == 0
    assert {name.partition("/")[2] for name in differences(whole, interrupted)} == {
        "flags/data", "flags/device", "flags/no_cuda"}  # --device replaces --no-cuda
    flags = checkpoint(interrupted)["flags"]
    assert (flags["data"], flags["device"], flags["no_cuda"]) == (str(copy), "cpu", False)


@pytest.mark.parametrize("n_test, changed", [(39, 0), (40, 64)])
def test_other_images_are_refused(interrupted, capsys, tmp_path, n_test, changed):
    other = Path(cut_sample(tmp_path / "other", test=n_test))
    content = bytearray((other / "data_batch_1.bin").read_bytes())
    content[RECORD - 1] ^= changed  # the last pixel of the first training image: the mean is another
    (other / "data_batch_1.bin").write_bytes(content)
    assert "holds other images" in run_refused(capsys, interrupted, "--resume", "--data", str(other))


def test_a_flag_of_another_version_is_ignored_at_its_default_and_else_named(interrupted, capsys):
    """So is 1.1's --compile, which was the same function."""
    flags = checkpoint(interrupted)["flags"]
    edit_checkpoint(interrupted / "latest.pth", flags=flags | {"mixup": 0.4})
    assert "--mixup=0.4" in run_refused(capsys, interrupted, "--resume")
    edit_checkpoint(interrupted / "latest.pth", flags=flags | {"mixup": None, "swa": False, "compile": True})
    assert resume(interrupted) == 0


def test_overwrite_is_refused_after_a_restart_by_torchrun(run, flags, capsys, monkeypatch):
    """It would replace what was trained before the restart."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "restart with --resume" in run_refused(capsys, run, *flags, "--overwrite")


# --- more epochs ------------------------------------------------------------------------------------------------

def test_a_prolonged_run_keeps_its_new_length_and_the_last_learning_rate(run, whole, capsys):
    assert stopped_at("train_step", 1, ["--resume", "--save", str(run), "--nEpochs", "5", "--no-plot"]) == 143
    assert (checkpoint(run)["epoch"], checkpoint(run)["flags"]["nEpochs"]) == (EPOCHS, 5)
    assert (run / "previous.pth").read_bytes() == (whole / "previous.pth").read_bytes()
    capsys.readouterr()
    assert resume(run) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [(line[1], line[3]) for line in lines] == [("4/5", "0.01"), ("5/5", "0.01")]
    assert (run / "train.csv").read_bytes().startswith((whole / "train.csv").read_bytes())


def test_a_prolonged_run_with_validation_is_tested_once_at_its_new_end(flags, tmp_path):
    argv = [*flags, "--valSize", "20", "--save", str(tmp_path)]
    assert train.main(argv) == 0 and len(rows(tmp_path / "test.csv")) == 1
    assert stopped_at("train_step", 1, [*argv, "--nEpochs", "4", "--resume"]) == 143
    assert rows(tmp_path / "test.csv") == [] and checkpoint(tmp_path)["test"] is None
    assert resume(tmp_path) == 0
    assert len(rows(tmp_path / "test.csv")) == 1 and len(rows(tmp_path / "val.csv")) == 4


# --- signals, which need the script itself ----------------------------------------------------------------------

def start_script(*argv, before: str = "") -> subprocess.Popen:
    """Starts train.py in another process, which first runs the code ``before``."""
    code = f"import runpy, sys\nsys.argv[0] = 'train.py'\n{before}\nrunpy.run_path('train.py', run_name='__main__')"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(reached, process: subprocess.Popen) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_the_same():
    """Also one with validation, while it is prolonged."""
    done = run_script("tests/benchmarks/kill.py", "--n", 3, "--threads", 1, "--images", 128)
    assert done.returncode == 0 and "3 of 3 identical, after " in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT],
                                     [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]], ids=str)
def test_signals_end_the_script_with_one_line_and_a_run_to_resume(images, tmp_path, numbers):
    save = tmp_path / "run"
    process = start_script("--data", images, *SMALL, "--save", save)
    wait_for(lambda: (save / "latest.pth").exists() and checkpoint(save)["epoch"] > 0, process)
    for number in numbers:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in {128 + number for number in numbers}
    line = r"train.py: stopped by SIG(TERM|INT); --resume continues from the last epoch saved\n"
    assert re.fullmatch(f"({line}){{1,3}}", err)
    assert len(numbers) > 1 or (err.count("\n") == 1 and numbers[0].name in err)
    assert 1 <= checkpoint(save)["epoch"] < 300


@pytest.mark.slow
def test_a_signal_stops_the_imports_without_a_traceback_and_an_ignored_one_does_nothing(flags, tmp_path):
    """Ignored as under nohup, and in a shell's background job."""
    importing = start_script(*flags, "--save", tmp_path / "none")
    nohup = start_script(*flags, "--save", tmp_path / "run",
                         before="import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
    time.sleep(1)  # the imports take longer
    importing.send_signal(signal.SIGINT)
    one_line(importing.communicate(timeout=60)[1], "train.py: stopped by SIGINT")
    assert importing.returncode == 130 and not (tmp_path / "none").exists()
    wait_for((tmp_path / "run/train.csv").exists, nohup)
    nohup.send_signal(signal.SIGINT)
    assert nohup.communicate(timeout=120)[1] == "" and nohup.returncode == 0


@pytest.mark.slow
def test_sigterm_ends_the_decoding_of_pictures_at_once(tmp_path):
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / folder / "0.png")
    slowly = ("import time\nfrom PIL import Image\ndef slowly(*args, **more):\n"
              "    print('decoding', flush=True)\n    time.sleep(60)\nImage.open = slowly")
    process = start_script("--dataset", "folder", "--data", tmp_path / "pictures", *SMALL, "--save", tmp_path / "run",
                           before=slowly)
    assert process.stdout.readline() == "decoding\n"
    process.send_signal(signal.SIGTERM)
    one_line(process.communicate(timeout=30)[1], "train.py: stopped by SIGTERM")  # each picture would take a minute
    assert process.returncode == 143 and not (tmp_path / "run").exists()


def test_a_training_in_another_program_sets_no_signal_handler(run):
    assert resume(run) == 0
    assert stop not in [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
