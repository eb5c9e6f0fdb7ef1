"""Which path of the dense block a run takes: what the textbook layers keep, what fits, and what the run says of it."""


import pytest
import torch
from common import SMALL, about

import train
from densenet import DenseNet
from lib import memory
from lib.memory import cgroup_limits, choose_path, kept_by_textbook, step_bytes

GB = 10**9


def saved_for_backward(net, size, n, precision):
    """Bytes of all tensors but the parameters that autograd keeps for a forward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    images = torch.randn(n, net.arguments["inChannels"], size, size)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, train.autocast(images.device, precision):
        net(images)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("arguments", "size"), [
    (dict(depth=22), 32),
    (dict(depth=13, bottleneck=False, growthRate=8), 32),
    (dict(depth=16, dropRate=0.2, inChannels=1), 24),
    (dict(depth=13, dropRate=0.2, bottleneck=False), 32),
    (dict(growthRate=8, blockConfig=(2, 3, 4, 2), smallInputs=False, nClasses=1000), 75)])
def test_what_the_textbook_keeps_an_image_is_what_autograd_saves(arguments, size, precision):
    net = DenseNet(efficient=False, **arguments)
    of_an_image = saved_for_backward(net, size, 5, precision) - saved_for_backward(net, size, 4, precision)
    value_bytes = 2 if precision == "bf16" else 4
    assert kept_by_textbook(net, size, value_bytes, value_bytes) == pytest.approx(of_an_image, rel=0.003)


def test_the_reference_network_keeps_33_mib_an_image():
    assert kept_by_textbook(DenseNet(), 32) / 2**20 == pytest.approx(33.2, abs=0.05)


def test_a_step_is_what_is_kept_weights_gradients_optimizer_and_images():
    net = DenseNet(12, 22)
    for opt, tensors in (("sgd", 3), ("rmsprop", 3), ("adam", 4)):
        args, _ = train.parse_args(["--opt", opt])
        expected = 64 * kept_by_textbook(net, 32) + 4 * tensors * memory.count_parameters(net) + 1000
        assert step_bytes(net, args, 32, data_bytes=1000, batch_size=64, on_gpu=True) == expected
    drop = DenseNet(12, 22, dropRate=0.2)
    args, _ = train.parse_args(["--precision", "bf16"])
    masks = kept_by_textbook(drop, 32, 2, 1) - kept_by_textbook(net, 32, 2, 1)
    assert masks > 0  # of a byte a value on a GPU, on a CPU as large as a value
    of_both = [step_bytes(drop, args, 32, data_bytes=0, batch_size=1, on_gpu=on_gpu) for on_gpu in (True, False)]
    assert of_both[1] - of_both[0] == masks


@pytest.mark.parametrize(("flags", "device", "gigabytes", "path", "reason"), [
    ("", "cuda", 80, "textbook", "fits, with 2.2 of 80.0 GB"),
    ("", "cuda", 2.7, "efficient", "does not fit, with 2.2 of 2.7 GB"),  # 2.2 is more than 80% of it
    ("", "cuda", 2.9, "textbook", "fits"),
    ("--precision bf16", "cuda", 1.5, "textbook", "fits, with 1.1 of 1.5 GB"),
    ("--batchSz 4096", "cuda", 80, "efficient", "does not fit"),
    ("", "cpu", 1000, "efficient", "fastest on a CPU in float32"),
    ("--precision bf16", "cpu", 16, "textbook", "fits"),
    ("--precision bf16", "cpu", 1, "efficient", "does not fit"),
    ("", "mps", 16, "textbook", "does not run on mps"),
    ("--efficient max", "mps", 16, "textbook", "does not run on mps"),
    ("--syncBN", "cuda", 80, "textbook", "--syncBN"),
    ("--syncBN --efficient yes", "cpu", 16, "textbook", "--syncBN"),
    ("--efficient yes", "cuda", 80, "efficient", "--efficient yes"),
    ("--efficient no", "cpu", 0.1, "textbook", "--efficient no"),
    ("--efficient max", "cuda", 80, "max", "--efficient max")])
def test_auto_takes_the_fastest_path_that_fits(flags, device, gigabytes, path, reason, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: int(gigabytes * GB))
    args, _ = train.parse_args(flags.split())
    with torch.device("meta"):
        net = DenseNet()
    choice = choose_path(args, net, 32, data_bytes=0, batch_size=args.batchSz, device=torch.device(device), steps=4999)
    assert choice.path == path and reason in choice.reason


@pytest.mark.parametrize(("flags", "device", "cpu", "steps", "path"), [
    ("--precision bf16", "cpu", "AVX512", 5000, "compiled efficient"),
    ("--precision bf16", "cpu", "AVX512", 4999, "efficient"), ("--precision bf16", "cpu", "AVX2", 10**6, "efficient"),
    ("", "cpu", "AVX512", 10**6, "efficient"), ("--precision bf16", "cuda", "AVX512", 10**6, "efficient"),
    ("--precision bf16 --batchSz 32", "cpu", "AVX512", 10**6, "textbook"),
    ("--precision bf16 --efficient yes", "cpu", "AVX512", 10**6, "efficient"),
    ("--compile", "cpu", "AVX2", 1, "compiled efficient"), ("--compile", "cuda", "AVX2", 1, "compiled efficient"),
    ("--compile --efficient max", "cpu", "AVX2", 1, "compiled max")])
def test_the_compiled_block_is_for_long_runs_without_memory_for_the_textbook_and_for_those_that_ask(
        flags, device, cpu, steps, path, monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: GB)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    monkeypatch.setattr(memory, "has_cxx_compiler", lambda: True)
    args, _ = train.parse_args(flags.split())
    with torch.device("meta"):
        net = DenseNet()
    assert choose_path(args, net, 32, 0, args.batchSz, torch.device(device), steps).path == path


def test_auto_compiles_only_with_a_cxx_compiler(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: GB)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    args, _ = train.parse_args(["--precision", "bf16"])
    with torch.device("meta"):
        net = DenseNet()
    for command, path in (("python3", "compiled efficient"), ("no-such-command", "efficient")):
        monkeypatch.setenv("CXX", command)
        assert choose_path(args, net, 32, 0, 64, torch.device("cpu"), 10**6).path == path


def test_ranks_that_share_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 3 * GB)
    args, _ = train.parse_args(["--precision", "bf16"])
    with torch.device("meta"):
        net = DenseNet()
    choices = [choose_path(args, net, 32, 0, 64, torch.device("cpu"), 1, sharing=ranks).path for ranks in (1, 2, 4)]
    assert choices == ["textbook", "textbook", "efficient"]


# --- a container's limit ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("cgroup", "files", "limits"), [
    ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "3000000000", "memory.max": "8000000000"},
     [3 * GB, 8 * GB]),
    ("0::/\n", {"memory.max": "2000000000\n"}, [2 * GB]),
    ("0::/../other\n", {"memory.max": "2000000000"}, [2 * GB]),  # of a namespace: the path is not below the root
    ("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "1000000000",
                                             "memory/memory.limit_in_bytes": "9223372036854771712"},
     [GB, 9223372036854771712]),
    ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "1000000000"}, [GB]),  # a container's own root
    ("0::/a\n", {}, [])])
def test_limits_of_control_groups(cgroup, files, limits, tmp_path):
    root = tmp_path / "cgroup"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (tmp_path / "self").write_text(cgroup)
    assert cgroup_limits(tmp_path / "self", root) == limits


def test_a_container_limits_the_memory_and_no_cgroups_are_no_error(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [GB])
    assert memory.total_memory(cpu) == GB
    monkeypatch.setattr(memory, "cgroup_limits", lambda: [2**63])
    assert GB < memory.total_memory(cpu) < 2**50
    assert cgroup_limits(tmp_path / "none") == []


# --- in a run ---------------------------------------------------------------------------------------------------

@pytest.fixture
def argv(images, tmp_path):
    return ["--data", images, *SMALL, "--save", str(tmp_path / "run")]


@pytest.mark.parametrize(("flags", "gigabytes", "path", "reason"), [
    ([], 16, "efficient", "the fastest on a CPU in float32"),
    (["--precision", "bf16"], 16, "textbook", "a step of the textbook layers fits, with 0.0 of 16.0 GB"),
    (["--efficient", "max"], 16, "max", "--efficient max")])
def test_the_first_line_and_run_json_tell_the_path_and_why(flags, gigabytes, path, reason, argv, tmp_path, monkeypatch,
                                                           capsys):
    monkeypatch.setattr(memory, "total_memory", lambda device: gigabytes * GB)
    assert train.main([*argv, *flags, "--nEpochs", "1"]) == 0
    assert f"{path} path ({reason})" in capsys.readouterr().out.splitlines()[0]
    assert (about(tmp_path / "run")["path"], about(tmp_path / "run")["pathReason"]) == (path, reason)


def taken(monkeypatch, argv):
    """Trains -> the path that each network's first block took"""
    paths = []
    step = train.train_step

    def watched(net, *rest):
        result = step(net, *rest)
        paths.append(net.dense1.last_path)
        return result
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        assert train.main(argv) == 0
    return set(paths)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_path_also_where_another_would_be_taken(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "total_memory", lambda device: 16 * GB)
    argv += ["--precision", "bf16"]
    assert taken(monkeypatch, [*argv, "--nEpochs", "1"]) == {"textbook"}
    before = about(tmp_path / "run")
    monkeypatch.setattr(memory, "USABLE_SHARE", 1e-12)  # nothing fits any more
    capsys.readouterr()
    assert taken(monkeypatch, [*argv, "--nEpochs", "2", "--resume"]) == {"textbook"}
    assert "textbook path (a step of the textbook layers fits" in capsys.readouterr().out
    assert about(tmp_path / "run")["pathReason"] == before["pathReason"]
    assert taken(monkeypatch, [*argv, "--nEpochs", "1", "--overwrite"]) == {"efficient"}


@pytest.mark.slow
@pytest.mark.parametrize(("efficient", "path"), [("no", "textbook"), ("max", "max"), (None, "efficient")])
def test_a_checkpoint_of_an_older_version_keeps_its_own_path(efficient, path, argv, tmp_path, monkeypatch):
    """Without "path". Version 1.0's --efficient was yes, no or max; without it the block trained."""
    latest = tmp_path / "run/latest.pth"
    assert train.main([*argv, "--nEpochs", "1"]) == 0
    checkpoint = torch.load(latest, weights_only=True)
    checkpoint = {name: value for name, value in checkpoint.items() if name not in ("path", "pathReason")}
    checkpoint["flags"] |= {"efficient": efficient}
    if efficient is None:
        del checkpoint["flags"]["efficient"]
    torch.save(checkpoint, latest)
    assert taken(monkeypatch, ["--save", str(tmp_path / "run"), "--resume", "--nEpochs", "2", "--no-plot"]) == {path}
    assert about(tmp_path / "run")["path"] == path
