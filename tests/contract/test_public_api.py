"""The names that other people's code is built on: they exist, say what they do, and keep their parameters."""

import inspect

import pytest

import crossdino
from crossdino.models import backbones

WORKING = ("num_processes", "on_progress")
MEASURED = ("ground_truth", "predictions", "names", "protocol", "patches", "max_detections", "size_bands")


@pytest.mark.parametrize("name", crossdino.__all__)
def test_public_names_exist_and_are_documented(name):
    assert inspect.getdoc(getattr(crossdino, name))


@pytest.mark.parametrize(
    ("call", "parameters"),
    [
        (crossdino.CrossDINO.forward, ["self", "images", "padding_mask", "targets"]),
        (crossdino.CrossDINO.from_pretrained, ["source", "device"]),
        (crossdino.CrossDINO.from_dino, ["path", "options"]),
        (crossdino.Predictor.__call__, ["self", "image"]),
        (crossdino.train, ["config", "resume", "overwrite", "init_weights", "recipe"]),
        (crossdino.prepare_benchmark, [*("name", "source", "output"), *("options", "splits", "images"), *WORKING]),
        (crossdino.compare_detections, [*MEASURED, *("num_resamples", "confidence", "seed"), *WORKING]),
        (crossdino.evaluate_protocol, ["name", "ground_truth", "predictions", "patches"]),
        (backbones.StripMLPClassifier.from_official, ["path"]),
        (backbones.StripMLPBackbone.from_official, ["path"]),
    ],
)
def test_signatures(call, parameters):
    assert list(inspect.signature(call).parameters) == parameters


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = crossdino.no_such_name
