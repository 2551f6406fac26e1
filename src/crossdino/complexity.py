"""What a model costs: parameters, multiply-adds and feature map sizes (the columns of Table I).

Counted on torch's meta device: nothing is computed and no memory is used. The paper's "GFLOPs" are multiply-adds, as
in most detection papers; torch's counter reports two operations for each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from crossdino.config import ModelConfig
from crossdino.models.detector import CrossDINO


@dataclass(frozen=True)
class Complexity:
    """The cost of detecting in one image.

    Attributes:
        num_parameters: all parameters and none of the buffers.
        num_trainable: those that training changes.
        num_multiply_adds: of matrix products, convolutions and deformable sampling.
        feature_hw: height and width of the feature maps, finest first.
    """

    num_parameters: int
    num_trainable: int
    num_multiply_adds: int
    feature_hw: list[tuple[int, int]]


def measure(config: ModelConfig, image_hw: tuple[int, int] = (800, 1333)) -> Complexity:
    """Count the cost of a model for one image.

    Args:
        config: the model; its weights are not read.
        image_hw: height and width of the image in pixels, after resizing.
    """
    with torch.device("meta"):
        model = CrossDINO(dataclasses.replace(config, backbone_weights=None)).eval()
        image = torch.empty(1, 3, *image_hw)
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    model.requires_grad_(False)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(image)
        feature_hw = model.features(image).spatial_shapes
    return Complexity(
        sum(parameter.numel() for parameter in parameters), trainable, counter.get_total_flops() // 2, feature_hw
    )
