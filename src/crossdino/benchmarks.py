"""The five benchmark data sets as pure data: classes, official splits with their published counts, size bands, caps.

Nothing here is measured by us. A published count that we found no source for is None, and every count names its source
and what it counts, because a count that differs is only worth a warning where both count the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass

# COCO 2017: 80 classes on the ids 1..90. Detectors with a 91-way head use the id itself as the class index.
COCO_CLASSES: dict[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip

# The official DINO heads: slot i is category id i; 11 slots never occur.
COCO_91_SLOTS: tuple[str, ...] = tuple(COCO_CLASSES.get(i, f"unused {i}") for i in range(91))

# VisDrone2019-DET: categories 1..10 of the raw annotations, in this order.
VISDRONE_CLASSES: tuple[str, ...] = (
    "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor",
)  # fmt: skip

# AI-TOD: categories 1..8 of its files.
AITOD_CLASSES: tuple[str, ...] = (
    "airplane", "bridge", "storage-tank", "ship", "swimming-pool", "vehicle", "person", "wind-mill",
)  # fmt: skip

# SODA-D: categories 1..9 of its files; 10, "ignore", is no class.
SODAD_CLASSES: tuple[str, ...] = (
    "people", "rider", "bicycle", "motor", "vehicle", "traffic-sign", "traffic-light", "traffic-camera", "warning-cone",
)  # fmt: skip

# WiderPerson as IterDet uses it: label 1 is the class, labels 2 to 5 are ignored.
WIDERPERSON_CLASSES: tuple[str, ...] = ("pedestrian",)

# AI-TOD's size bands, which RFLA and SR-TOD also use for VisDrone: bounds of sqrt(area) in pixels, both inclusive.
AITOD_SIZE_BANDS: dict[str, tuple[float, float]] = {
    "very tiny": (0.0, 8.0),
    "tiny": (8.0, 16.0),
    "small": (16.0, 32.0),
    "medium": (32.0, 1e5),
}

# SODA-D's size bands, the same way; larger objects are outside the benchmark.
SODAD_SIZE_BANDS: dict[str, tuple[float, float]] = {
    "extremely small": (0.0, 12.0),
    "relatively small": (12.0, 20.0),
    "generally small": (20.0, 32.0),
    "normal": (32.0, 2000.0**0.5),
}


@dataclass(frozen=True)
class Published:
    """What is published about a split, or about a whole data set.

    Attributes:
        images: images; None where no source was found.
        objects: objects; None where no source was found. `source` says which objects that counts.
        source: where the numbers stand, and what they count.
        patches: image patches that the literature cuts the split into (SODA-D); None elsewhere.
    """

    images: int | None
    objects: int | None
    source: str
    patches: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """One data set of the paper, as the literature uses it.

    Attributes:
        name: what commands call it.
        title: what people call it.
        categories: id in the prepared COCO file -> name of the class.
        splits: official name of a split -> what is published about it.
        roles: `train`, `val`, `test` -> the official split which the literature uses for that; no entry: there is none.
        paper_split: the official split on which the paper says it measured.
        protocol: the evaluation protocol, of `crossdino.evaluation.protocols`.
        size_bands: the toolkit's name of a band -> range of the area in square pixels, both ends inclusive.
        max_detections: the toolkit's caps, detections per image and class; empty: no cap.
        input: the literature's input size, in one line.
        total: what is published about all splits together, where there is such a number.
    """

    name: str
    title: str
    categories: dict[int, str]
    splits: dict[str, Published]
    roles: dict[str, str]
    paper_split: str
    protocol: str
    size_bands: dict[str, tuple[float, float]]
    max_detections: tuple[int, ...]
    input: str
    total: Published | None = None


_COCO_COUNTS = "COCO's instances_*2017.json as widely reported; objects: all annotations, crowd regions included"
_VISDRONE_COUNTS = "images: VisDrone paper (TPAMI 2021); "
_VISDRONE_RULE = "rows of categories 1-10 with score 1"
_AITOD_IMAGES = "AI-TOD paper (ICPR 2020) and its image lists; objects by split: no source found"
_SODAD_IMAGES = "images and objects by split: no source found"
_SODAD_PATCHES = f"{_SODAD_IMAGES}; patches: its authors, github.com/shaunyuan22/SODA-mmdetection issue 20"
_WIDERPERSON_IMAGES = "WiderPerson paper (IEEE TMM 2019); all listed images; objects by split: no source found"
_AITOD_AREAS = {"vt": (0.0, 64.0), "t": (64.0, 256.0), "s": (256.0, 1024.0), "m": (1024.0, 1e10)}

COCO = Benchmark(
    name="coco",
    title="COCO 2017",
    categories=COCO_CLASSES,
    splits={
        "train2017": Published(118_287, 860_001, _COCO_COUNTS),
        "val2017": Published(5_000, 36_781, f"{_COCO_COUNTS} (36,335 without them)"),
    },
    roles={"train": "train2017", "val": "val2017"},
    paper_split="val2017",
    protocol="coco",
    size_bands={"S": (0.0, 1024.0), "M": (1024.0, 9216.0), "L": (9216.0, 1e10)},
    max_detections=(1, 10, 100),
    input="short side 480-800, long side at most 1333 (training); 800, at most 1333 (test)",
)

VISDRONE = Benchmark(
    name="visdrone",
    title="VisDrone2019-DET",
    categories=dict(enumerate(VISDRONE_CLASSES, start=1)),
    splits={
        "train": Published(
            6_471,
            343_205,
            f"{_VISDRONE_COUNTS}objects: sum of the class counts of the common YOLO conversion ({_VISDRONE_RULE})",
        ),
        "val": Published(
            548,
            38_759,
            f"{_VISDRONE_COUNTS}objects: as printed by evaluations of the common YOLO conversion ({_VISDRONE_RULE}, "
            "exact duplicates of a line once)",
        ),
        "test-dev": Published(
            1_610,
            75_102,
            f"{_VISDRONE_COUNTS}objects: as printed by evaluations of the common YOLO conversion ({_VISDRONE_RULE}, "
            "exact duplicates of a line once)",
        ),
    },
    roles={"train": "train", "val": "val", "test": "test-dev"},
    paper_split="test-dev",
    protocol="visdrone",
    size_bands=_AITOD_AREAS,
    max_detections=(100, 300, 1500),
    input="1280 x 1280, aspect ratio kept (SR-TOD)",
)

AITOD = Benchmark(
    name="aitod",
    title="AI-TOD",
    categories=dict(enumerate(AITOD_CLASSES, start=1)),
    splits={
        "train": Published(11_214, None, _AITOD_IMAGES),
        "val": Published(2_804, None, _AITOD_IMAGES),
        "trainval": Published(14_018, None, _AITOD_IMAGES),
        "test": Published(14_018, None, _AITOD_IMAGES),
    },
    # As RFLA and SR-TOD do: training on trainval, so there is no held-out split besides test.
    roles={"train": "trainval", "val": "test", "test": "test"},
    paper_split="test",
    protocol="aitod",
    size_bands=_AITOD_AREAS,
    max_detections=(100, 300, 1500),
    input="800 x 800 (1200 x 1200 for Cross-DINO-CLAP-Strip-T-1200)",
    total=Published(28_036, 700_621, "AI-TOD's README (v1); objects: all annotations of trainval and test"),
)

SODAD = Benchmark(
    name="sodad",
    title="SODA-D",
    categories=dict(enumerate(SODAD_CLASSES, start=1)),
    splits={
        "train": Published(None, None, _SODAD_PATCHES, patches=58_023),
        "val": Published(None, None, _SODAD_IMAGES),
        "test": Published(None, None, _SODAD_PATCHES, patches=161_579),
    },
    roles={"train": "train", "val": "val", "test": "test"},
    paper_split="test",
    protocol="sodad",
    size_bands={"eS": (0.0, 144.0), "rS": (144.0, 400.0), "gS": (400.0, 1024.0), "N": (1024.0, 2000.0)},
    max_detections=(100, 300, 1000),
    input="patches of 800 x 800 with stride 650, resized to 1200 x 1200 (CFINet)",
    total=Published(
        24_828,
        278_433,
        "SODA paper (TPAMI 2023); objects: instances of the nine categories, so without category 10, ignore",
    ),
)

WIDERPERSON = Benchmark(
    name="widerperson",
    title="WiderPerson",
    categories=dict(enumerate(WIDERPERSON_CLASSES, start=1)),
    splits={
        "train": Published(8_000, None, _WIDERPERSON_IMAGES),
        "val": Published(1_000, None, _WIDERPERSON_IMAGES),
        "test": Published(4_382, None, f"{_WIDERPERSON_IMAGES}; its annotations are not public"),
    },
    roles={"train": "train", "val": "val"},
    paper_split="val",
    protocol="widerperson",
    size_bands={},
    max_detections=(),
    input="between 1000 x 600 and 1666 x 1000 (training); 1333 x 800 (test), aspect ratio kept (IterDet)",
    total=Published(
        13_382,
        399_786,
        "WiderPerson paper (IEEE TMM 2019); objects: its annotations, test included (all five labels, as it seems)",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (COCO, VISDRONE, AITOD, SODAD, WIDERPERSON)
}
