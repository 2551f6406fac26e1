"""CCTM against Eq. 1-3 written out token by token and channel by channel."""

import math

import pytest
import torch

from crossdino.models.cctm import CrossCodingTwice, GlobalResponseNorm, MLPFusion, build_fusion

DIM, HIDDEN = 4, 6


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def linear(layer, vector):
    return [
        sum(w * v for w, v in zip(row, vector, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def gate(part, vector):
    """Eq. 1."""
    values = linear(part.linear, vector)
    mean = sum(values) / DIM
    variance = sum((v - mean) ** 2 for v in values) / DIM
    normed = [
        (v - mean) / math.sqrt(variance + 1e-5) * w + b
        for v, w, b in zip(values, part.norm.weight.tolist(), part.norm.bias.tolist(), strict=True)
    ]
    return [sigmoid(gelu(v)) for v in normed]


def reweight(part, tokens):
    """sigmoid(FC(GRN(GELU(FC)))) of one image's valid tokens."""
    hidden = [[gelu(v) for v in linear(part.linear1, token)] for token in tokens]
    norms = [math.sqrt(sum(token[c] ** 2 for token in hidden)) for c in range(HIDDEN)]
    mean = sum(norms) / HIDDEN
    gamma, beta = part.grn.gamma.tolist(), part.grn.beta.tolist()
    grn = [[t[c] * (norms[c] / (mean + 1e-6)) * gamma[c] + beta[c] + t[c] for c in range(HIDDEN)] for t in hidden]
    return [[sigmoid(v) for v in linear(part.linear2, token)] for token in grn]


def cctm(module, backbone, encoder):
    """Eq. 2-3 of one image's valid tokens (lists of lists)."""
    crossed_e, crossed_b = [], []
    for b, e in zip(backbone, encoder, strict=True):
        gate_e, gate_b = gate(module.gate_encoder, e), gate(module.gate_backbone, b)
        crossed_e.append([e[c] + b[c] * (1 - gate_e[c]) for c in range(DIM)])
        crossed_b.append([b[c] + e[c] * (1 - gate_b[c]) for c in range(DIM)])
    weight_e, weight_b = reweight(module.reweight_encoder, crossed_e), reweight(module.reweight_backbone, crossed_b)
    result = []
    for b, e, we, wb in zip(backbone, encoder, weight_e, weight_b, strict=True):
        result.append([2 * e[c] * wb[c] * we[c] + b[c] * (1 - wb[c] * we[c]) for c in range(DIM)])
    return result


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(2, 7, DIM), torch.randn(2, 7, DIM)


def randomised(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def test_cctm_is_equations_1_to_3_over_the_valid_tokens(tokens):
    module = randomised(CrossCodingTwice(DIM, HIDDEN))
    backbone, encoder = tokens
    mask = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    with torch.no_grad():
        ours = module(backbone, encoder, mask)
    for image, count in ((0, 7), (1, 4)):
        expected = torch.tensor(cctm(module, backbone[image, :count].tolist(), encoder[image, :count].tolist()))
        # 1e-5: float32 against double precision through two MLPs.
        torch.testing.assert_close(ours[image, :count], expected, atol=1e-5, rtol=1e-4)


def test_once_is_equation_2(tokens):
    module = randomised(CrossCodingTwice(DIM, HIDDEN, twice=False))
    backbone, encoder = tokens
    with torch.no_grad():
        ours = module(backbone, encoder)
    for image in range(2):
        for token in range(7):
            b, e = backbone[image, token].tolist(), encoder[image, token].tolist()
            expected = [e[c] + b[c] * (1 - g) for c, g in enumerate(gate(module.gate_encoder, e))]
            torch.testing.assert_close(ours[image, token], torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"gate_encoder"}


def test_padding_content_changes_nothing(tokens):
    module = randomised(CrossCodingTwice(DIM, HIDDEN))
    backbone, encoder = tokens
    mask = torch.tensor([[False] * 5 + [True] * 2] * 2)
    noisy = [t.masked_fill(mask[..., None], 100.0) for t in tokens]
    torch.testing.assert_close(module(backbone, encoder, mask)[:, :5], module(*noisy, mask)[:, :5])
    assert not torch.allclose(module(backbone, encoder, None)[:, :5], module(*noisy, None)[:, :5])


def test_grn_of_dead_channels_has_finite_gradients():
    norm = GlobalResponseNorm(3)
    torch.nn.init.ones_(norm.gamma)
    x = torch.zeros(1, 4, 3, requires_grad=True)
    norm(x, None).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_table_viii_forms():
    assert build_fusion("none", 256, 512) is None
    mlp = build_fusion("mlp", 256, 512)
    assert isinstance(mlp, MLPFusion)
    x, y = torch.randn(2, 1, 3, 256)
    torch.testing.assert_close(mlp(x, y), mlp.mlp_encoder(y) + mlp.mlp_backbone(x))
    # method.md section 4: about 0.66M parameters at width 512.
    count = sum(parameter.numel() for parameter in build_fusion("cctm", 256, 512).parameters())
    assert count == pytest.approx(0.66e6, rel=0.01)
