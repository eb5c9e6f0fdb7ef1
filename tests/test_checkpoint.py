"""Reading checkpoints by densenet.py: from paths and open files, damaged, and made by strangers."""

import errno
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import densenet
from densenet import DenseNet


@pytest.fixture
def small():
    torch.manual_seed(0)
    return DenseNet(growthRate=4, depth=10)


def checkpoint_of(net: DenseNet) -> dict:
    return {"format": 1, "arguments": net.arguments, "model": net.state_dict(), "epoch": 1,
            "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": [str(i) for i in range(10)]}


def test_load_rebuilds_a_trained_network(small, tmp_path):
    small(torch.randn(8, 3, 16, 16))  # running statistics other than the initial ones
    torch.save(checkpoint_of(small), tmp_path / "latest.pth")
    net = densenet.load(tmp_path / "latest.pth")
    assert not net.training and net.classes[3] == "3"
    assert net.mean.shape == net.std.shape == (3, 1, 1) and net.mean[1].item() == pytest.approx(0.4)
    x = torch.randn(1, 3, 16, 16)
    assert (net(x) == small.eval()(x)).all()
    assert net.state_dict().keys() == small.state_dict().keys()


def test_load_refuses_a_file_that_is_not_a_checkpoint(small, tmp_path):
    path = tmp_path / "latest.pth"
    with pytest.raises(FileNotFoundError):
        densenet.load(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        densenet.load(path)
    torch.save(small, path)  # a pickled module, as the ancestor's: unpickling could run code
    with pytest.raises(ValueError, match="could run code"):
        densenet.load(path)
    torch.save(checkpoint_of(small) | {"format": 2}, path)
    with pytest.raises(ValueError, match="its format is 2; valid is 1"):
        densenet.load(path)
    torch.save(checkpoint_of(small) | {"arguments": {"growth": 4}}, path)
    with pytest.raises(ValueError, match="unexpected keyword argument 'growth'"):
        densenet.load(path)
    torch.save({"format": 1, "arguments": small.arguments}, path)
    with pytest.raises(ValueError, match="it has no classes"):
        densenet.load(path)
    content = io.BytesIO()
    torch.save(checkpoint_of(small), content)
    damaged = bytearray(content.getvalue())
    at = damaged.find(small.fc.weight.detach().numpy().tobytes())
    damaged[at + 5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        densenet.load(path)
    for cut in (10, len(damaged) // 2, len(damaged) - 5):
        path.write_bytes(content.getvalue()[:cut])
        with pytest.raises(ValueError, match="damaged"):
            densenet.load(path)


def saved(content: object) -> bytes:
    """-> the file that torch.save writes"""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def rezipped(content: bytes, **settings) -> bytes:
    """-> the same parts in a new archive, with these settings of ZipFile"""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w", **settings) as after:
        for part in before.infolist():
            after.writestr(part.filename, before.read(part))
    return file.getvalue()


def test_load_takes_an_open_file_and_leaves_it_open(small, tmp_path):
    (tmp_path / "latest.pth").write_bytes(saved(checkpoint_of(small)))
    x = torch.randn(1, 3, 16, 16)
    with open(tmp_path / "latest.pth", "rb") as file:
        for source in (file, io.BytesIO(file.read()), str(tmp_path / "latest.pth")):
            assert densenet.load(source)(x).equal(small.eval()(x))
        assert not file.closed
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        densenet.load(io.BytesIO(b"no zip"))


@pytest.mark.slow
def test_a_flipped_bit_in_the_zips_directory_is_reported_as_damage(tmp_path):
    """A plain ValueError, not an exception of zipfile or zlib and not ForeignFile: --resume then takes the epoch
    before."""
    content = saved({"format": 1, "x": torch.arange(5.)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start = archive.start_dir
    path, refused = tmp_path / "latest.pth", 0
    for at in range(start, len(content)):
        for bit in (0, 3, 4, 7):
            damaged = bytearray(content)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert densenet.read_checkpoint(path)["x"].equal(torch.arange(5.))
            except ValueError as error:
                assert type(error) is ValueError and f"{path} is damaged" in str(error)
                refused += 1
    assert refused > 500


def test_a_read_error_of_the_disk_is_damage_and_other_oserrors_pass_through():
    class Failing(io.BytesIO):
        def read(self, n=-1):
            if self.tell() < 64:
                raise OSError(self.number, "of the disk")
            return super().read(n)

    for number, kind in ((errno.EIO, ValueError), (errno.ESTALE, OSError)):
        file = Failing(saved({"format": 1}))
        file.number = number
        with pytest.raises(kind, match="of the disk"):
            densenet.read_checkpoint(file)


def test_compressed_and_overlapping_parts_are_refused(small, tmp_path):
    content = saved(checkpoint_of(small))
    assert densenet.load(io.BytesIO(rezipped(content))).classes == [str(i) for i in range(10)]
    with pytest.raises(ValueError, match="compressed"):
        densenet.load(io.BytesIO(rezipped(content, compression=zipfile.ZIP_DEFLATED)))
    file = io.BytesIO(rezipped(content))
    with zipfile.ZipFile(file, "a") as archive:
        archive.filelist += archive.filelist * 3  # the same bytes four times
        archive._didModify = True
    with pytest.raises(ValueError, match="overlap"):
        densenet.load(file)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["arguments"].update(growthRate=8), "size mismatch"),
    (lambda c: c["arguments"].update(depth=100), "declares 100 layers in"),
    (lambda c: c["arguments"].update(depth=11), "depth is 11; valid"),
    (lambda c: c.update(arguments=[1]), "has no attribute 'get'"),
    (lambda c: c["arguments"].update(depth=None, blockConfig="ab"), "unsupported operand"),
    (lambda c: c["arguments"].update(growthRate=10**400), "latest.pth is not a checkpoint"),
    (lambda c: c["model"].pop("fc.bias"), "fc.bias"), (lambda c: c.update(model=7), "no attribute"),
    (lambda c: c["model"].update({"fc.bias": "x"}), "no attribute"),
    (lambda c: c["model"].update({"fc.bias": torch.empty(10, device="meta")}), "latest.pth is not a checkpoint"),
    (lambda c: c["model"].update({"fc.bias": torch.ones(10).to_sparse()}), "latest.pth is not a checkpoint"),
    (lambda c: c["model"].update({"fc.weight": torch.zeros(1).expand(10, 13)}), "but has 56 tensors in"),
    (lambda c: c.update(mean="ab"), "latest.pth is not a checkpoint"), (lambda c: c.update(std=[1.0]), "invalid for"),
])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_load_refuses_a_checkpoint_that_contradicts_its_own_arguments(change, message, small, tmp_path):
    content = checkpoint_of(small)
    content["model"] = dict(content["model"])
    change(content)
    torch.save(content, tmp_path / "latest.pth")
    with pytest.raises(ValueError) as error:
        densenet.load(tmp_path / "latest.pth")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_checkpoints_without_the_newest_arguments_and_in_half_precision_load(small, tmp_path):
    content = checkpoint_of(small)
    content["arguments"].pop("bnSize", None)
    content["model"] = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    net = densenet.load(io.BytesIO(saved(content)))
    assert net.arguments["bnSize"] == 4 and all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(net(x), small.eval()(x), rtol=0.01, atol=0.01)


def test_a_network_made_with_numpy_arguments_can_be_saved_and_loaded(tmp_path):
    net = DenseNet(growthRate=np.int64(4), blockConfig=np.array([1, 2]), reduction=np.float32(0.5), bnSize=np.uint8(2))
    loaded = densenet.load(io.BytesIO(saved(checkpoint_of(net))))
    assert loaded.arguments == net.arguments and loaded.arguments["blockConfig"] == [1, 2]


LIMITED = """
import resource, sys
import torch, densenet
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        densenet.load(path)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_a_small_file_that_declares_a_huge_network_takes_no_memory(small, tmp_path):
    """The process may take 200 MiB more than it has after importing torch."""
    original, one_value = checkpoint_of(small), torch.zeros(1)
    hostile = {
        "wide": (dict(growthRate=10**6), "size mismatch"),
        "deep": (dict(depth=10**6), "declares 1000000 layers"),
        "deeper": (dict(depth=10**6 + 2, bottleneck=False), "declares 1000002 layers"),
        "blocks": (dict(depth=None, blockConfig=[10**6] * 3), "declares 3000000 layers"),
        "classes": (dict(nClasses=10**9), "not the names of 1000000000 classes"),
    }
    for name, (arguments, _) in hostile.items():
        torch.save(original | {"arguments": small.arguments | arguments}, tmp_path / name)
    torch.save(original | {"arguments": small.arguments | {"nClasses": 10**9},
                           "model": original["model"] | {"fc.weight": one_value.expand(10**9, 13),
                                                         "fc.bias": one_value.expand(10**9)}}, tmp_path / "expanded")
    bomb = saved(original | {"optimizer": torch.zeros(10**8)})
    (tmp_path / "bomb").write_bytes(rezipped(bomb, compression=zipfile.ZIP_DEFLATED))
    assert all(path.stat().st_size < 10**6 for path in tmp_path.iterdir())
    expected = [message for _, message in hostile.values()] + ["but has 56 tensors in", "compressed"]
    paths = [tmp_path / name for name in (*hostile, "expanded", "bomb")]
    done = subprocess.run([sys.executable, "-c", LIMITED, *paths],
                          capture_output=True, text=True, timeout=100, cwd=Path(densenet.__file__).parent)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(expected), done.stderr[-500:]
    for line, message in zip(lines, expected, strict=True):
        assert message in line
