"""What the detector computes in another way when it only detects, against its definition; and what it must not do."""

import dataclasses

import pytest
import torch

from crossdino.config import ModelConfig
from crossdino.models import dense
from crossdino.models.cctm import CrossCodingTwice
from crossdino.models.detector import CrossDINO
from crossdino.models.encoder import EncoderLayer
from crossdino.models.position import sine_position, sine_position_grid
from crossdino.structures import Target

SMALL = ModelConfig(
    backbone="resnet18",
    class_names=("a", "b", "c"),
    hidden_dim=64,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    feedforward_dim=48,
    num_queries=20,
    fusion_hidden_dim=24,
)


def detector(**changes):
    torch.manual_seed(0)
    return CrossDINO(dataclasses.replace(SMALL, **changes)).eval()


def padded(sizes_hw, height, width):
    generator = torch.Generator().manual_seed(len(sizes_hw))
    images = torch.randn(len(sizes_hw), 3, height, width, generator=generator)
    mask = torch.ones(len(sizes_hw), height, width, dtype=torch.bool)
    for place, (h, w) in enumerate(sizes_hw):
        mask[place, :h, :w] = False
    return images.masked_fill(mask[:, None], 0.0), mask


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 1), (13, 29)])
def test_the_grid_of_positions_is_the_encoding_of_a_map_without_padding_to_the_bit(height, width):
    whole = sine_position(torch.zeros(1, height, width, dtype=torch.bool), 32)[0]
    assert torch.equal(sine_position_grid(height, width, 32, torch.device("cpu")), whole)


@pytest.mark.parametrize("lengths", [(50,), (5000,), (5000, 4100, 1)])
def test_cctm_without_gradients_is_cctm_with_them(lengths):
    torch.manual_seed(1)
    module = CrossCodingTwice(16, 24)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    backbone, encoder = torch.randn(2, len(lengths), max(lengths), 16)
    mask = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    for padding in (mask, None):
        slow = module(backbone, encoder, padding)
        with torch.no_grad():
            fast = module(backbone, encoder, padding)
        # Two orders of summing 5000 squares.
        torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-5)


# torch deprecates its tracer, which its own function transforms use too.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_cctm_of_no_images_of_half_precision_and_traced():
    torch.manual_seed(1)
    module = CrossCodingTwice(16, 24)
    backbone, encoder = torch.randn(2, 2, 300, 16)
    with torch.no_grad():
        assert module(backbone[:0], encoder[:0]).shape == (0, 300, 16)
        traced = torch.jit.trace(module, (backbone[:1], encoder[:1]), check_trace=False)
        torch.testing.assert_close(traced(backbone, encoder), module(backbone, encoder), rtol=1e-5, atol=1e-5)
        exact = module(backbone, encoder)
        low = module.bfloat16()(backbone.bfloat16(), encoder.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.05)  # 8 bits through a dozen operations


def test_an_encoder_layer_in_chunks_is_the_layer(monkeypatch):
    torch.manual_seed(2)
    layer = EncoderLayer(32, 40, 2, 4, 2)
    shapes = [(9, 7), (5, 4)]
    tokens, positions = torch.randn(2, 2, 83, 32)
    mask = torch.rand(2, 83) > 0.8
    arguments = (tokens, positions, torch.rand(2, 83, 2, 2), shapes, mask)
    slow = layer(*arguments).detach()
    monkeypatch.setattr(dense, "_CHUNK_ROWS", 17)
    monkeypatch.setattr(dense, "_FEWEST_ROWS", 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(*arguments), slow, rtol=1e-5, atol=1e-5)


def test_tokens_that_are_no_proposals_do_not_show_what_they_hold():
    model = detector()
    memory, invalid = torch.randn(1, 6, 64), torch.tensor([[True, False, False, True, False, False]])
    found = model._propose(memory, invalid[..., None])
    layers = torch.nn.Sequential(model.enc_output, model.enc_output_norm)
    torch.testing.assert_close(found[0, 1], layers(memory[0, 1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0, 3], layers(torch.zeros(64)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_fetched_from_the_device_in_a_pass(training):
    # Tensors without values cannot be copied to the host: any such copy in the pass would raise.
    model = detector().train(training).to("meta")
    sizes = [(70, 101), (96, 64)]
    images, mask = padded(sizes, 96, 128)
    targets = [
        Target(torch.rand(n, 4), torch.zeros(n, dtype=torch.int64), noise_seed=n).to("meta") for n in (5, 2 * 100)
    ]
    output = model(images.to("meta"), mask, targets)
    assert output.pred_boxes.shape == (2, 20, 4)
    assert (output.denoising is not None) == training
    with pytest.raises((NotImplementedError, RuntimeError)):
        model(images.to("meta"), mask.to("meta"), targets)  # to see that a copy is noticed: the mask's sums


def test_autocast_keeps_boxes_in_float32_and_close():
    model = detector()
    for head in (model.bbox_embed, model.enc_bbox_embed):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.3)
    seen = {}
    model.encoder.register_forward_hook(lambda _module, _inputs, output: seen.update(memory=output))
    model.decoder.layers[0].linear1.register_forward_hook(lambda _module, _inputs, output: seen.update(hidden=output))
    model.decoder.layers[0].register_forward_pre_hook(lambda _module, inputs: seen.update(values=inputs[3]))
    images, mask = padded([(90, 128), (96, 70)], 96, 128)
    with torch.no_grad():
        exact = model(images, mask)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images, mask)
            assert torch.is_autocast_enabled("cpu")
    # Products and stored values in bfloat16, sums and queries in float32.
    assert {name: tensor.dtype for name, tensor in seen.items()} == {
        "memory": torch.float32,
        "hidden": torch.float32,
        "values": torch.bfloat16,
    }
    assert output.pred_boxes.dtype == output.pred_logits.dtype == torch.float32
    # Random weights may choose other queries; the nearest box of each must lie within a pixel of 128.
    for fast, slow in zip(output.pred_boxes, exact.pred_boxes, strict=True):
        nearest = torch.cdist(slow, fast, p=torch.inf).min(dim=1).values
        assert nearest.median() < 1 / 128


def test_the_whole_detector_compiles_for_changing_sizes():
    model = detector()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for hw in ((64, 96), (80, 112), (95, 70)):
        image = torch.randn(1, 3, *hw, generator=torch.Generator().manual_seed(hw[0]))
        with torch.no_grad():
            eager, fast = model(image), compiled(image)
        torch.testing.assert_close(fast.pred_boxes, eager.pred_boxes, rtol=0, atol=1e-4)
        torch.testing.assert_close(fast.pred_logits, eager.pred_logits, rtol=0, atol=1e-3)
