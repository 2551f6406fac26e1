"""What the tiles found is put together again: against plain loops, torchvision, and objects centred on every seam."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

from crossdino import suppression
from crossdino.errors import InputError
from crossdino.merging import MergeMode, merge_detections
from crossdino.suppression import Crowd, greedy_suppression, pairwise_iou, soft_suppression
from crossdino.tiling import Tile, tile_grid

MODES: tuple[MergeMode, ...] = ("seam", "nms", "soft")


def oracle(truth: Tensor, tiles: list[Tile], noise_px: float = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Every tile reports the visible part of each object; what it sees less of has the lower score."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for tile in tiles:
        boxes = truth - torch.tensor([tile.left, tile.top] * 2)
        visible = boxes.clamp(min=0).minimum(torch.tensor([tile.width, tile.height] * 2))
        sides = visible[:, 2:] - visible[:, :2]
        seen = sides.min(1).values > 2
        share = sides.prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
        visible = visible + noise_px * (2 * torch.rand(visible.shape, generator=generator) - 1)
        visible = visible.clamp(min=0).minimum(torch.tensor([tile.width, tile.height] * 2))
        parts.append((visible[seen], (0.5 + 0.4 * share)[seen], torch.zeros(int(seen.sum()), dtype=torch.int64)))
    return parts


def seams(tiles: list[Tile], hw: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Where tiles begin and end inside the image: x, y."""
    columns = {tile.left for tile in tiles} | {tile.left + tile.width for tile in tiles}
    rows = {tile.top for tile in tiles} | {tile.top + tile.height for tile in tiles}
    return sorted(columns & set(range(1, hw[1]))), sorted(rows & set(range(1, hw[0])))


def on_every_seam(tiles: list[Tile], hw: tuple[int, int], width: float, height: float) -> Tensor:
    """Objects centred on every corner of tiles and along every seam, as many as have room."""
    columns, rows = seams(tiles, hw)
    centres = list(itertools.product(columns, rows))
    centres += list(itertools.product(columns, np.arange(height / 2, hw[0], height + 5)))
    centres += list(itertools.product(np.arange(width / 2, hw[1], width + 5), rows))
    truth: list[list[float]] = []
    for x, y in centres:
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        inside = box[0] >= 0 and box[1] >= 0 and box[2] <= hw[1] and box[3] <= hw[0]
        if inside and all(
            box[0] >= one[2] or box[2] <= one[0] or box[1] >= one[3] or box[3] <= one[1] for one in truth
        ):
            truth.append(box)
    return torch.tensor(truth, dtype=torch.float32)


@pytest.mark.parametrize("overlap", [0, 16, 64])
@pytest.mark.parametrize("size", [(12, 12), (40, 26), (110, 70), (200, 200), (400, 60)])
def test_objects_on_every_seam_come_out_once(overlap: int, size: tuple[int, int]) -> None:
    hw = (256 * 2 - overlap, 256 * 4 - 3 * overlap)  # tiles that overlap by exactly so much
    tiles = tile_grid(hw, 256, overlap)
    truth = on_every_seam(tiles, hw, *size)
    assert len(tiles) == 8 and len(truth) >= 3
    boxes, scores, _ = merge_detections(oracle(truth, tiles), tiles, hw)
    assert sorted(boxes.tolist()) == sorted(truth.tolist())
    assert (scores.diff() <= 0).all()
    # A detector that is off by up to 2 px: recall 1.0, duplicates 0. (Of 12 px objects two such looks may overlap by a
    # third only, below the IoU of 0.5 at which they are one.)
    for noise_px in (1.0,) if size == (12, 12) else (1.0, 1.5, 2.0):
        boxes, _, _ = merge_detections(oracle(truth, tiles, noise_px), tiles, hw)
        assert len(boxes) == len(truth) and (box_iou(boxes, truth).amax(0) > 0.5).all()


def test_tiles_that_overlap_unevenly_or_by_more_than_half() -> None:
    for hw, size, overlap in (((300, 500), 128, 40), ((300, 400), 128, 90), ((700, 900), 256, 0)):
        tiles = tile_grid(hw, size, overlap)
        for side in (9, 30, 70, 110):
            truth = on_every_seam(tiles, hw, side, side)
            boxes, _, _ = merge_detections(oracle(truth, tiles), tiles, hw)
            assert sorted(boxes.tolist()) == sorted(truth.tolist()), (hw, size, overlap, side)


def test_neighbours_that_touch_at_a_seam_stay_two() -> None:
    hw = (256 * 2 - 32, 256 * 2 - 32)
    tiles = tile_grid(hw, 256, 32)
    columns, rows = seams(tiles, hw)
    assert columns == [224, 256]
    for side in (14.0, 24.0, 60.0):  # below and above the overlap
        truth = []
        for x in columns:
            for y in np.arange(2, hw[0] - side, side + 6):
                truth += [[x - side, y, x, y + side], [x, y, x + side, y + side]]
        pairs = torch.tensor(truth, dtype=torch.float32)
        if side >= 16:  # the pairs at the two seams would lie on each other
            pairs = pairs[: len(pairs) // 2]
        boxes, _, _ = merge_detections(oracle(pairs, tiles), tiles, hw)
        assert sorted(boxes.tolist()) == sorted(pairs.tolist())


@pytest.mark.parametrize("overlap", [0, 8, 16])
def test_what_touches_exactly_at_a_border_is_one_without_overlap_and_two_with_some(overlap: int) -> None:
    hw = (512 - overlap, 512 - overlap)
    tiles = tile_grid(hw, 256, overlap)
    for side, x in itertools.product((14.0, 24, 60, 100), seams(tiles, hw)[0]):
        truth = []
        for y in np.arange(2, hw[0] - side, side + 6):
            truth += [[x - side, y, x, y + side], [x, y, x + side, y + side]]
        # Without an overlap nothing tells the halves of one object from two objects.
        pairs = zip(truth[::2], truth[1::2], strict=True)
        expected = truth if overlap else [[*left[:2], *right[2:]] for left, right in pairs]
        boxes, _, _ = merge_detections(oracle(torch.tensor(truth), tiles), tiles, hw)
        assert sorted(boxes.tolist()) == sorted(expected), (side, x)


def test_doubles_of_one_tile_are_one_object_only_above_an_iou_of_seven_tenths() -> None:
    tile = [Tile(0, 0, 100, 100)]
    for shift, left in ((1.5, 1), (2.5, 2)):  # of 12 px: IoU 0.78 and 0.66
        boxes = torch.tensor([[20.0, 20, 32, 40], [20 + shift, 20, 32 + shift, 40]])
        part = boxes, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
        assert len(merge_detections([part], tile, (100, 100))[0]) == left
        assert len(merge_detections([part], tile, (100, 100), mode="soft")[0]) == left


def test_a_part_gives_way_only_to_a_whole_box_that_is_worth_it() -> None:
    """The left tile sees all of an object, the right one a half of it."""
    tiles, hw, zero = [Tile(0, 0, 100, 120), Tile(0, 80, 100, 120)], (100, 200), torch.tensor([0])
    whole, part = torch.tensor([[60.0, 20, 100, 50]]), torch.tensor([[0.0, 20, 20, 50]])
    for score, left in ((0.46, 1), (0.44, 2)):
        found = merge_detections([(whole, torch.tensor([score]), zero), (part, torch.tensor([0.9]), zero)], tiles, hw)
        assert len(found[0]) == left
    # Cut again by a third of the object's height: the IoU is below 0.5, but all of it is covered.
    sliver = torch.tensor([[0.0, 20, 20, 32]])
    found = merge_detections([(whole, torch.tensor([0.8]), zero), (sliver, torch.tensor([0.9]), zero)], tiles, hw)
    assert found[0].tolist() == whole.tolist()


def test_of_two_parts_that_agree_with_one_the_better_is_joined() -> None:
    tiles, hw = tile_grid((100, 200), 100, 0), (100, 200)
    left = torch.tensor([[60.0, 20, 100, 40]]), torch.tensor([0.6]), torch.tensor([0])
    right = torch.tensor([[0.0, 25, 30, 45], [0.0, 20, 40, 39]]), torch.tensor([0.9, 0.7]), torch.tensor([0, 0])
    boxes, scores, _ = merge_detections([left, right], tiles, hw)
    # The other one lies in what was joined; the score is that of the best part.
    assert boxes.tolist() == [[60, 20, 140, 40]] and scores.tolist() == pytest.approx([0.7])


def test_a_piece_that_both_tiles_see_is_no_continuation() -> None:
    tiles, hw = [Tile(0, 0, 100, 100), Tile(0, 60, 100, 100)], (100, 160)
    left = torch.tensor([[50.0, 20, 100, 40]]), torch.tensor([0.9]), torch.tensor([0])
    # The first agrees best along the seam, but ends where the left tile still sees.
    right = torch.tensor([[0.0, 20, 15, 40], [0.0, 20, 60, 39]]), torch.tensor([0.5, 0.8]), torch.tensor([0, 0])
    assert merge_detections([left, right], tiles, hw)[0].tolist() == [[50, 20, 120, 40]]


def test_a_large_part_may_end_some_pixels_before_the_seam() -> None:
    tiles, hw = tile_grid((300, 600), 300, 0), (300, 600)
    zero, score = torch.tensor([0]), torch.tensor([0.9])
    left = torch.tensor([[100.0, 50, 292, 200]]), score, zero  # 8 of 192 px
    right = torch.tensor([[0.0, 50, 200, 200]]), score, zero
    assert merge_detections([left, right], tiles, hw)[0].tolist() == [[100, 50, 500, 200]]
    far = torch.tensor([[100.0, 50, 287, 200]]), score, zero  # beyond the most, 12 px
    assert len(merge_detections([far, right], tiles, hw)[0]) == 2


def test_crowds_of_one_tile_survive() -> None:
    """Neighbours with an IoU of 0.6, each seen by two tiles: plain suppression leaves one of three."""
    hw = (200, 340)
    tiles = tile_grid(hw, 200, 60)
    truth = torch.tensor([[x, 50.0, x + 20, 90] for x in (150.0, 155, 160, 165, 170)])
    boxes, _, _ = merge_detections(oracle(truth, tiles), tiles, hw)
    assert sorted(boxes.tolist()) == truth.tolist()
    assert len(merge_detections(oracle(truth, tiles), tiles, hw, mode="nms")[0]) < 5


def test_parts_of_other_classes_and_of_two_objects_are_not_joined() -> None:
    tiles, hw = tile_grid((100, 200), 100, 0), (100, 200)
    left, right = torch.tensor([[60.0, 20, 100, 40]]), torch.tensor([[0.0, 20, 40, 40]])
    one, two = torch.tensor([0]), torch.tensor([7])
    score = torch.tensor([0.9])
    assert merge_detections([(left, score, one), (right, score, one)], tiles, hw)[0].tolist() == [[60, 20, 140, 40]]
    boxes, _, labels = merge_detections([(left, score, one), (right, score, two)], tiles, hw)
    assert len(boxes) == 2 and labels.tolist() == [0, 7]
    beside = right + torch.tensor([0.0, 12, 0, 12])  # agrees along 8 of 32 px
    assert len(merge_detections([(left, score, one), (beside, score, one)], tiles, hw)[0]) == 2
    apart = right + torch.tensor([10.0, 0, 0, 0])  # begins 10 px behind the seam
    assert len(merge_detections([(left, score, one), (apart, score, one)], tiles, hw)[0]) == 2


@pytest.mark.parametrize("mode", MODES)
def test_look_at_the_whole_image(mode: MergeMode) -> None:
    hw, zero = (512, 1024), torch.tensor([0])
    tiles = tile_grid(hw, 256, 0)
    empty = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    small = torch.tensor([[10.0, 10, 30, 30]])
    large = torch.tensor([[40.0, 40, 800, 480]])
    parts = oracle(large, tiles)
    boxes, scores, labels = parts[0]
    parts[0] = torch.cat((boxes, small)), torch.cat((scores, torch.tensor([0.4]))), torch.cat((labels, zero))
    full = (
        torch.cat((large + 3, small + 8, small + 1, torch.tensor([[100.0, 100, 120, 120]]))),
        torch.tensor([0.95, 0.9, 0.9, 0.8]),
        torch.zeros(4, dtype=torch.int64),
    )
    boxes, scores, _ = merge_detections(parts, tiles, hw, 0.5, mode, full)
    assert boxes[0].tolist() == (large + 3)[0].tolist() and scores[0] == pytest.approx(0.95)
    if mode == "seam":  # the parts are replaced, the small one is the tile's
        assert boxes[1:].tolist() == small.tolist()
    # What a tile holds is the tile's to say, also where it says nothing.
    assert len(merge_detections([empty] * 8, tiles, hw, 0.5, mode, full)[0]) == 1


def test_what_the_reduced_image_shows_of_a_small_object_gives_way_to_the_joined_parts() -> None:
    hw = (256, 512)
    tiles = tile_grid(hw, 256, 0)
    small = torch.tensor([[226.0, 50, 286, 110]])
    full = small + torch.tensor([-4.0, -4, 4, 4]), torch.tensor([0.6]), torch.tensor([0])
    assert merge_detections(oracle(small, tiles), tiles, hw, full=full)[0].tolist() == small.tolist()


def random_boxes(rng: np.random.Generator, count: int, spread: float, mixed: bool) -> np.ndarray:
    corners = rng.uniform(0, spread, (count, 2))
    sides = np.exp(rng.uniform(0, np.log(300), (count, 2))) if mixed else rng.uniform(5, 25, (count, 2))
    sides[::17] = 0
    return np.concatenate((corners, corners + sides), axis=1).astype(np.float32)


def iou_of(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.nan_to_num(pairwise_iou(one[None], two[None])[0]))


@pytest.mark.parametrize("max_pairs", [40, 10**6])  # in pieces, and all at once
@pytest.mark.parametrize("spread", [3, 60])
def test_suppression_equals_the_plain_loops(monkeypatch: pytest.MonkeyPatch, max_pairs: int, spread: float) -> None:
    monkeypatch.setattr(suppression, "_MAX_PAIRS", max_pairs)
    rng = np.random.default_rng(0)
    for trial, iou in enumerate((0.1, 0.5, 0.65)):
        boxes = random_boxes(rng, 60, spread, mixed=trial % 2 == 0)
        labels, views = rng.integers(0, 2, 60), rng.integers(0, 3, 60)
        scores = np.sort(rng.random(60))[::-1].astype(np.float32)

        def harm(one: int, two: int) -> float:
            if labels[one] != labels[two] or views[one] == views[two]:  # noqa: B023
                return 0.0
            value = iou_of(boxes[one], boxes[two])  # noqa: B023
            return value if value > iou else 0.0  # noqa: B023

        crowd = Crowd(boxes, labels, np.arange(60), labels, views)
        kept: list[int] = []
        for box in range(60):
            if not any(harm(box, other) for other in kept):
                kept.append(box)
        assert greedy_suppression(crowd, iou).tolist() == kept

        now, expected, left = scores.astype(float), np.full(60, -1.0), set(range(60))
        while left:
            best = min(left, key=lambda box: (-now[box], box))  # noqa: B023
            left.remove(best)
            if now[best] >= 0.01 * scores[best]:
                expected[best] = now[best]
                for other in left:
                    now[other] *= np.exp(-(harm(best, other) ** 2) / 0.5)
        # Products of the same factors in another order.
        np.testing.assert_allclose(soft_suppression(crowd, scores, 0.5, iou, 0.01), expected, rtol=1e-9)


@pytest.mark.parametrize("iou", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_nms_is_that_of_torchvision(iou: float) -> None:
    rng = np.random.default_rng(1)
    for spread in (30, 1500):
        boxes = torch.from_numpy(random_boxes(rng, 1500, spread, mixed=True))
        # Many equal scores: the one given first comes first.
        scores, labels = torch.from_numpy(rng.integers(1, 20, 1500) / 20).float(), torch.arange(1500) % 3
        kept = torch.cat(
            [(labels == k).nonzero()[:, 0][nms(boxes[labels == k], scores[labels == k], iou)] for k in (0, 1, 2)]
        )
        kept = kept.sort().values
        kept = kept[scores[kept].sort(descending=True, stable=True).indices]
        found = merge_detections([(boxes, scores, labels)], [Tile(0, 0, 4000, 4000)], (4000, 4000), iou, "nms")
        for one, two in zip(found, (boxes[kept], scores[kept], labels[kept]), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("mode", MODES)
def test_degenerate_input(mode: MergeMode) -> None:
    empty = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    tiles = tile_grid((50, 90), 50, 10)
    assert [len(x) for x in merge_detections([empty, empty], tiles, (50, 90), 0.5, mode)] == [0, 0, 0]
    assert [len(x) for x in merge_detections([], [], (50, 90), 0.5, mode)] == [0, 0, 0]
    assert [len(x) for x in merge_detections([empty, empty], tiles, (50, 90), 0.5, mode, empty)] == [0, 0, 0]
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor(
        [
            [30.0, 10, 60, 20],
            [5, 5, 5, 9],
            [45, 10, 60, 20],
            [nan, 0, 9, 9],
            [0, 0, inf, 9],
            [0, 0, 9, 9],
            [20, 20, 10, 10],
        ]
    )
    scores = torch.tensor([0.5, 0.4, 0.9, 0.8, 0.8, nan, 0.1])
    found = merge_detections(
        [(boxes, scores, torch.ones(7, dtype=torch.int64))], [Tile(0, 0, 64, 64)], (50, 40), 0.5, mode
    )
    # Clipped to the image; outside it and without a place or score: gone.
    assert found[0].tolist() == [[30, 10, 40, 20], [5, 5, 5, 9], [20, 20, 10, 10]]
    for wrong in ({"iou": 0.0}, {"iou": 1.5}, {"iou": nan}, {"mode": "wbf"}):
        with pytest.raises(InputError, match="merge"):
            merge_detections([empty], [Tile(0, 0, 64, 64)], (50, 40), **wrong)  # type: ignore[arg-type]


def test_far_from_the_origin_and_the_order_of_equal_scores() -> None:
    tiles = [Tile(99_000, 99_000, 640, 640), Tile(99_000, 99_576, 640, 640)]
    hw = (100_000, 100_500)
    truth = torch.tensor([[99_560.25, 99_100.5, 99_680.75, 99_140.0], [99_600.0, 99_300, 99_606, 99_306]])
    boxes, scores, _ = merge_detections(oracle(truth, tiles), tiles, hw)
    assert sorted(boxes.tolist()) == truth.tolist()  # these places are exact in float32
    many = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * 300
    many[:, 2:] = many[:, :2] + 20
    same = (many, torch.full((200,), 0.5), torch.zeros(200, dtype=torch.int64))
    first = [merge_detections([same, same], tiles, hw, 0.5, mode) for mode in MODES]
    again = [merge_detections([same, same], tiles, hw, 0.5, mode) for mode in MODES]
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
