"""GIoU against torchvision on ordinary boxes, and exact values where torchvision's epsilon matters."""

import torch
from torchvision.ops import box_convert, generalized_box_iou

from crossdino.losses.giou import generalized_iou


def test_pairs_equal_torchvision():
    torch.manual_seed(0)
    a, b = torch.rand(2, 12, 4) * 0.5 + 0.05
    expected = generalized_box_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), expected, atol=1e-6, rtol=1e-5)


def test_two_pixel_boxes_are_exact():
    side = 2 / 1024
    a = torch.tensor([[0.5, 0.5, side, side]])
    half_shifted = a + torch.tensor([[side / 2, 0, 0, 0]])
    # Overlap 1/2, union 3/2: IoU 1/3; the hull equals the union, so GIoU is 1/3 as well.
    torch.testing.assert_close(generalized_iou(a, half_shifted), torch.tensor([1 / 3]), atol=1e-4, rtol=0)
    torch.testing.assert_close(generalized_iou(a, a), torch.ones(1), atol=1e-4, rtol=0)


def test_far_apart_and_without_size():
    a = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.3, 0.0, 0.0]], requires_grad=True)
    b = torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.3, 0.3, 0.0, 0.0]])
    value = generalized_iou(a, b)
    # Hull 0.9 x 0.1, union 0.02: GIoU = -(0.09 - 0.02) / 0.09.
    torch.testing.assert_close(value, torch.tensor([-0.07 / 0.09, 0.0]), atol=1e-6, rtol=0)
    value.sum().backward()
    assert torch.isfinite(a.grad).all()
