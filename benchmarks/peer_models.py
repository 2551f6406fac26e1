"""Other detectors with random weights: what the workers of `benchmarks/peers.py` run in the peers' environment.

Nothing of crossdino is imported here: the peers' environment does not have it. Every network is built from its
configuration, so that nothing is downloaded; the Hugging Face hub is switched off to make sure of it.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NUM_CLASSES = 80

PEERS: dict[str, tuple[str, tuple[int, int]]] = {
    "deformable_detr": ("transformers Deformable-DETR R50", (1, 1)),
    "rt_detr_v2": ("transformers RT-DETRv2 R50", (32, 32)),
    "d_fine": ("transformers D-FINE-L", (32, 32)),
    "rf_detr": ("rfdetr base", (56, 56)),
    "faster_rcnn": ("torchvision Faster R-CNN R50-FPN", (1, 1)),
}
"""Name -> what it is, and the height and width of which its input must be a multiple."""


def nearest_hw(model: str, hw: tuple[int, int]) -> tuple[int, int]:
    """The size nearest to the wanted one that a network takes.

    Args:
        model: a key of `PEERS`.
        hw: height and width in pixels.
    """
    height, width = (max(1, int(side / step + 0.5)) * step for side, step in zip(hw, PEERS[model][1], strict=True))
    return height, width


def build(model: str, hw: tuple[int, int]) -> tuple[nn.Module, Callable[[Tensor], Any]]:
    """A network with random weights in evaluation mode, and what is called on normalised images (N, 3, H, W).

    Args:
        model: a key of `PEERS`.
        hw: height and width of the images in pixels.
    """
    torch.manual_seed(0)
    if model == "faster_rcnn":
        return _faster_rcnn(hw)
    if model == "rf_detr":
        return _rf_detr()
    import transformers  # pyright: ignore[reportMissingImports]

    network: Any
    if model == "deformable_detr":
        # As wide and with as many queries as DINO-4scale, so that the two can be compared as they are.
        config = transformers.DeformableDetrConfig(
            two_stage=True,
            with_box_refine=True,
            two_stage_num_proposals=900,
            num_queries=900,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
            num_labels=NUM_CLASSES,
            auxiliary_loss=True,
        )
        network = transformers.DeformableDetrForObjectDetection(config)
    elif model == "rt_detr_v2":
        network = transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(num_labels=NUM_CLASSES))
    elif model == "d_fine":
        # The rest of the large variant is the configuration's default.
        config = transformers.DFineConfig(num_labels=NUM_CLASSES, decoder_n_points=[3, 6, 3])
        network = transformers.DFineForObjectDetection(config)
    else:
        raise ValueError(f"no peer {model!r}: choose one of {', '.join(PEERS)}")
    network.eval()
    return network, lambda images: network(pixel_values=images)


def forward(model: str, height: int, width: int, precision: str = "fp32") -> Callable[[], dict[str, float]]:
    """One image through a network.

    Args:
        model: a key of `PEERS`.
        height: of the image in pixels.
        width: likewise.
        precision: `fp32`, or `bf16` for autocast.

    Returns:
        A repetition, which gives the billions of multiply-adds and the millions of parameters.
    """
    warnings.simplefilter("ignore")
    network, call = build(model, (height, width))
    network.requires_grad_(False)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    facts = {"million parameters": _million_parameters(network)}

    def repetition() -> dict[str, float]:
        if "gmac" not in facts:  # not while it is built, or the memory that this takes would be missed
            with torch.no_grad():
                facts["gmac"] = count_gmac(lambda: call(image))
        with torch.inference_mode():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                call(image)
            return {"seconds": time.perf_counter() - start, **facts}

    return repetition


def training_step(
    model: str, side: int = 512, batch_size: int = 2, num_objects: int = 20
) -> Callable[[], dict[str, float]]:
    """Forward, loss, backward and one AdamW step of transformers' Deformable-DETR.

    Args:
        model: `deformable_detr`.
        side: height and width of the images in pixels.
        batch_size: images.
        num_objects: in each image.
    """
    warnings.simplefilter("ignore")
    network: Any
    network, _ = build(model, (side, side))
    network.train()
    # The official training freezes the normalisation of the backbone.
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, side, side, generator=generator)
    labels = []
    for _ in range(batch_size):
        centres = torch.rand(num_objects, 2, generator=generator) * 0.9 + 0.05
        sizes = torch.rand(num_objects, 2, generator=generator) * 0.04 + 0.01
        classes = torch.randint(NUM_CLASSES, (num_objects,), generator=generator)
        labels.append({"boxes": torch.cat((centres, sizes), dim=1), "class_labels": classes})
    facts = {"million parameters": _million_parameters(network)}

    def repetition() -> dict[str, float]:
        network(pixel_values=images, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return facts

    return repetition


def count_gmac(call: Callable[[], Any]) -> float:
    """Billions of multiply-adds of a call, as torch's own counter sees them (it reports two operations for each).

    Matrix products, convolutions and attention are counted; samples, norms and activations are not, for anybody.

    Args:
        call: runs the network once, in float32, with parameters that need no gradient.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def _million_parameters(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def _faster_rcnn(hw: tuple[int, int]) -> tuple[nn.Module, Callable[[Tensor], Any]]:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    network = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=NUM_CLASSES + 1, min_size=min(hw), max_size=max(hw)
    ).eval()
    return network, lambda images: network(list(images))


def _rf_detr() -> tuple[nn.Module, Callable[[Tensor], Any]]:
    # It reports its own version of every setting; on standard output, which is not ours to fill.
    with contextlib.redirect_stdout(None):
        from rfdetr.config import RFDETRBaseConfig  # pyright: ignore[reportMissingImports]
        from rfdetr.models.lwdetr import build_model_from_config  # pyright: ignore[reportMissingImports]

        # A name of weights keeps the builder from fetching those of the backbone; who would load them is not called.
        network = build_model_from_config(RFDETRBaseConfig(pretrain_weights="none", device="cpu", num_classes=80))
    return network.eval(), network
