"""Number types of tensors: values, or one line that names file and key."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsynth.core.errors import UserError
from jaxsynth.weights.tensors import Tensors, expect_floats

torch = pytest.importorskip("torch")

VALUES = [[0.0, -1.5, 448.0], [0.0625, 1.0, -2.0]]
TYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_values_of_every_type(name, tmp_path):
    from safetensors.torch import save_file as save_torch

    tensor = torch.tensor(VALUES).to(getattr(torch, name))
    path = tmp_path / "weights.safetensors"
    # Another tensor before and after, so that an offset that is not heeded shows.
    save_torch({"a": torch.ones(3), "b": tensor, "c": torch.ones(5)}, path)
    found = {key: read() for _, key, read in Tensors([path]).items()}
    expected = tensor.to(torch.float64).numpy()
    np.testing.assert_array_equal(found["b"].astype(np.float64), expected)
    # Nothing computes with 8 bits.
    assert found["b"].dtype.itemsize * 8 >= 16 or name in ("int8", "uint8", "bool")
    if "float" in name:
        assert expect_floats(path, "b", found["b"], (2, 3)) is found["b"]
        with pytest.raises(UserError, match=r"weights.safetensors: b: shape \(2, 3\), expected"):
            expect_floats(path, "b", found["b"], (3, 2))
    else:
        with pytest.raises(UserError, match=rf"weights.safetensors: b: {name}, expected floats"):
            expect_floats(path, "b", found["b"], (2, 3))


@pytest.mark.parametrize("name", [t for t in TYPES if "float8" not in t])
def test_torchs_own_files_give_the_same(name, tmp_path):
    tensor = torch.tensor(VALUES).to(getattr(torch, name))
    torch.save({"b": tensor}, tmp_path / "weights.bin")
    ((_, key, read),) = Tensors([tmp_path / "weights.bin"]).items()
    assert key == "b"
    np.testing.assert_array_equal(read().astype(np.float64), tensor.to(torch.float64).numpy())


def test_a_type_that_numpy_has_not_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"b": np.zeros(4, ml_dtypes.bfloat16)}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["b"] |= {"dtype": "F8_E8M0", "shape": [8]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(UserError, match=r"weights.safetensors: b: dtype F8_E8M0, expected one of"):
        [read() for _, _, read in Tensors([path]).items()]
