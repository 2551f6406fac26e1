"""Each part of the detector against the plain reference of the official DINO, on padded batches."""

from __future__ import annotations

import pytest
import torch

from crossdino.config import ModelConfig
from crossdino.models.decoder import MLP, Decoder, DecoderLayer, QueryBlock, block_visibility
from crossdino.models.detector import CrossDINO
from crossdino.models.encoder import EncoderLayer, encoder_reference_points
from crossdino.models.position import anchor_sine_embedding, sine_position
from tests.reference import dino_plain as plain

DIM, HEADS, POINTS = 32, plain.NUM_HEADS, 2
SHAPES = [(9, 12), (5, 6), (3, 3)]
# Rows and columns of two images that are not padding, level by level.
VALID = [[(7, 10), (4, 5), (2, 3)], [(9, 8), (5, 4), (3, 2)]]


def padding_masks():
    """A list over the levels of (N, H, W)."""
    masks = [torch.ones(2, *shape, dtype=torch.bool) for shape in SHAPES]
    for i, sizes in enumerate(VALID):
        for mask, (rows, columns) in zip(masks, sizes, strict=True):
            mask[i, :rows, :columns] = False
    return masks


def of_image(i):
    return [mask[i] for mask in padding_masks()]


def flat_mask():
    return torch.cat([mask.flatten(1) for mask in padding_masks()], dim=1)


def valid_ratios():
    return torch.tensor([[(c / w, r / h) for (r, c), (h, w) in zip(sizes, SHAPES, strict=True)] for sizes in VALID])


def randomised(module, seed=0):
    """The module with random weights everywhere, and its state in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.dim() == 1 else 0.0))
    return module.eval(), plain.double(module.state_dict())


def named(state, prefix):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def close(found, wanted):
    """float32 against float64: about 100 times the rounding of numbers of size 1."""
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


def random(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_position_encoding():
    for mask in padding_masks():
        found = sine_position(mask, DIM)
        for i in range(2):
            # Rows or columns that are all padding divide 0 by 1e-6; the official model does the same.
            close(found[i], plain.sine_position(mask[i], DIM))


def test_anchor_embedding():
    anchors = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    close(anchor_sine_embedding(anchors, DIM), torch.stack([plain.anchor_embedding(a, DIM) for a in anchors]))


def test_encoder_reference_points():
    found = encoder_reference_points(SHAPES, valid_ratios())
    for i in range(2):
        close(found[i], plain.encoder_references(of_image(i)))


def test_encoder_layer():
    layer, state = randomised(EncoderLayer(DIM, 48, len(SHAPES), HEADS, POINTS))
    tokens, positions = random(2, 147, DIM), random(2, 147, DIM, seed=4)
    references = encoder_reference_points(SHAPES, valid_ratios())
    found = layer(tokens, positions, references, SHAPES, flat_mask()).detach()
    for i in range(2):
        close(
            found[i],
            plain.encoder_layer(named(state, "l"), "l", tokens[i].double(), positions[i].double(), of_image(i)),
        )


def test_decoder_layer():
    layer, state = randomised(DecoderLayer(DIM, 48, len(SHAPES), HEADS, POINTS))
    queries, positions, memory = random(2, 6, DIM), random(2, 6, DIM, seed=4), random(2, 147, DIM, seed=5)
    references = torch.rand(2, 6, len(SHAPES), 4, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        values = layer.cross_attn.project(memory, flat_mask())
        found, _ = layer(queries, positions, references, values, SHAPES, None)
    for i in range(2):
        wanted = plain.decoder_layer(
            named(state, "l"),
            "l",
            queries[i].double(),
            positions[i].double(),
            references[i].double(),
            memory[i].double(),
            of_image(i),
        )
        close(found[i], wanted)


def random_decoder(num_layers):
    """A decoder with a box head, and the reference's weights for both."""
    decoder, state = randomised(Decoder(num_layers, DIM, 48, len(SHAPES), HEADS, POINTS))
    head, head_state = randomised(MLP(DIM, DIM, 4, 3), seed=1)
    state = named(state, "transformer.decoder")
    for layer in range(num_layers):
        state |= named(head_state, f"bbox_embed.{layer}")
        # The reference's "logits" are then the normalised outputs themselves.
        state |= {f"class_embed.{layer}.weight": torch.eye(DIM).double(), f"class_embed.{layer}.bias": torch.zeros(DIM)}
    return decoder, head, state


def test_refinement_looks_forward_twice():
    decoder, head, state = random_decoder(3)
    contents, memory = random(6, DIM), random(2, 147, DIM, seed=5)
    anchors = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(6))
    arguments = (contents.expand(2, -1, -1), anchors, memory, SHAPES, valid_ratios(), flat_mask(), None, head)
    with torch.no_grad():
        outputs, _ = decoder(*arguments, torch.nn.Identity(), True)
    for i in range(2):
        wanted_outputs, wanted_boxes = plain.decoder(
            state, contents.double(), anchors[i].double(), memory[i].double(), of_image(i)
        )
        for layer in range(3):
            close(outputs[layer].pred_logits[i], wanted_outputs[layer])
            close(outputs[layer].pred_boxes[i], wanted_boxes[layer])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("void", [False, True])
def test_blocks_of_denoising_queries_are_the_official_dense_mask(checkpointed, void):
    """Two islands and an empty slot in the first block, a second block that only image 1 has; with gradients on."""
    decoder, head, state = random_decoder(2)
    memory, contents = random(2, 147, DIM, seed=5), random(2, 5, DIM)
    anchors = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(6))
    islands = [torch.tensor([[0, 0, 1, 1, -1], [0, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0]])]
    noisy = [random(2, 5, DIM, seed=7), random(1, 3, DIM, seed=8)]
    noisy_anchors = [
        torch.rand(*one.shape[:2], 4, generator=torch.Generator().manual_seed(i)) for i, one in enumerate(noisy)
    ]
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]]) if void else None
    itself = torch.eye(5, dtype=torch.bool)
    blocks = [
        QueryBlock(noisy[0], noisy_anchors[0], block_visibility(islands[0], 5, hidden)),
        QueryBlock(
            noisy[1],
            noisy_anchors[1],
            block_visibility(islands[1], 5, None if hidden is None else hidden[1:]),
            torch.tensor([1]),
        ),
    ]
    matched, denoising = decoder(
        contents,
        anchors,
        memory,
        SHAPES,
        valid_ratios(),
        flat_mask(),
        None if hidden is None else ~hidden[:, None, None] | itself,
        head,
        torch.nn.Identity(),
        True,
        blocks,
        checkpointed,
    )
    for i in range(2):
        of_blocks = [(block, 0 if block else i) for block in range(1 + i)]
        # Everybody's island: block and number; None for an empty or void query, -1 for matched queries.
        who = [(block, int(number)) if number >= 0 else None for block, j in of_blocks for number in islands[block][j]]
        who += [None if hidden is not None and hidden[i, q] else -1 for q in range(5)]
        visible = torch.tensor(
            [
                [a == b or (who[b] is not None and (who[b] == -1 or who[a] == who[b])) for b in range(len(who))]
                for a in range(len(who))
            ]
        )
        wanted_outputs, wanted_boxes = plain.decoder(
            state,
            torch.cat([noisy[block][j] for block, j in of_blocks] + [contents[i]]).double(),
            torch.cat([noisy_anchors[block][j] for block, j in of_blocks] + [anchors[i]]).double(),
            memory[i].double(),
            of_image(i),
            visible,
        )
        for layer in range(2):
            found = [(denoising[layer][block], j) for block, j in of_blocks] + [(matched[layer], i)]
            close(torch.cat([one.pred_logits[j] for one, j in found]).detach(), wanted_outputs[layer])
            close(torch.cat([one.pred_boxes[j] for one, j in found]).detach(), wanted_boxes[layer])


def test_the_key_bias_changes_nothing_and_has_a_gradient_of_zero():
    layer, _ = randomised(DecoderLayer(DIM, 48, len(SHAPES), HEADS, POINTS))
    queries, positions, memory = random(2, 6, DIM), random(2, 6, DIM, seed=4), random(2, 147, DIM, seed=5)
    references = torch.rand(2, 6, len(SHAPES), 4, generator=torch.Generator().manual_seed(6))
    found, _ = layer(queries, positions, references, layer.cross_attn.project(memory), SHAPES, None)
    found.square().sum().backward()
    gradient = layer.self_attn.in_proj_bias.grad
    assert gradient is not None and (gradient[DIM : 2 * DIM] == 0).all()
    assert (gradient[:DIM] != 0).all() and (gradient[2 * DIM :] != 0).all()


def small_detector(padding):
    config = ModelConfig(
        backbone="test_efficientnet",
        num_feature_levels=3,
        hidden_dim=DIM,
        num_points=POINTS,
        num_encoder_layers=1,
        num_decoder_layers=1,
        feedforward_dim=48,
        num_queries=5,
        fusion="none",
        padding=padding,
    )
    return CrossDINO(config).eval()


def test_proposals():
    torch.manual_seed(0)
    model = small_detector("shared")
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[0, 70:] = True
    mask[0, :, 90:] = True
    mask[1, :, 61:] = True
    levels = model.features(torch.randn(2, 3, 96, 128), mask)
    token_mask = torch.cat([one.flatten(1) for one in levels.masks], dim=1)
    found, invalid = model._proposals(levels, token_mask)
    for i in range(2):
        masks = [plain.nearest(mask[i], *shape) for shape in levels.spatial_shapes]
        assert all(torch.equal(a[i], b) for a, b in zip(levels.masks, masks, strict=True))
        wanted, wanted_invalid = plain.proposals(masks)
        assert torch.equal(invalid[i], wanted_invalid) and 0 < wanted_invalid.sum() < len(wanted_invalid)
        close(found[i], wanted)


@pytest.mark.parametrize("padding", ["shared", "isolated"])
@pytest.mark.parametrize("map_width", [52, 56, 64, 76, 92, 100])
def test_a_centre_on_the_bound_is_invalid_whatever_the_padding(padding, map_width):
    """Of 50 columns the first has its centre at 0.01, where a rounding would decide; 800 px at stride 16 have them."""
    model = small_detector(padding)
    mask = torch.zeros(1, 32, map_width * 8, dtype=torch.bool)
    mask[:, :, 400:] = True
    images = torch.zeros(1, 3, 32, map_width * 8)
    # Isolated batches are as wide as their widest image.
    levels = model.features(torch.cat((images, images)), torch.cat((mask, torch.zeros_like(mask))))
    token_mask = torch.cat([one.flatten(1) for one in levels.masks], dim=1)
    _, invalid = model._proposals(levels, token_mask)
    first_level = invalid[0, : 4 * map_width].reshape(4, map_width)
    assert first_level[:, 0].all() and first_level[:, 49:].all() and not first_level[:, 1:49].any()
