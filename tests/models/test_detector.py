"""The detector as a whole: padding laws, any size, void queries, denoising isolation, parameter and MAC counts."""

import dataclasses
import math

import pytest
import torch

from crossdino.config import LossConfig, ModelConfig
from crossdino.errors import InputError
from crossdino.losses import Criterion
from crossdino.models.detector import CrossDINO
from crossdino.structures import Target

TINY = ModelConfig(
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


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = CrossDINO(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():
        # Heads that start at zero would hide mistakes behind boxes that never move.
        for head in (model.bbox_embed, model.enc_bbox_embed):
            torch.nn.init.normal_(head.layers[-1].weight, std=0.3)
        for layer in [*model.encoder.layers, *model.decoder.layers]:
            attention = layer.self_attn if hasattr(layer.self_attn, "sampling_offsets") else layer.cross_attn
            torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.2)
            torch.nn.init.normal_(attention.attention_weights.weight, std=0.2)
    return model


def padded_batch(images, height, width, fill=0.0):
    batch = torch.full((len(images), 3, height, width), fill)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask


@pytest.mark.parametrize("fusion", ["cctm", "once", "mlp", "none"])
def test_an_image_alone_and_padded_in_a_batch_is_the_same(fusion):
    model = build(fusion=fusion)
    images = [torch.randn(3, 100, 171), torch.randn(3, 149, 90), torch.randn(3, 100, 171)]
    with torch.no_grad():
        together = model(*padded_batch(images, 190, 230, fill=7.0))
        for i, image in enumerate(images):
            alone = model(image[None])
            # 1e-4 is the promise to the user; measured differences are below 1e-6.
            torch.testing.assert_close(together.pred_boxes[i], alone.pred_boxes[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(together.pred_logits[i], alone.pred_logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("backbone", ["strip_mlp_t_light", "tf_efficientnet_lite0", "swin_t"])
def test_the_same_for_backbones_with_global_operations(backbone):
    model = build(backbone=backbone)
    images = [torch.randn(3, 70, 101), torch.randn(3, 96, 64)]
    with torch.no_grad():
        together = model(*padded_batch(images, 110, 130))
        for i, image in enumerate(images):
            alone = model(image[None])
            torch.testing.assert_close(together.pred_boxes[i], alone.pred_boxes[0], atol=1e-4, rtol=0)


def test_the_loss_is_the_same_alone_and_padded():
    model = build()
    images = [torch.randn(3, 100, 171), torch.randn(3, 149, 90)]
    targets = [Target(torch.rand(n, 4) * 0.3 + 0.2, torch.randint(3, (n,)), image_id=n) for n in (3, 5)]
    criterion = Criterion(LossConfig())
    with torch.no_grad():
        together = criterion(model(*padded_batch(images, 160, 192)), targets)["loss"]
        alone = [
            criterion(model(image[None]), [target], num_boxes=8)["loss"]
            for image, target in zip(images, targets, strict=True)
        ]
    torch.testing.assert_close(together, sum(alone), atol=1e-4, rtol=1e-5)


def test_shared_padding_is_what_official_dino_does_and_not_invariant():
    """The setting must matter: convolutions and GroupNorm see the padding in the official form."""
    model = build(padding="shared", fusion="none")
    image = torch.randn(3, 96, 96)
    with torch.no_grad():
        alone = model(image[None])
        padded = model(*padded_batch([image], 128, 192))
    assert (alone.pred_logits[0] - padded.pred_logits[0]).abs().max() > 1e-3


def test_both_paddings_agree_on_an_unpadded_image_of_whole_strides():
    image = torch.randn(1, 3, 128, 192)
    outputs = []
    for padding in ("isolated", "shared"):
        model = build(padding=padding)
        with torch.no_grad():
            outputs.append(model(image))
    torch.testing.assert_close(outputs[0].pred_boxes, outputs[1].pred_boxes, atol=1e-5, rtol=0)


def test_images_with_fewer_tokens_than_queries():
    """An 8 x 8 image has 4 tokens: 16 of 20 queries are void, alone and beside a larger image."""
    model = build()
    small, large = torch.randn(3, 8, 8), torch.randn(3, 160, 160)
    with torch.no_grad():
        alone = model(small[None])
        together = model(*padded_batch([small, large], 160, 160))
    assert alone.pred_logits.shape == (1, 20, 3)
    assert (alone.pred_logits[0, 4:] == -20).all() and (alone.pred_logits[0, :4] > -20).all()
    torch.testing.assert_close(together.pred_logits[0], alone.pred_logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(together.pred_boxes[0], alone.pred_boxes[0], atol=1e-4, rtol=0)
    assert (together.pred_logits[1] > -20).all()


@pytest.mark.parametrize("hw", [(1, 1), (33, 5), (31, 97), (256, 64)])
def test_any_size(hw):
    model = build()
    with torch.no_grad():
        output = model(torch.randn(2, 3, *hw))
    assert torch.isfinite(output.pred_boxes).all() and torch.isfinite(output.pred_logits).all()


def test_token_positions_are_exact_where_the_size_is_no_multiple_of_the_stride():
    """Token j of level 0 lies at pixel 8 (j + 0.5) whatever the image's width: proposals must say so."""
    from crossdino.models.encoder import token_centres

    model = build()
    width = 133
    levels = model.features(torch.randn(1, 3, 64, width))
    centres = token_centres(levels.spatial_shapes, levels.valid_ratios)
    for j in range(math.ceil(width / 8)):
        assert float(centres[0, j, 0]) * width == pytest.approx(8 * (j + 0.5), abs=1e-3)


def test_denoising_queries_do_not_change_the_matched_ones():
    model = build()
    images = torch.randn(2, 3, 96, 96)
    targets = [Target(torch.rand(n, 4) * 0.3 + 0.2, torch.randint(3, (n,))) for n in (4, 1)]
    with torch.no_grad():
        expected = model(images)
        model.train()
        output = model(images, None, targets)
    assert output.denoising is not None and output.denoising.layers[0].pred_boxes.shape == (2, 200, 4)
    torch.testing.assert_close(output.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pred_logits, expected.pred_logits, atol=1e-4, rtol=0)


def random_target(num_objects, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(num_objects, 4, generator=generator) * 0.3 + 0.2
    return Target(boxes, torch.randint(3, (num_objects,), generator=generator), noise_seed=seed)


def test_the_denoising_loss_of_an_image_does_not_depend_on_its_company():
    """Within the budget of 8, beyond it, beside a crowd and beside an image without objects; one has void queries."""
    model = build(num_denoising=8).train()
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 64), torch.randn(3, 64, 96), torch.randn(3, 8, 8)]
    targets = [random_target(n, n) for n in (3, 21, 0, 5)]
    criterion = Criterion(LossConfig())
    with torch.no_grad():
        together = criterion(model(*padded_batch(images, 96, 96), targets), targets, num_boxes=29)
        alone = [
            criterion(model(image[None], None, [target]), [target], num_boxes=29)
            for image, target in zip(images, targets, strict=True)
        ]
    # Sums of some hundred float32 numbers in another order.
    torch.testing.assert_close(together["denoising"], sum(one["denoising"] for one in alone), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(together["loss"], sum(one["loss"] for one in alone), atol=1e-4, rtol=1e-5)


def saved_bytes(model, num_objects, images):
    """Bytes that forward and loss keep for the backward pass, each storage once."""
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    target = random_target(num_objects, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images, None, [target])
        loss = Criterion(LossConfig())(output, [target])["loss"]
    assert loss.isfinite()
    return sum(sizes.values())


def test_a_crowd_keeps_no_more_for_the_backward_pass_than_a_few():
    """Ten times the budget: the nine further rounds keep their inputs, and nothing that is computed from them."""
    model = build(num_denoising=10).train()
    images = torch.randn(1, 3, 64, 64)
    few, crowd = (saved_bytes(model, count, images) for count in (10, 100))
    # 180 more slots. One that is kept whole costs 14 kB here (measured with the checkpoint removed), now 388 bytes: its
    # row of the mask, a few integers, and what the losses of two layers keep for its three logits and four numbers of
    # its box. (Layer inputs, 256 bytes each here, are held by the checkpoint, not the hook.)
    assert crowd - few < 180 * 450
    assert few > 180 * 14_000  # the few keep their own, so the hook does count


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["resnet18", "swin_t"])  # swin_t has stochastic depth
def test_activation_checkpointing_gives_the_same_gradients_for_less_memory(backbone, precision):
    model = build(backbone=backbone, num_denoising=4, num_encoder_layers=1).train()
    images = torch.randn(2, 3, 64, 96)
    targets = [random_target(3, 1), random_target(9, 2)]
    gradients, sizes = [], []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        model.zero_grad()
        torch.manual_seed(3)
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            output = model(images, None, targets)
        sizes.append(sum(kept.values()) - sum(p.untyped_storage().nbytes() for p in model.parameters()))
        losses = Criterion(LossConfig())(output, targets)
        losses["loss"].backward()
        gradients.append([losses["loss"].detach()] + [p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-6)
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which dynamo itself looks at
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_model_has_the_same_loss_and_gradients(checkpointed):
    """Two image sizes, with and without padding, and other numbers of objects, up to several rounds."""
    config = dataclasses.replace(
        TINY,
        backbone="test_efficientnet",
        num_feature_levels=3,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_denoising=8,
    )
    torch.manual_seed(0)
    model = CrossDINO(config).train()
    model.checkpoint_activations = checkpointed
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    for height, width, counts, padded in ((96, 64, (3, 0), False), (64, 128, (11, 2), True)):
        images, targets = torch.randn(2, 3, height, width), [random_target(n, n) for n in counts]
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        mask[0, :, 40:] = padded
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = run(images, mask if padded else None, targets)
            loss = Criterion(LossConfig())(output, targets)["loss"]
            loss.backward()
            results.append([loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
        for plain, other in zip(*results, strict=True):
            torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_every_trainable_parameter_gets_a_gradient_with_and_without_objects(counts):
    model = build().train()
    targets = [Target(torch.rand(n, 4) * 0.3 + 0.2, torch.randint(3, (n,))) for n in counts]
    output = model(torch.randn(2, 3, 96, 96), None, targets)
    Criterion(LossConfig())(output, targets)["loss"].backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bf16_training_step_is_finite_and_close():
    model = build().train()
    targets = [Target(torch.rand(4, 4) * 0.3 + 0.2, torch.randint(3, (4,)))]
    images = torch.randn(1, 3, 128, 128)
    model.config = dataclasses.replace(model.config, num_denoising=0)
    with torch.no_grad():
        plain = model(images, None, targets)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images, None, targets)
    Criterion(LossConfig(beta=0.05))(low, targets)["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert low.pred_boxes.dtype == torch.float32
    # Queries may be ranked differently by rounding, so the sets are compared by their means.
    assert (low.pred_boxes.mean() - plain.pred_boxes.mean()).abs() < 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_dim": 40}, "multiple of 32"),
        ({"num_queries": 0}, "num_queries"),
        ({"class_names": ()}, "class_names"),
        ({"fusion": "add"}, "fusion"),
        ({"num_feature_levels": 2}, "num_feature_levels"),
    ],
)
def test_impossible_configurations_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        CrossDINO(dataclasses.replace(TINY, **changes))
