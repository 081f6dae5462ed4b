"""The FID's InceptionV3 in torch, from a table of its layers: the oracle of the parity tests.

Per block, branches in the order of their channels; a branch is a pool (or "") and a chain of
layers, each (name, out, kernel, stride, padding); a nested list at the end of a chain fans out.
"""

import torch
from torch import nn
from torch.nn import functional

ROW, COLUMN = (1, 7), (7, 1)


def _pointwise(name, out):
    return (name, out, 1, 1, 0)


def _kept(name, out, kernel):
    pad = kernel // 2 if isinstance(kernel, int) else tuple(k // 2 for k in kernel)
    return (name, out, kernel, 1, pad)


def _halved(name, out):
    return (name, out, 3, 2, 0)


def _a(pool_out):
    return [
        ("", [_pointwise("branch1x1", 64)]),
        ("", [_pointwise("branch5x5_1", 48), _kept("branch5x5_2", 64, 5)]),
        (
            "",
            [
                _pointwise("branch3x3dbl_1", 64),
                _kept("branch3x3dbl_2", 96, 3),
                _kept("branch3x3dbl_3", 96, 3),
            ],
        ),
        ("average", [_pointwise("branch_pool", pool_out)]),
    ]


def _c(width):
    names = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    chain = [(COLUMN, width), (ROW, width), (COLUMN, width), (ROW, 192)]
    double = [_kept(name, out, k) for name, (k, out) in zip(names[1:], chain, strict=True)]
    return [
        ("", [_pointwise("branch1x1", 192)]),
        (
            "",
            [
                _pointwise("branch7x7_1", width),
                _kept("branch7x7_2", width, ROW),
                _kept("branch7x7_3", 192, COLUMN),
            ],
        ),
        ("", [_pointwise(names[0], width), *double]),
        ("average", [_pointwise("branch_pool", 192)]),
    ]


def _e(pool):
    def fan(name):
        return [_kept(f"{name}a", 384, (1, 3)), _kept(f"{name}b", 384, (3, 1))]

    return [
        ("", [_pointwise("branch1x1", 320)]),
        ("", [_pointwise("branch3x3_1", 384), fan("branch3x3_2")]),
        (
            "",
            [
                _pointwise("branch3x3dbl_1", 448),
                _kept("branch3x3dbl_2", 384, 3),
                fan("branch3x3dbl_3"),
            ],
        ),
        (pool, [_pointwise("branch_pool", 192)]),
    ]


B = [
    ("", [_halved("branch3x3", 384)]),
    (
        "",
        [
            _pointwise("branch3x3dbl_1", 64),
            _kept("branch3x3dbl_2", 96, 3),
            _halved("branch3x3dbl_3", 96),
        ],
    ),
    ("halve", []),
]
D = [
    ("", [_pointwise("branch3x3_1", 192), _halved("branch3x3_2", 320)]),
    (
        "",
        [
            _pointwise("branch7x7x3_1", 192),
            _kept("branch7x7x3_2", 192, ROW),
            _kept("branch7x7x3_3", 192, COLUMN),
            _halved("branch7x7x3_4", 192),
        ],
    ),
    ("halve", []),
]
STEM = [
    _halved("Conv2d_1a_3x3", 32),
    ("Conv2d_2a_3x3", 32, 3, 1, 0),
    _kept("Conv2d_2b_3x3", 64, 3),
    "halve",
    _pointwise("Conv2d_3b_1x1", 80),
    ("Conv2d_4a_3x3", 192, 3, 1, 0),
    "halve",
]
BLOCKS = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": B,
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": D,
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}
POOLS = {
    "": lambda x: x,
    "average": lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "maximum": lambda x: functional.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: functional.max_pool2d(x, 3, 2),
}


def _layer(inputs, out, kernel, stride, padding):
    layer = nn.Module()
    layer.conv = nn.Conv2d(inputs, out, kernel, stride, padding, bias=False)
    layer.bn = nn.BatchNorm2d(out, eps=0.001)
    return layer


class TorchInception(nn.Module):
    """With its 1008-way classifier, whose weights the published file has too."""

    def __init__(self):
        super().__init__()
        width = 3
        for layer in STEM:
            if layer != "halve":
                self.add_module(layer[0], _layer(width, *layer[1:]))
                width = layer[1]
        for name, branches in BLOCKS.items():
            block, outputs = nn.Module(), 0
            for _, chain in branches:
                inputs = width
                for step in chain:
                    ends = step if isinstance(step, list) else [step]
                    for end in ends:
                        block.add_module(end[0], _layer(inputs, *end[1:]))
                    inputs = sum(end[1] for end in ends)
                outputs += inputs
            self.add_module(name, block)
            width = outputs
        self.fc = nn.Linear(width, 1008)

    def forward(self, x):
        def run(layer, x):
            return functional.relu(layer.bn(layer.conv(x)))

        for layer in STEM:
            x = POOLS["halve"](x) if layer == "halve" else run(getattr(self, layer[0]), x)
        for name, branches in BLOCKS.items():
            block, outputs = getattr(self, name), []
            for pool, chain in branches:
                y = POOLS[pool](x)
                for step in chain:
                    ends = step if isinstance(step, list) else [step]
                    y = torch.cat([run(getattr(block, end[0]), y) for end in ends], 1)
                outputs.append(y)
            x = torch.cat(outputs, 1)
        return x.mean((2, 3))


def random_inception(seed=0):
    """Evaluation mode, every tensor random, scaled so that activations stay in range."""
    torch.manual_seed(seed)
    model = TorchInception().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.2)
            elif name.endswith("conv.weight"):
                value.normal_(0, (2 / value[0].numel()) ** 0.5)
    return model
