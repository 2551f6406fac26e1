"""Official DINO checkpoints: the same numbers as the plain reference, every key accounted for, bad files refused."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch
from torch.nn import functional as F

from crossdino.adaptation import change_classes, change_num_queries
from crossdino.benchmarks import COCO_91_SLOTS
from crossdino.checkpoints import load_model
from crossdino.errors import InputError
from crossdino.models.detector import CrossDINO
from crossdino.official_weights import convert_weights, load_dino
from tests.reference import dino_plain as plain


def padded_batch():
    """Two images of different sizes in one batch of 70 x 90; smooth, because noise makes tiny maps ill-conditioned."""
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.randn(2, 3, 4, 5, generator=generator) * 2, size=(70, 90), mode="bilinear")
    images += 0.2 * torch.randn(images.shape, generator=generator)
    mask = torch.zeros(2, 70, 90, dtype=torch.bool)
    mask[0, 50:] = True
    mask[0, :, 80:] = True
    mask[1, :, 61:] = True
    return images * ~mask[:, None], mask


@pytest.fixture(scope="module")
def state():
    return plain.random_dino("resnet50", 4, dim=64, layers=(1, 2), queries=12, seed=0)


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "dino.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def official_output(state):
    logits, boxes, _ = plain.dino(state, *padded_batch())
    return logits, boxes


@torch.no_grad()
def detect(model):
    output = model(*padded_batch())
    return output.pred_logits, output.pred_boxes


@pytest.mark.parametrize(
    ("backbone", "scales", "points"), [("resnet50", 4, 2), ("resnet101", 5, 1), ("swin_t", 4, 2), ("swin_t", 5, 1)]
)
def test_logits_and_boxes_equal_the_official_model_on_padded_batches(backbone, scales, points, tmp_path):
    state = plain.random_dino(backbone, scales, dim=64, points=points, layers=(1, 2), queries=12, seed=0)
    torch.save({"model": state}, tmp_path / "dino.pth")
    model, _ = load_dino(tmp_path / "dino.pth")
    logits, boxes, scores = plain.dino(state, *padded_batch())
    for one in scores:
        # The queries' order is that of the scores: it must not hang on float32's rounding (about 1e-5 here).
        assert one.unique().flip(0)[:13].diff().abs().min() > 3e-5
    found_logits, found_boxes = detect(model)
    assert logits.std() > 0.5 and boxes.std() > 0.1
    # float32 against float64 through random weights; in float64 the two agree to 1e-5.
    torch.testing.assert_close(found_logits.double(), logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found_boxes.double(), boxes, atol=1e-4, rtol=0)


def test_everything_in_the_file_is_accounted_for(state, tmp_path):
    arguments = argparse.Namespace(nheads=8, num_select=123, dn_number=50, dn_box_noise_scale=1.0, pre_norm=False)
    worse = {key: value + 1 for key, value in state.items()}
    worse |= {key: value for key, value in state.items() if "running_var" in key}
    content = {
        "model": {f"module.{key}": value for key, value in state.items()},
        "ema_model": worse,
        "optimizer": {"state": {0: {"step": 3}}},
        "epoch": 11,
        "args": arguments,
    }
    torch.save(content, tmp_path / "full.pth")
    model, report = load_dino(tmp_path / "full.pth")
    repeated = [key for key in state if plain_head(key)]
    assert sorted(report.used) == sorted(set(state) - set(repeated))
    assert report.new == [] and report.reinitialised == []
    assert report.left == [
        "optimizer (of the training)",
        "epoch (of the training)",
        "ema_model (averaged weights; ema takes them instead)",
        f"{len(repeated)} tensors that repeat the heads which all decoder layers share",
    ]
    assert report.lines()[0] == f"used: {len(report.used)} tensors of the checkpoint"
    assert model.inference.num_select == 123
    assert (model.config.num_denoising, model.config.box_noise_scale, model.config.num_points) == (50, 1.0, 2)
    assert model.config.class_names == COCO_91_SLOTS and not model.training
    torch.testing.assert_close(model.class_embed.bias, state["class_embed.0.bias"], atol=0, rtol=0)
    averaged, report = load_dino(tmp_path / "full.pth", ema=True)
    torch.testing.assert_close(averaged.class_embed.bias, state["class_embed.0.bias"] + 1, atol=0, rtol=0)
    assert "model (the averaged weights were asked for)" in report.left


def plain_head(key):
    """Whether a key repeats `class_embed.0.*` or `bbox_embed.0.*`."""
    return "_embed." in key and key.startswith(("class_embed.1", "bbox_embed.1", "transformer.decoder."))


def test_weights_alone_and_a_larger_label_embedding(state, tmp_path):
    state = state | {
        "label_enc.weight": torch.arange(96.0)[:, None].expand(96, 64).clone(),
        "backbone.0.body.bn1.num_batches_tracked": torch.tensor(5),
    }
    torch.save(state, tmp_path / "bare.pth")
    model, report = load_dino(tmp_path / "bare.pth")
    assert model.label_enc.weight[:, 0].tolist() == [*range(91), 95]
    assert report.left[0] == "4 rows of label_enc beyond the 91 classes"
    assert report.left[-1] == "1 buffers that are computed"


def test_convert_weights_writes_a_folder_that_gives_the_same(checkpoint, official_output, tmp_path):
    report = convert_weights(checkpoint, tmp_path / "folder")
    assert report.used
    logits, boxes = detect(load_model(tmp_path / "folder"))
    torch.testing.assert_close(logits.double(), official_output[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes.double(), official_output[1], atol=1e-4, rtol=0)


# ---- becoming a Cross-DINO ----


@pytest.mark.parametrize("fusion", ["cctm", "once", "mlp"])
def test_a_cross_dino_begins_where_the_dino_was(fusion, checkpoint, official_output):
    torch.manual_seed(0)
    model, report = load_dino(checkpoint, fusion=fusion, fusion_hidden_dim=128)
    assert report.new == [key for key in model.state_dict() if key.startswith("fusion.")] and report.new
    assert any("new" in line for line in report.lines())
    logits, boxes = detect(model)
    if fusion == "mlp":  # exact but for rounding
        torch.testing.assert_close(logits.double(), official_output[0], atol=2e-4, rtol=0)

    # A query may change places with its neighbour in score, so each detection is compared with the nearest one.
    def typical(found_logits, found_boxes):
        found = torch.cat((found_logits.double().sigmoid(), found_boxes.double()), dim=-1)
        official = torch.cat((official_output[0].sigmoid(), official_output[1]), dim=-1)
        distances = (official[:, :, None] - found[:, None]).abs().amax(-1)
        return float(distances.amin(-1).median())

    torch.manual_seed(0)
    random, _ = load_dino(checkpoint, fusion=fusion, fusion_hidden_dim=128, fusion_init="default")
    assert typical(logits, boxes) < 0.01 < 0.15 < typical(*detect(random))


def test_saturated_gates_still_learn(checkpoint):
    torch.manual_seed(0)
    model, _ = load_dino(checkpoint, fusion="cctm", fusion_hidden_dim=128)
    output = model(*padded_batch())
    (output.pred_logits.square().mean() + output.pred_boxes.square().mean()).backward()
    for name, parameter in model.fusion.named_parameters():
        # GRN's gamma and beta begin at zero, and still have a slope; Adam's epsilon is 1e-8.
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


def test_identity_needs_room_in_the_mlp(checkpoint):
    with pytest.raises(InputError, match="fusion_hidden_dim of at least 128, not 100"):
        load_dino(checkpoint, fusion="mlp", fusion_hidden_dim=100)


# ---- other classes, other numbers of queries ----


def test_classes_map_by_name_and_on_request(checkpoint, official_output):
    torch.manual_seed(0)
    names = ("Traffic-Light", "pedestrian", "awning tricycle")
    model, report = load_dino(checkpoint, class_names=names, class_map={"pedestrian": "person"})
    assert report.reinitialised == [
        "classes kept, 2 of 3: Traffic-Light (from traffic light), pedestrian (from person)",
        "classes re-initialised, 1 of 3: awning tricycle",
    ]
    assert model.config.class_names == names
    logits, _ = detect(model)
    assert logits.shape == (2, 12, 3)
    embedding = torch.load(checkpoint)["model"]["label_enc.weight"]
    assert torch.equal(model.label_enc.weight[[0, 1, 3]], embedding[[10, 1, 91]])
    for head, official in (
        (model.class_embed, "class_embed.0"),
        (model.enc_class_embed, "transformer.enc_out_class_embed"),
    ):
        weights = torch.load(checkpoint)["model"]
        assert torch.equal(head.weight[:2], weights[f"{official}.weight"][[10, 1]])
        assert head.bias[2].sigmoid().item() == pytest.approx(0.01)
    model.train()  # the denoising queries draw from the new label embedding


def test_a_fine_tuned_file_takes_names_in_order(tmp_path):
    state = plain.random_dino("resnet50", 4, dim=32, layers=(1, 1), classes=2, queries=4)
    torch.save({"model": state}, tmp_path / "two.pth")
    model, report = load_dino(tmp_path / "two.pth", class_names=["cat", "dog"])
    assert model.config.class_names == ("cat", "dog") and report.reinitialised == []
    assert load_dino(tmp_path / "two.pth")[0].config.class_names == ("class 0", "class 1")
    model, report = load_dino(tmp_path / "two.pth", class_names=["cat"], num_queries=7)
    assert report.reinitialised == [
        "classes re-initialised, 1 of 1: cat",
        "queries raised from 4 to 7: the new ones begin as copies of the last",
    ]
    contents = state["transformer.tgt_embed.weight"]
    assert torch.equal(model.tgt_embed.weight, contents[[0, 1, 2, 3, 1, 2, 3]])
    assert model.label_enc.weight.shape == (2, 32)


@pytest.fixture
def small_model(tiny_config):
    torch.manual_seed(0)
    return CrossDINO(tiny_config.model).eval()


@pytest.mark.parametrize(
    ("class_names", "class_map", "message"),
    [
        ((), None, "at least one class"),
        (("a",), {"b": "object"}, "class_map: 'b' is none of the new classes"),
        (("a",), {"a": "objekt"}, "class_map: 'objekt' is no class of the model; did you mean 'object'?"),
    ],
)
def test_impossible_class_changes(small_model, class_names, class_map, message):
    with pytest.raises(InputError) as error:
        change_classes(small_model, class_names, class_map)
    assert message in str(error.value)


def test_queries_up_and_down(small_model):
    contents = small_model.tgt_embed.weight.clone()
    assert change_num_queries(small_model, 20) == []
    assert change_num_queries(small_model, 12) == ["queries cut from 20 to the first 12"]
    assert torch.equal(small_model.tgt_embed.weight, contents[:12])
    change_num_queries(small_model, 30)
    assert torch.equal(small_model.tgt_embed.weight, contents[[*range(12), *range(12), *range(6, 12)]])
    assert small_model(torch.randn(1, 3, 64, 96)).pred_boxes.shape == (1, 30, 4)
    with pytest.raises(InputError, match="at least 1"):
        change_num_queries(small_model, 0)


# ---- files that cannot be used ----


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_is_not_run(tmp_path, capsys):
    torch.save({"model": {"a": torch.zeros(1)}, "args": Harmful()}, tmp_path / "code.pth")
    # (A print of its own where another test has imported Ray.)
    with pytest.raises(InputError, match=r"code\.pth holds code besides weights \([\w.]*print\), which is not run: "):
        load_dino(tmp_path / "code.pth")
    assert "this must not run" not in capsys.readouterr().out


def test_broken_files(checkpoint, tmp_path):
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:100_000])
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"model": 1}))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    for name, message in {
        "cut.pth": "not a readable PyTorch checkpoint",
        "text.pth": "not a readable PyTorch checkpoint",
        "empty.pth": "not a readable PyTorch checkpoint",
        "pickle.pth": "not a readable PyTorch checkpoint",
        "tensor.pth": "it holds a Tensor instead of a dict",
        "other.pth": "it has no weights under 'model', only state_dict",
        "absent.pth": "is no file",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_dino(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no averaged weights"):
        load_dino(checkpoint, ema=True)


def changed(**changes):
    """The state's names with small tensors, some names dropped (None) or added: enough to be refused."""

    def change(state):
        state = dict(state)
        for key, value in changes.items():
            name = key.replace("__", ".")
            for match in [one for one in state if one.startswith(name)]:
                del state[match]
            if value is not None:
                state[name] = value
        return state

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"fc.weight": torch.zeros(3), "conv1.weight": torch.zeros(3)}, "its keys begin with conv1.weight"),
        (lambda s: {"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.zeros(3)}, "it is a DETR"),
        (changed(transformer__enc_output=None), "Deformable DETR without two stages"),
        (changed(transformer__enc_out_class_embed=None), "two-stage Deformable DETR"),
        (changed(bbox_head__x=torch.zeros(1)), "mmdetection"),
        (changed(transformer__tgt_embed=None), "no learnt contents"),
        (changed(input_proj=None), "incomplete"),
        (changed(transformer__two_stage_wh_embedding__weight=torch.zeros(1, 2)), "two_stage_wh_embedding"),
        (changed(segmentation__weight=torch.zeros(1)), "holds what no DINO that we know has: segmentation.weight"),
        (changed(transformer__decoder__norm__bias=None), "decoder.norm.bias is missing"),
        (changed(backbone__0__body__layer3__5=None), "ResNet with 3-4-5-3 blocks"),
        (changed(backbone=None, backbone__0__downsample_layers__0__weight=torch.zeros(1)), "ConvNeXt"),
        (changed(label_enc__weight=torch.zeros(90, 64)), "label_enc has 90 rows for 91 classes"),
        (changed(class_embed__1__bias=torch.ones(91)), "class_embed.1.bias differs from class_embed.0.bias"),
        (changed(transformer__decoder__bbox_embed__1__layers__2__bias=torch.ones(4)), "has a head of its own"),
    ],
)
def test_other_architectures_are_refused_by_name(change, message, state, tmp_path):
    # Not the full backbone: the file is written in no time, and nothing but names and heads is looked at before.
    light = {key: torch.zeros(1) if key.startswith("backbone") else value for key, value in state.items()}
    path = tmp_path / "other.pth"
    torch.save({"model": change(light)}, path)
    with pytest.raises(InputError) as error:
        load_dino(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_arguments_that_tensors_do_not_show(state, tmp_path):
    path = tmp_path / "gelu.pth"
    torch.save({"model": state, "args": argparse.Namespace(transformer_activation="gelu")}, path)
    with pytest.raises(InputError, match="transformer_activation = 'gelu', and we have only 'relu'"):
        load_dino(path)


def test_class_map_alone(checkpoint):
    with pytest.raises(InputError, match="give class_names too"):
        load_dino(checkpoint, class_map={"pedestrian": "person"})
