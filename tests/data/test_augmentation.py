"""The recipe: its draws against fixed numbers, boxes against masks that are moved by the same draws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from crossdino.config import DataConfig
from crossdino.data import augmentation
from crossdino.data.augmentation import augment, copy_paste, mosaic, random_crop
from crossdino.data.transforms import Sample

GREY = [124, 116, 104]
FIXED = DataConfig(
    train_short_sides=(32,),
    train_long_side=64,
    crop_short_sides=(),
    horizontal_flip=0.0,
    vertical_flip=0.0,
    quarter_turns=False,
)


def blank(hw: tuple[int, int], boxes: list[tuple[float, ...]] = (), labels: list[int] | None = None) -> Sample:
    """A black image with boxes."""
    box_tensor = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return Sample(
        torch.zeros(3, *hw, dtype=torch.uint8), box_tensor, torch.tensor(labels or list(range(len(boxes)))).long()
    )


def outcomes(config: DataConfig, count: int = 300) -> list[Sample]:
    sample = blank((16, 20), [(0, 0, 3, 5)])
    return [augment(sample, config, np.random.default_rng(seed)) for seed in range(count)]


# --- the plain recipe ---


# Sizes, labels, sums of every box's corners, mean grey and the draw after the last one, as they were before mosaic and
# copy-paste came: runs of then must be repeatable.
BEFORE = {
    ("base", 0): ((53, 79), [0, 1, 2, 3], [18.2708, 143.9111, 132.0, 243.75], 83.84, 0.300166),
    ("base", 1): ((53, 79), [0, 1, 2, 3], [18.2708, 143.9111, 132.0, 243.75], 83.84, 0.784214),
    ("base", 2): ((40, 41), [1, 2], [93.3933, 81.0], 88.68, 0.554494),
    ("base", 3): ((48, 72), [0, 1, 2, 3], [16.6, 130.8, 120.0, 221.6], 83.84, 0.216693),
    ("full", 0): ((79, 53), [0, 1, 2, 3], [18.2708, 143.9111, 132.0, 243.75], 73.42, 0.821228),
    ("full", 1): ((79, 53), [0, 1, 2, 3], [157.8375, 139.5222, 132.0, 106.8167], 96.6, 0.726707),
    ("full", 2): ((40, 41), [1, 2], [68.6067, 81.0], 67.67, 0.627849),
    ("full", 3): ((72, 48), [0, 1, 2, 3], [16.6, 130.8, 120.0, 221.6], 67.94, 0.139985),
}


@pytest.mark.parametrize(("name", "seed"), list(BEFORE))
def test_the_plain_recipe_draws_as_ever(name: str, seed: int) -> None:
    y, x = np.mgrid[0:60, 0:90]
    image = torch.from_numpy(np.stack([x * 2, y * 3, x + y]).astype(np.uint8))
    boxes = [[1.5, 2.25, 9, 8], [40, 30, 52.5, 41], [0, 0, 90, 60], [80, 50, 88, 59]]
    config = DataConfig(
        train_short_sides=(40, 48, 56), train_long_side=80, crop_short_sides=(30, 36), crop_range=(20, 30)
    )
    if name == "full":
        config = dataclasses.replace(config, vertical_flip=0.5, quarter_turns=True, color_jitter=0.3)
    generator = np.random.default_rng((7, 0, seed))
    sample = Sample(image, torch.tensor(boxes, dtype=torch.float64), torch.arange(4))
    out = augment(sample, config, generator, draw_other=lambda _: pytest.fail("another image was drawn"))
    hw, labels, sums, mean, following = BEFORE[name, seed]
    assert out.hw == hw and out.labels.tolist() == labels
    np.testing.assert_allclose(out.boxes_xyxy.sum(1).numpy(), sums, atol=1e-4)  # four digits were written down
    assert abs(out.image.double().mean().item() - mean) < 0.1  # resizing may round a grey level elsewhere by machine
    assert round(generator.random(), 6) == following


def test_random_crop_covers_its_range() -> None:
    sample = blank((50, 40))
    generator = np.random.default_rng(0)
    sizes = {random_crop(sample, (20, 22), generator).hw for _ in range(200)}
    assert sizes == {(height, width) for height in (20, 21, 22) for width in (20, 21, 22)}
    assert {random_crop(sample, (60, 70), generator).hw for _ in range(5)} == {(50, 40)}  # image smaller than the crop
    assert {random_crop(sample, (40, 45), generator).hw[1] for _ in range(50)} == {40}


def test_augment_without_options_only_resizes() -> None:
    for sample in outcomes(FIXED, 5):
        assert sample.hw == (32, 40) and sample.boxes_xyxy.tolist() == [[0, 0, 6, 10]]


def test_augment_probabilities() -> None:
    """Each option changes what it should, as often as it should; 300 draws at p = 0.3 have a deviation of 8."""
    corner = [0, 0, 6, 10]
    flips = outcomes(dataclasses.replace(FIXED, horizontal_flip=0.3))
    assert {tuple(sample.boxes_xyxy[0].tolist()) for sample in flips} == {(0, 0, 6, 10), (34, 0, 40, 10)}
    assert 60 < sum(sample.boxes_xyxy[0].tolist() != corner for sample in flips) < 120
    flips = outcomes(dataclasses.replace(FIXED, vertical_flip=0.3))
    assert {tuple(sample.boxes_xyxy[0].tolist()) for sample in flips} == {(0, 0, 6, 10), (0, 22, 6, 32)}
    assert 60 < sum(sample.boxes_xyxy[0].tolist() != corner for sample in flips) < 120
    turns = outcomes(dataclasses.replace(FIXED, quarter_turns=True))
    corners = [tuple(sample.boxes_xyxy[0].tolist()) for sample in turns]
    assert set(corners) == {(0, 0, 6, 10), (0, 34, 10, 40), (34, 22, 40, 32), (22, 0, 32, 6)}
    assert all(45 < corners.count(value) < 105 for value in set(corners))  # 75 expected, deviation 7.5
    sides = outcomes(dataclasses.replace(FIXED, train_short_sides=(16, 24, 32)))
    assert {sample.hw for sample in sides} == {(16, 20), (24, 30), (32, 40)}


def test_augment_crop_branch() -> None:
    config = dataclasses.replace(FIXED, crop_short_sides=(16, 32), crop_range=(8, 12))
    samples = outcomes(config)
    uncropped = sum(sample.boxes_xyxy.tolist() == [[0, 0, 6, 10]] for sample in samples)
    assert 115 < uncropped < 185  # half of 300, deviation 8.7; a crop that keeps the box looks different
    lost = [sample for sample in samples if len(sample.labels) == 0]
    assert lost and all(sample.boxes_xyxy.shape == (0, 4) for sample in lost)
    for sample in samples:
        assert min(sample.hw) == 32 and max(sample.hw) <= 64
        assert sample.boxes_xyxy.min() >= 0 if len(sample.labels) else True
    assert not any(sample.ignored.any() for sample in samples)
    tiled = outcomes(dataclasses.replace(config, tile_size=16))  # with tiles, the crop obeys tile_keep
    assert any(sample.ignored.any() for sample in tiled)
    assert [sample.labels.tolist() for sample in tiled] == [sample.labels.tolist() for sample in samples]


def test_jitter_changes_colour_only() -> None:
    pixels = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes, ignored = torch.tensor([[1.0, 2, 3, 4], [5, 5, 9, 9]], dtype=torch.float64), torch.tensor([False, True])
    sample = Sample(pixels, boxes, torch.tensor([0, -1]), ignored)
    out = augment(sample, dataclasses.replace(FIXED, color_jitter=0.4), np.random.default_rng(1))
    assert out.image.dtype == torch.uint8 and not torch.equal(out.image, pixels)
    assert out.boxes_xyxy.tolist() == boxes.tolist()
    assert out.labels.tolist() == [0, -1] and out.ignored.tolist() == [False, True]
    assert torch.equal(augment(sample, FIXED, np.random.default_rng(1)).image, pixels)


# --- boxes against masks ---

# Object j of image i has the label 10 i + j; border, one pixel, whole image, touching neighbours, fractions of a pixel.
IMAGES = [
    ((60, 90), [(0, 0, 7, 5), (20, 10, 32, 18), (50, 30, 51, 31), (70, 40, 80, 49), (36, 22, 45, 29)]),
    ((60, 90), [(0, 0, 90, 60), (40, 20, 52, 35)]),
    ((80, 50), [(10, 10, 18, 20), (18, 10, 26, 20), (30, 60, 42, 75), (44, 70, 50, 80)]),
    ((60, 90), []),
    ((40, 120), [(15, 15, 23, 25), (100, 5, 110, 13)]),
]
CONFIGS = {
    "plain": DataConfig(
        train_short_sides=(48, 60, 72), train_long_side=120, crop_short_sides=(50,), crop_range=(30, 45)
    ),
    "mosaic": DataConfig(train_short_sides=(48, 60, 72), train_long_side=120, mosaic=1.0, crop_short_sides=()),
    "paste": DataConfig(train_short_sides=(48, 60, 72), train_long_side=120, copy_paste=1.0, crop_short_sides=()),
    "all": DataConfig(
        train_short_sides=(48, 60, 72),
        train_long_side=120,
        crop_short_sides=(50,),
        crop_range=(30, 45),
        tile_size=64,
        horizontal_flip=0.5,
        vertical_flip=0.5,
        quarter_turns=True,
        mosaic=0.5,
        copy_paste=1.0,
    ),
}


def worlds(shown: int | None) -> list[Sample]:
    """All images with all their boxes; only object `shown` is painted, white on black."""
    samples = []
    for number, (hw, boxes) in enumerate(IMAGES):
        sample = blank(hw, boxes, [10 * number + index for index in range(len(boxes))])
        for label, (x1, y1, x2, y2) in zip(sample.labels.tolist(), boxes, strict=True):
            if label == shown:
                sample.image[:, y1:y2, x1:x2] = 255
        samples.append(sample)
    return samples


def seen(config: DataConfig, seed: int, shown: int | None = None) -> Sample:
    """One training image of the data set above."""
    samples = worlds(shown)

    def draw(generator: np.random.Generator) -> Sample:
        return samples[int(generator.integers(len(samples)))]

    return augment(samples[seed % len(samples)], config, np.random.default_rng(seed), draw)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_boxes_follow_the_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an object's mask comes out, there is a box of its label, and the other way round, to one pixel."""
    monkeypatch.setattr(augmentation, "_CHOICES", 1)  # the choice of a place by its colour would differ by the mask
    pasted = cut = 0
    for seed in range(15):
        out = seen(CONFIGS[name], seed)
        rows, columns = np.mgrid[0 : out.hw[0], 0 : out.hw[1]]
        for label in {10 * number + index for number, (_, boxes) in enumerate(IMAGES) for index in range(len(boxes))}:
            moved = seen(CONFIGS[name], seed, label)
            assert torch.equal(moved.boxes_xyxy, out.boxes_xyxy) and torch.equal(moved.labels, out.labels)
            mask = moved.image[0].numpy() > 127
            inner, outer = np.zeros_like(mask), np.zeros_like(mask)
            for x1, y1, x2, y2 in out.boxes_xyxy[out.labels == label].tolist():
                inner |= (columns >= x1 + 1) & (columns + 1 <= x2 - 1) & (rows >= y1 + 1) & (rows + 1 <= y2 - 1)
                outer |= (columns >= x1 - 1) & (columns + 1 <= x2 + 1) & (rows >= y1 - 1) & (rows + 1 <= y2 + 1)
            assert mask[inner].all() and not mask[~outer].any()
        assert (out.boxes_xyxy[:, 2:] > out.boxes_xyxy[:, :2]).all() and (out.boxes_xyxy[:, :2] >= 0).all()
        assert (out.boxes_xyxy[:, 2:] <= torch.tensor([out.hw[1], out.hw[0]]) + 1e-9).all()
        pasted += len(out.labels) - len(set(out.labels.tolist()))
        cut += int(out.ignored.sum())
    assert pasted > 20 or name in ("plain", "mosaic")  # the test has seen what it is about
    assert (cut > 3) == (name in ("mosaic", "all"))


# --- mosaic and copy-paste one by one; a training size equal to the images' makes them exact to the pixel ---


def coloured(hw: tuple[int, int], boxes: list[tuple[int, ...]], first: int, ground: int = 0) -> Sample:
    """Objects of flat colours (label, 200, ground) on (0, 0, ground): a pixel tells what it belongs to."""
    sample = blank(hw, boxes, list(range(first, first + len(boxes))))
    sample.image[2] = ground
    for label, (x1, y1, x2, y2) in zip(sample.labels.tolist(), boxes, strict=True):
        sample.image[0, y1:y2, x1:x2] = label
        sample.image[1, y1:y2, x1:x2] = 200
    return sample


def extent(mask: np.ndarray) -> list[int]:
    """x1, y1, x2, y2 of what is true."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def scattered(generator: np.random.Generator, hw: tuple[int, int], first: int, ground: int) -> Sample:
    """Up to nine objects of 1 to 12 pixels in a grid of free cells, some at the border."""
    boxes = []
    for cell in range(9):
        width, height = generator.integers(1, 13, 2).tolist()
        x, y = (cell % 3) * (hw[1] // 3), (cell // 3) * (hw[0] // 3)
        x += int(generator.integers(0, hw[1] // 3 - width + 1))
        y += int(generator.integers(0, hw[0] // 3 - height + 1))
        if generator.random() < 0.8:
            boxes.append((x, y, x + width, y + height))
    return coloured(hw, boxes, first, ground)


SAME = dataclasses.replace(FIXED, train_short_sides=(60,), train_long_side=200, copy_paste_count=20)


def test_mosaic_is_exact_where_nothing_is_scaled() -> None:
    cut = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        parts = [scattered(generator, (60, 90), 1 + 20 * index, 10 + index) for index in range(4)]
        full = {label: box for part in parts for label, box in zip(part.labels.tolist(), part.boxes_xyxy, strict=True)}
        out = mosaic(parts, SAME, generator)
        assert out.hw == (60, 90)
        labels, object_mask, ground = out.image.numpy()
        present = sorted(set(labels[object_mask == 200].tolist()))
        assert sorted(out.labels.tolist()) == present
        for label, box, ignored in zip(out.labels.tolist(), out.boxes_xyxy, out.ignored.tolist(), strict=True):
            mask = (labels == label) & (object_mask == 200)
            assert box.tolist() == extent(mask)
            x1, y1, x2, y2 = full[label].tolist()
            assert ignored == (10 * mask.sum() < 4 * (x2 - x1) * (y2 - y1))
            cut += ignored
        # Four grounds in four rectangles around one point, and nothing else.
        assert sorted(set(ground.ravel().tolist())) == [10, 11, 12, 13]
        corners = [extent(ground == 10 + index) for index in range(4)]
        x, y = corners[0][2:]
        assert corners == [[0, 0, x, y], [x, 0, 90, y], [0, y, x, 60], [x, y, 90, 60]]
        assert all(
            (ground[top:bottom, left:right] == 10 + i).all() for i, (left, top, right, bottom) in enumerate(corners)
        )
        assert 15 <= y <= 45 and 22 <= x <= 68
    assert cut > 10


def test_mosaic_keeps_the_scale_of_the_plain_recipe() -> None:
    """Objects that came through whole have the size that a resize of their own image gives them, to rounding."""

    def sizes(*short_sides: int) -> np.ndarray:
        config = dataclasses.replace(SAME, train_short_sides=short_sides, train_long_side=400)
        parts = [blank((60, 80), [(30, 20, 40, 30), (5, 45, 15, 55)]) for _ in range(4)]
        outs = [mosaic(parts, config, np.random.default_rng(seed)) for seed in range(60)]
        assert {min(out.hw) for out in outs} == set(short_sides)
        boxes = torch.cat([out.boxes_xyxy[~out.ignored] for out in outs])
        assert len(boxes) > 60  # two objects an image on average, less what is cut
        return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().numpy()

    # A window of 15 to 60 whole pixels is off by 3 % at most.
    assert sizes(120).max() < 20.7 and (sizes(120) > 19.3).mean() > 0.5
    mixed = sizes(90, 150)
    assert mixed.max() < 25.9 and (mixed > 24.1).mean() > 0.1  # small ones may be enlarged, large ones are not


def test_mosaic_and_copy_paste_know_the_crops_scales() -> None:
    """60 x 60 -> 120 -> a crop of 30 -> 60: objects four times as large (and 16 times as rare), or as they are."""
    config = dataclasses.replace(SAME, crop_short_sides=(120,), crop_range=(30, 30), copy_paste_max_px=40.0)
    source = blank((60, 60), [(x, y, x + 4, y + 4) for x in (8, 28, 48) for y in (8, 28, 48)])
    seeds = [np.random.default_rng(seed) for seed in range(40)]
    plain = [augment(source, config, seed) for seed in seeds]
    for outs in (
        plain,
        [mosaic([source] * 4, config, seed) for seed in seeds],
        [copy_paste(blank((60, 60)), [source], config, seed) for seed in seeds],
    ):
        sides = torch.cat([out.boxes_xyxy[:, 2] - out.boxes_xyxy[:, 0] for out in outs])
        assert 15 < sides.max() < 21  # pasted objects change by a quarter
        assert (sides > 12).float().mean() > 0.03 and ((sides > 3) & (sides < 6)).float().mean() > 0.3


def test_mosaic_fills_its_canvas() -> None:
    """No grey between images of usual forms; beside a strip no more than its form asks for; and never none at all."""
    config = dataclasses.replace(SAME, train_short_sides=(90, 120), train_long_side=200)

    def white(hw: tuple[int, int]) -> Sample:
        return Sample(torch.full((3, *hw), 255, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0).long())

    for seed in range(30):
        forms = [(60, 80), (80, 60), (90, 160), (70, 70)]
        start = seed % 4
        out = mosaic([white(hw) for hw in forms[start:] + forms[:start]], config, np.random.default_rng(seed))
        assert (out.image == 255).all()
        out = mosaic([white((60, 80)), *[white((10, 200))] * 3], config, np.random.default_rng(seed))
        grey = (out.image.permute(1, 2, 0) == torch.tensor(GREY)).all(-1)
        assert ((out.image == 255).all(0) | grey).all()  # the strip has a height of 10 and becomes 20
        y, x = (int(value) for value in np.argwhere(~grey.numpy())[0])
        assert (x, y) == (0, 0)
        rows = (~grey[:, -1]).sum()
        assert rows == 40 and grey.any()


def test_copy_paste_is_exact_where_nothing_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "_RESCALE_RANGE", (1.0, 1.0))
    config = dataclasses.replace(SAME, horizontal_flip=0.5, vertical_flip=0.5, quarter_turns=True)
    count = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        sample = scattered(generator, (60, 90), 1, 40)
        ignored_box = torch.tensor([[30.0, 0, 50, 60]], dtype=torch.float64)
        sample = Sample(
            sample.image,
            torch.cat([sample.boxes_xyxy, ignored_box]),
            torch.cat([sample.labels, torch.tensor([-1])]),
            torch.tensor([False] * len(sample.labels) + [True]),
        )
        before = sample.image.clone()
        other = scattered(generator, (60, 90), 101, 40)
        out = copy_paste(sample, [sample, other], config, generator)
        assert torch.equal(sample.image, before)  # the original is not written to
        old = len(sample.labels)
        assert torch.equal(out.boxes_xyxy[:old], sample.boxes_xyxy) and torch.equal(out.labels[:old], sample.labels)
        assert not out.ignored[old:].any() and len(out.labels) <= old + 20
        labels, object_mask, ground = out.image.numpy()
        assert (ground == 40).all()  # nothing but objects of the same ground is pasted
        pasted = np.zeros((60, 90), dtype=bool)
        for label, box in zip(out.labels[old:].tolist(), out.boxes_xyxy[old:].tolist(), strict=True):
            x1, y1, x2, y2 = (int(value) for value in box)
            assert [x1, y1, x2, y2] == box
            inside = (slice(y1, y2), slice(x1, x2))
            assert (labels[inside] == label).all() and (object_mask[inside] == 200).all()
            assert not pasted[inside].any()
            pasted[inside] = True
            source = other if label > 100 else sample
            width, height = (source.boxes_xyxy[source.labels == label][0].reshape(2, 2).diff(dim=0)[0]).tolist()
            assert sorted([x2 - x1, y2 - y1]) == sorted([width, height])
            count += 1
        for x1, y1, x2, y2 in sample.boxes_xyxy.long().tolist():
            inside = (slice(y1, y2), slice(x1, x2))
            assert not pasted[inside].any()
            assert torch.equal(out.image[:, y1:y2, x1:x2], before[:, y1:y2, x1:x2])  # nor a margin over them
        # Objects are nowhere but where boxes say; what is new lies in the new boxes.
        assert ((object_mask == 200) == ((before[1].numpy() == 200) | pasted)).all()
    assert count > 150


def pasted_labels(sources: list[Sample], config: DataConfig = SAME, seeds: int = 20) -> set[int]:
    """The labels of everything that is pasted into an empty image."""
    outs = [copy_paste(blank((60, 90)), sources, config, np.random.default_rng(seed)) for seed in range(seeds)]
    return {label for out in outs for label in out.labels.tolist()}


def test_only_small_whole_and_lone_objects_are_copied() -> None:
    boxes = [
        (0, 20, 5, 25),  # at the left border
        (30, 54, 36, 60),  # at the lower one
        (10, 5, 20, 15),  # good
        (30, 10, 40, 20),  # overlaps the next
        (38, 18, 44, 24),
        (55, 5, 75, 30),  # larger than 20 pixels: sqrt(500) = 22.4
        (80, 40, 86, 46),  # good; thin ones have a size, too
        (10, 35, 16, 41),  # in a region to ignore
        (60, 45, 62, 57),  # good
    ]
    sample = coloured((60, 90), boxes, 0)
    sample = Sample(
        sample.image,
        torch.cat([sample.boxes_xyxy, torch.tensor([[5, 30, 20, 50], [66, 34, 72, 40]], dtype=torch.float64)]),
        torch.tensor([*range(9), 99, 98]),  # the last one is small and alone, but ignored
        torch.tensor([False] * 9 + [True] * 2),
    )
    config = dataclasses.replace(SAME, copy_paste_max_px=20.0)
    assert pasted_labels([sample], config) == {2, 6, 8}
    doubled = dataclasses.replace(
        config, train_short_sides=(120,)
    )  # at this scale the first one is as large as allowed
    assert pasted_labels([sample], doubled) == {2, 6, 8}
    assert pasted_labels([sample], dataclasses.replace(doubled, copy_paste_max_px=19.9)) == {6, 8}


def test_sizes_of_pasted_objects() -> None:
    """0.8 to 1.25 of the size at the network's scale, never above the limit; below 8 pixels never smaller."""
    config = dataclasses.replace(SAME, train_short_sides=(30,), copy_paste_max_px=20.0)
    for side, low, high in ((36, 14.4, 20), (24, 9.6, 15), (18, 8, 11.25), (8, 4, 5)):
        source = coloured((60, 90), [(25, 12, 25 + side, 12 + side)], 0)
        outs = [copy_paste(blank((60, 90)), [source], config, np.random.default_rng(seed)) for seed in range(16)]
        boxes = torch.cat([out.boxes_xyxy for out in outs])
        sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        # A patch has whole pixels: half a pixel of its 5 to 22 belongs to rounding.
        assert low * 0.93 < sizes.min() < low * 1.15 and high * 0.87 < sizes.max() < high * 1.07


def test_the_patch_fades_out() -> None:
    """A white patch on black: whole in its box, then ever darker, and nearly gone at its edge."""
    source = coloured((60, 90), [(30, 20, 54, 44)], 0)
    source.image.fill_(255)
    for seed in range(20):
        out = copy_paste(
            blank((60, 90)), [source], dataclasses.replace(SAME, copy_paste_count=1), np.random.default_rng(seed)
        )
        x1, y1, x2, y2 = (int(value) for value in out.boxes_xyxy[0].round())
        image = out.image[0].long()
        assert (image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 255).all()
        for line in (image[(y1 + y2) // 2], image[:, (x1 + x2) // 2]):
            steps, middle = line.diff(), int(line.argmax())
            assert steps.abs().max() < 255 / 4  # margins of 6 pixels and more: no edge to be seen
            assert (steps[:middle] >= 0).all() and (steps[middle:] <= 0).all()


def test_places_suit_the_patch() -> None:
    """Of four places the best: from dark surroundings, 15 of 16 patches go to the dark half."""
    sample = blank((60, 300))
    sample.image[:, :, 150:] = 220
    for ground, dark in ((0, True), (220, False)):
        source = coloured((60, 90), [(40, 20, 50, 30)], 0)
        source.image[source.image == 0] = ground
        outs = [copy_paste(sample, [source], SAME, np.random.default_rng(seed)) for seed in range(20)]
        lefts = torch.cat([out.boxes_xyxy[:1, 0] for out in outs])
        assert len(lefts) == 20 and ((lefts < 150) == dark).float().mean() > 0.8


def test_nothing_to_paste_or_no_place() -> None:
    generator = np.random.default_rng(0)
    sample = coloured((60, 90), [(10, 10, 18, 18)], 0)
    full = Sample(sample.image, torch.tensor([[0.0, 0, 90, 60]]), torch.tensor([-1]), torch.tensor([True]))
    for target, sources, config in (
        (sample, [blank((60, 90))], SAME),  # no objects
        (sample, [full], SAME),  # nothing but a region to ignore
        (full, [sample], SAME),  # no place free
        (blank((5, 5)), [sample], SAME),  # smaller than the patch
        (blank((1, 1)), [sample], SAME),
        (sample, [sample], dataclasses.replace(SAME, copy_paste_count=0)),
    ):
        out = copy_paste(target, sources, config, generator)
        assert torch.equal(out.image, target.image) and torch.equal(out.boxes_xyxy, target.boxes_xyxy)
        assert out.labels.tolist() == target.labels.tolist() and out.ignored.tolist() == target.ignored.tolist()


@pytest.mark.parametrize("hw", [(1, 1), (1, 40), (3, 2), (60, 90)])
def test_images_of_any_size(hw: tuple[int, int]) -> None:
    """One pixel or a strip, empty, with a box as large as the image, or with regions to ignore only."""
    whole = torch.tensor([[0.0, 0, hw[1], hw[0]]], dtype=torch.float64)
    image = torch.zeros(3, *hw, dtype=torch.uint8)
    for ignored in (False, True):
        for sample in (blank(hw), Sample(image, whole, torch.tensor([0]), torch.tensor([ignored]))):
            for seed in range(10):
                out = augment(sample, CONFIGS["all"], np.random.default_rng(seed))
                assert out.image.dtype == torch.uint8 and min(out.hw) >= 1
                assert out.boxes_xyxy.shape == (len(out.labels), 4) and len(out.ignored) == len(out.labels)
                assert out.ignored.all() or not ignored


def test_probabilities_and_other_images() -> None:
    """Mosaic draws three images, copy-paste one, as often as wanted (300 draws at 0.3: 90, deviation 8)."""
    for setting, others in (("mosaic", 3), ("copy_paste", 1)):
        drawn: list[int] = []
        for seed in range(300):
            calls: list[object] = []
            sample = coloured((24, 36), [(10, 10, 14, 14)], 0)

            def other(generator: np.random.Generator, calls: list[object] = calls, sample: Sample = sample) -> Sample:
                calls.append(generator)
                return sample

            config = dataclasses.replace(SAME, train_short_sides=(24,), copy_paste_count=2, **{setting: 0.3})
            generator = np.random.default_rng(seed)
            out = augment(sample, config, generator, other)
            assert all(call is generator for call in calls)
            drawn.append(len(calls))
            if seed < 10:
                again = augment(sample, config, np.random.default_rng(seed), other)
                assert torch.equal(out.image, again.image) and torch.equal(out.boxes_xyxy, again.boxes_xyxy)
        assert set(drawn) == {0, others} and 60 < sum(count > 0 for count in drawn) < 120


def test_a_data_set_of_one_image() -> None:
    sample = coloured((60, 90), [(10, 10, 18, 18), (50, 30, 60, 44)], 3)
    config = dataclasses.replace(SAME, mosaic=1.0, copy_paste=1.0)
    outs = [augment(sample, config, np.random.default_rng(seed)) for seed in range(20)]
    assert all(set(out.labels.tolist()) <= {3, 4} for out in outs)
    assert any(len(out.labels) > 8 for out in outs)
