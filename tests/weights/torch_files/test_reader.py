"""PyTorch's files without PyTorch: what it writes is read, and nothing in a file is ever run."""

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from jaxsynth.core.errors import UserError
from jaxsynth.weights.torch_files.reader import read_state_dict


def assert_equal(found: dict, expected: dict):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        wanted = tensor.detach()
        if wanted.dtype == torch.bfloat16:
            assert found[key].dtype == ml_dtypes.bfloat16
            wanted = wanted.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            wanted = wanted.numpy()
        assert found[key].dtype == wanted.dtype and found[key].shape == wanted.shape, key
        np.testing.assert_array_equal(found[key], wanted, err_msg=key)


def test_tensors_of_every_dtype_and_layout(tmp_path):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 8, generator=generator)
    state = {
        "float": wide,
        "half": wide.half(),
        "bfloat16": wide.bfloat16(),
        "double": wide.double(),
        "long": torch.arange(5) - 2,
        "int": torch.arange(5, dtype=torch.int32),
        "short": torch.arange(5, dtype=torch.int16),
        "char": torch.arange(-2, 3, dtype=torch.int8),
        "byte": torch.arange(250, 255, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": wide.t(),
        "strided": wide[1::2, 2:7:3],
        "shared": wide[3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "permuted": torch.randn(2, 3, 4, 5, generator=generator).permute(3, 1, 0, 2),
    }
    for new in (True, False):
        torch.save(state, tmp_path / "all.pt", _use_new_zipfile_serialization=new)
        found = read_state_dict(tmp_path / "all.pt")
        assert_equal(found, state)
        assert not found["float"].flags.writeable


def test_a_modules_state_dict_and_its_parameters(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), tmp_path / "net.pth")
    assert_equal(read_state_dict(tmp_path / "net.pth"), module.state_dict())


def test_training_checkpoints_hold_it_under_a_name(tmp_path):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    averaged = OrderedDict((key, value + 1) for key, value in module.state_dict().items())
    checkpoint = {
        "model": module.state_dict(),
        "ema": averaged,
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-4, model="DiT-XL/2"),
    }
    path = tmp_path / "0050000.pt"
    torch.save(checkpoint, path)
    assert_equal(read_state_dict(path), averaged)
    assert_equal(read_state_dict(path, nested=("model",)), module.state_dict())
    with pytest.raises(UserError, match=r"key 'model' holds no tensor; .* under 'weights'"):
        read_state_dict(path, nested=("weights",))
    with pytest.raises(UserError, match=r"key 'state' under 'opt' holds no tensor"):
        read_state_dict(path, nested=("opt",))
    torch.save([torch.ones(1)], path)
    with pytest.raises(UserError, match=r"0050000\.pt: holds a list, expected a dict"):
        read_state_dict(path)


def archive(path, content: bytes, storages=(), *, compress=False, **extra):
    """A file like PyTorch's with another pickle."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("x/data.pkl", content)
        for number, numbers in enumerate(storages):
            file.writestr(f"x/data/{number}", numbers)
        for name, value in extra.items():
            file.writestr(f"x/{name}", value)
    return path


class Runs:
    """Unpickled by pickle, it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused(tmp_path, protocol):
    path = archive(tmp_path / "evil.pt", pickle.dumps({"w": Runs(tmp_path / "made")}, protocol))
    with pytest.raises(UserError, match=r"evil\.pt: refused, because it asks for \w+\.mkdir"):
        read_state_dict(path)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Runs(tmp_path / "made"), protocol))
    assert (tmp_path / "made").exists(), "the pickle of this test does nothing at all"


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.getattr", "collections.Counter", "torch.load", "torch.Tensor",
     "torch._utils._rebuild_parameter", "torch.storage._load_from_bytes", "numpy.dtype"],
)  # fmt: skip
def test_any_other_name_is_refused_even_if_it_is_not_called(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    content = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(UserError, match=rf"asks for {name.replace('.', '[.]')},"):
        read_state_dict(archive(tmp_path / "other.pt", content))


def test_what_a_pickle_sets_on_the_allowed_names_does_not_last(tmp_path):
    """The opcode BUILD writes attributes of any object: only of those made for this file."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    content = rebuild + b"}X\x01\x00\x00\x00aK\x01sb0" + b"}."
    assert read_state_dict(archive(tmp_path / "a.pt", content)) == {}
    ordered = b"ccollections\nOrderedDict\n"
    for state in (b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"):
        with pytest.raises(UserError, match=r"data\.pkl is damaged: TypeError"):
            read_state_dict(archive(tmp_path / "b.pt", ordered + state + b"b}."))
    assert not hasattr(OrderedDict, "a") and not hasattr(argparse.Namespace, "a")


def tensor(length=4, offset=0, shape=(2, 2), strides=(2, 1), storage="FloatStorage"):
    """The pickle of {"w": tensor}, in PyTorch's words."""

    def ints(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    pid = b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\nX\x01\x00\x00\x000"
    pid += b"X\x03\x00\x00\x00cpu" + b"J" + struct.pack("<i", length) + b"tQ"
    arguments = b"(" + pid + b"J" + struct.pack("<i", offset) + ints(shape) + ints(strides)
    arguments += b"\x89ccollections\nOrderedDict\n)Rt"
    value = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + b"s."


NUMBERS = np.arange(4, dtype=np.float32).tobytes()


def test_the_pickles_of_the_tests_below_are_valid(tmp_path):
    path = archive(tmp_path / "good.pt", tensor(), [NUMBERS], byteorder="little")
    np.testing.assert_array_equal(read_state_dict(path)["w"], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 1}, "w: reaches beyond its storage '0'"),
        ({"shape": (3, 2)}, "w: reaches beyond its storage '0'"),
        ({"strides": (3, 1)}, "w: reaches beyond its storage '0'"),
        ({"strides": (-2, 1)}, r"data\.pkl is damaged: ValueError"),
        ({"offset": -1}, r"data\.pkl is damaged: ValueError"),
        ({"strides": (2,)}, r"data\.pkl is damaged: ValueError"),
        ({"shape": (2**31 - 1,) * 3, "strides": (0, 0, 0)}, "w: impossible shape"),
        ({"shape": (0,) + (1,) * 70, "strides": (1,) * 71}, "w: impossible shape"),
        ({"length": 5}, "storage '0' has 16 bytes, expected 20"),
        ({"length": -4}, r"data\.pkl is damaged: ValueError"),
        ({"storage": "DoubleStorage"}, "storage '0' has 16 bytes, expected 32"),
        ({"storage": "QInt8Storage"}, r"asks for torch\.QInt8Storage"),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"bad\.pt: {message}|bad\.pt: refused.*{message}"):
        read_state_dict(archive(tmp_path / "bad.pt", tensor(**change), [NUMBERS]))


def test_archives_that_pytorch_does_not_write_are_refused(tmp_path):
    path = tmp_path / "odd.pt"
    with pytest.raises(UserError, match="data/0 is missing"):
        read_state_dict(archive(path, tensor()))
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read_state_dict(archive(path, tensor(), [NUMBERS], compress=True))
    with pytest.raises(UserError, match="byte order b'big', expected little"):
        read_state_dict(archive(path, tensor(), [NUMBERS], byteorder="big"))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "")
    with pytest.raises(UserError, match=r"expected one data\.pkl in the archive, found 0"):
        read_state_dict(path)


def test_a_file_cut_short_or_damaged_is_named(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"w": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"net\.pt: cut short or damaged"):
            read_state_dict(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"net\.pt: cut short or damaged: Bad CRC"):
        read_state_dict(path)
    for content in (b"", tensor()[:40], b"\x80\x02}X\xff\xff\xff\x7fw.", b"garbage"):
        with pytest.raises(UserError, match=r"net\.pt: data\.pkl is damaged"):
            read_state_dict(archive(path, content))


def old(*parts, numbers=b"", magic=0x1950A86A20F9469CFC6C):
    """A file before PyTorch 1.6: pickles one after the other, then the numbers."""
    return b"".join(pickle.dumps(part, 2) for part in (magic, *parts)) + numbers


def test_the_format_before_pytorch_1_6(tmp_path):
    path = tmp_path / "old.pth"
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    checkpoint = {"epoch": 3, "state_dict": module.state_dict()}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert_equal(read_state_dict(path), module.state_dict())
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 700, len(whole) // 2, 40):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"old\.pth: .*(cut short|damaged)"):
            read_state_dict(path)
    system = {"little_endian": True}
    for content, message in (
        (
            old(1001, system, {"w": Runs(tmp_path / "made")}),
            r"refused, because it asks for \w+\.mkd",
        ),
        (old(1001, Runs(tmp_path / "made")), r"refused, because it asks for \w+\.mkd"),
        (old(1001, {"little_endian": False}), ".* little_endian False, expected 1001 and True"),
        (old(1000, system), "version 1000 with"),
        (old(1001, system, {}, ["0"]), r"the list of storages is damaged: \['0'\]"),
        (old(1001, system, [], []), "holds a list, expected a dict"),
        (old(1001, system), "contents is damaged: EOFError"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"old\.pth: " + message):
            read_state_dict(path)
    assert not (tmp_path / "made").exists()
    # More elements than the file has bytes: no memory is asked for. The last 16 bytes are the
    # number of elements and two floats.
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for count, message in (
        (2**60, "cut short or damaged: storage"),
        (1, "has 4 bytes, expected 8"),
    ):
        path.write_bytes(whole[:-16] + count.to_bytes(8, "little") + whole[-8:])
        with pytest.raises(UserError, match=r"old\.pth: .*" + message):
            read_state_dict(path)


def test_other_formats_are_named(tmp_path):
    path = tmp_path / "old.pth"
    for content in (b"", b"not a checkpoint", old(magic=7)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"old\.pth: no PyTorch file"):
            read_state_dict(path)
    with pytest.raises(UserError, match="nowhere: no such file"):
        read_state_dict(tmp_path / "nowhere")


def test_pytorch_is_not_imported(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    path = tmp_path / "net.pt"
    path.write_bytes(buffer.getvalue())
    script = (
        "import sys; from jaxsynth.weights.torch_files.reader import read_state_dict; "
        "assert read_state_dict(sys.argv[1])['w'].sum() == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
