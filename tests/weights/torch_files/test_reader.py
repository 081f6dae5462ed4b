"""PyTorch's files without PyTorch: what it writes is read, and nothing in a file is ever run."""

import argparse
import io
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from jaxsynth.core.errors import UserError
from jaxsynth.weights.torch_files.reader import read_nested, read_state_dict


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
     "torch._utils._rebuild_sparse_tensor", "torch.storage._load_from_bytes", "numpy.dtype"],
)  # fmt: skip
def test_any_other_name_is_refused_even_if_it_is_not_called(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    content = f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(UserError, match=rf"asks for {name.replace('.', '[.]')},"):
        read_state_dict(archive(tmp_path / "other.pt", content))


@pytest.mark.parametrize("name", ["torch._utils _rebuild_tensor_v2", "torch FloatStorage",
                                  "collections OrderedDict", "argparse Namespace"])  # fmt: skip
@pytest.mark.parametrize("slots", [False, True])
def test_a_pickle_sets_nothing_on_the_allowed_names(tmp_path, name, slots):
    """The opcode BUILD writes attributes of any object, and Python's machine lets it."""
    module, attribute = name.split()
    state = b"}X\x01\x00\x00\x00aK\x01s"
    state = b"N" + state + b"\x86" if slots else state
    content = f"c{module}\n{attribute}\n".encode() + state + b"b0}."
    with pytest.raises(UserError, match=r"data\.pkl is damaged: sets attributes of a"):
        read_state_dict(archive(tmp_path / "a.pt", content))


def ints(values):
    """A tuple of integers of up to 64 bits."""
    return (
        b"(" + b"".join(b"\x8a\x09" + n.to_bytes(9, "little", signed=True) for n in values) + b"t"
    )


def tensor(
    length=4, offset=0, shape=(2, 2), strides=(2, 1), storage="FloatStorage", change=b"", after=b""
):
    """The pickle of {"w": tensor}, in PyTorch's words; `change` is done to the storage, `after` to
    the tensor."""

    pid = b"(X\x07\x00\x00\x00storagectorch\n" + storage.encode() + b"\nX\x01\x00\x00\x000"
    pid += b"X\x03\x00\x00\x00cpu" + b"J" + struct.pack("<i", length) + b"tQ" + change
    arguments = b"(" + pid + b"J" + struct.pack("<i", offset) + ints(shape) + ints(strides)
    arguments += b"\x89ccollections\nOrderedDict\n)Rt"
    value = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    return b"\x80\x02}X\x01\x00\x00\x00w" + value + after + b"s."


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
        ({"strides": (-2, 1)}, r"data\.pkl is damaged: a tensor whose offset, shape or strides"),
        ({"offset": -1}, r"data\.pkl is damaged: a tensor whose offset, shape or strides"),
        ({"strides": (2,)}, r"data\.pkl is damaged: a tensor whose shape and strides"),
        (
            {"shape": (2**31 - 1,) * 3, "strides": (0, 0, 0)},
            "w: 99035203.* elements, or all tensors",
        ),
        ({"shape": (2**40,), "strides": (0,)}, "w: 1099511627776 elements, or all tensors"),
        ({"shape": (2**62,) * 4, "strides": (0,) * 4}, "w: .* elements, or"),
        ({"shape": (0, 2**62), "strides": (0, 0)}, "w: impossible shape"),
        (
            {"shape": (0,) + (1,) * 70, "strides": (1,) * 71},
            r"data\.pkl is damaged: a tensor of 71",
        ),
        ({"length": 5}, "storage '0' has 16 bytes, expected 20"),
        ({"length": -4}, r"data\.pkl is damaged: a storage that is described in another way"),
        ({"storage": "DoubleStorage"}, "storage '0' has 16 bytes, expected 32"),
        ({"storage": "QInt8Storage"}, r"asks for torch\.QInt8Storage"),
    ],
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=rf"bad\.pt: {message}|bad\.pt: refused.*{message}"):
        read_state_dict(archive(tmp_path / "bad.pt", tensor(**change), [NUMBERS]))


@pytest.mark.parametrize(
    "change",
    [{name: state} for name in ("after", "change") for state in (
        {"shape": ints((64,)), "strides": ints((-1,))}, {"offset": ints((-1,))},
        {"shape": b"N"}, {"storage": b"N"}, {"dtype": b"U\x01O"}, {"key": b"]"},
        {"length": b"K\x00"},
    )],
)  # fmt: skip
def test_a_checked_tensor_cannot_be_changed(tmp_path, change):
    """The opcode BUILD on what the machine made: numbers would no longer be the checked ones."""
    ((place, state),) = change.items()
    fields = b"".join(
        b"X" + struct.pack("<I", len(name)) + name.encode() + value for name, value in state.items()
    )
    path = archive(tmp_path / "a.pt", tensor(**{place: b"}(" + fields + b"ub"}), [NUMBERS])
    for read in (read_state_dict, read_nested):
        with pytest.raises(UserError, match=r"data\.pkl is damaged: sets attributes of a (T|S)"):
            read(path)


def doubled(times: int) -> bytes:
    """A tuple of two that are one: 2^times when written out."""
    pairs = (b"q%c0h%ch%c\x86" % (n, n, n) for n in range(times))
    return b")" + b"".join(pairs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"}r\xff\xff\xff\xff.", None),  # an index of the memo
        (b"}p1000000000\n.", None),
        (b"\x8d" + struct.pack("<Q", 2**40) + b"a.", r"data\.pkl is damaged"),
        (b"\x96" + struct.pack("<Q", 2**33) + b"a.", r"data\.pkl is damaged"),
        (b"}I" + b"9" * 4000 + b"\nNs.", "more than 128 bits"),
        (b"}(X\x01\x00\x00\x00w" + doubled(40) + b"u.", "'w' holds no tensor|more than 200000"),
        (b"}(" + doubled(40) + b"Nu.", "a key of type tuple"),
        (b"(K\x01K\x01K\x01K\x01" + doubled(40) + b"tQ.", "a storage that is described"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(" + doubled(40) + b"K\x00))tR.", "without a stor"),
        (b"]" * 100_000 + b"a" * 99_999 + b".", "holds a list"),
        (b"}(X\x01\x00\x00\x00w" + b")" + b"\x85" * 99_999 + b"u.", "no tensor|64 levels"),
        (b"}(X\x01\x00\x00\x00w]q\x01h\x01au.", "no tensor|64 levels"),
        (b"]" * 2_000_001 + b".", "more than 2000000 instructions"),
        (b"ccollections\nOrderedDict\nq\x000](" + b"K\x00K\x00\x86" * 5000 + b"eq\x010"
         + b"h\x00h\x01\x85R0" * 5000 + b"N.", "more than 2000000 items"),
        (b"X\x03\x00\x00\x00\xed\xa0\x80.", r"data\.pkl is damaged"),  # half of a character
        (b"}X\x08\x00\x00\x00\xe2\x80\xaegnp\x1b[Ns.", r"key '\\u202egnp\\x1b\[' holds no|^$"),
    ],
)  # fmt: skip
def test_small_files_fill_no_memory_and_end(tmp_path, content, message):
    path = archive(tmp_path / "small.pt", b"\x80\x02" + content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for read in (read_state_dict, read_nested):
        try:
            assert message is None or message.endswith("|^$"), read(path)
            read(path)
        except UserError as error:
            assert message is not None and re.search(message, str(error)), error
            assert len(str(error)) < 400
    assert time.process_time() - start < 60
    # In kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def test_files_of_an_archive_share_no_bytes(tmp_path):
    path = archive(tmp_path / "odd.pt", tensor(), [NUMBERS])
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("x/data/0")
        again = zipfile.ZipInfo("x/data/1")
        for field in ("header_offset", "compress_size", "file_size", "CRC"):
            setattr(again, field, getattr(first, field))
        file.filelist.append(again)
        file._didModify = True
    with pytest.raises(UserError, match=r"'x/data/[01]' lies upon another file"):
        read_state_dict(path)
    path = archive(tmp_path / "twice.pt", tensor(), [NUMBERS])
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("x/data/0", NUMBERS)
    with pytest.raises(UserError, match="two files in the archive are called 'x/data/0'"):
        read_state_dict(path)
    whole = bytearray(archive(path, tensor(), [NUMBERS]).read_bytes())
    whole[whole.rindex(b"PK\x01\x02") + 8] |= 1  # says that a password is needed
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"twice\.pt: cut short or damaged$"):
        read_state_dict(path)


def test_tensors_of_one_storage_are_together_no_larger_than_files_are(tmp_path):
    many = {f"{n}": torch.zeros(5000) for n in range(3)}
    many |= {f"tied{n}": many["0"] for n in range(8)}
    torch.save(many, tmp_path / "tied.pt")
    assert len(read_state_dict(tmp_path / "tied.pt")) == 11
    many |= {f"again{n}": many["0"] for n in range(80)}
    torch.save(many, tmp_path / "tied.pt")
    with pytest.raises(UserError, match="or all tensors up to it, are more than a file of"):
        read_state_dict(tmp_path / "tied.pt")


def test_a_storage_of_booleans_holds_nothing_else(tmp_path):
    flags = tensor(storage="BoolStorage")
    read = read_state_dict(archive(tmp_path / "flags.pt", flags, [b"\0\1\1\0"]))
    assert read["w"].tolist() == [[False, True], [True, False]]
    with pytest.raises(UserError, match="storage '0' holds no booleans"):
        read_state_dict(archive(tmp_path / "flags.pt", flags, [b"\0\1\7\0"]))


def test_archives_that_pytorch_does_not_write_are_refused(tmp_path):
    path = tmp_path / "odd.pt"
    with pytest.raises(UserError, match="data/0 is missing"):
        read_state_dict(archive(path, tensor()))
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read_state_dict(archive(path, tensor(), [NUMBERS], compress=True))
    with pytest.raises(UserError, match="byte order 'big', expected 'little'"):
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
        (old(1001, system, {}, ["0"]), "the list of storages is damaged"),
        (old(1001, system, [], []), "holds a list, expected a dict"),
        (old(1001, system), "contents is damaged: at or after"),
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
    named = {
        (20).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}': "but a safetensors file: give it",
        b"version https://git-lfs.github.com/spec/v1\n": "but the pointer of a file that git-lfs",
        b"<!DOCTYPE html>": "but a text such as the page of a download that failed",
    }
    for content, message in named.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"old\.pth: no PyTorch file .*{message}"):
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
