"""From the statistics of a data set to settings for it, each with its reason.

The rules and the numbers behind them:

- Input size and tiles: see `crossdino.data.tile_choice`, which `data.tile_size: auto` follows too.
- Queries and detections: half as many again as the fullest image or tile has objects. DETR-like detectors find fewer
  objects than they have queries left for.
- Boost's beta: the paper takes 1.0 for COCO, 0.1 for VisDrone and SODA-D and 0.05 for AI-TOD. Their median objects are
  about 1/10, 1/30 and 1/60 of the input's side; in between we take the (geometric) middle. A heuristic. A recipe's
  lower beta is kept.
- Batch size: what fits the memory, at most the recipe's; gradient accumulation makes up for the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.benchmarks import AITOD_SIZE_BANDS
from crossdino.config import Config, EvaluationConfig
from crossdino.data.inspection import Inspection, SplitObjects, network_sizes, objects_per_tile
from crossdino.data.tile_choice import SizeChoice, choose_size, round_up
from crossdino.data.transforms import resize_hw
from crossdino.memory_plan import MemoryPlan, fit_batch, worst_sizes
from crossdino.proposal import Proposal, Setting
from crossdino.trial import WorstBatch, available_bytes

# Memory that is left to loader processes, evaluation and what else runs.
MEMORY_SHARE = 0.85
_HEAD_ROOM = 1.5
# A note is made where more than this share of the objects stays smaller than a token.
_TOO_SMALL_SHARE = 0.15
# (from this relative size of the median object on, beta), see the top of this file.
_BETAS = ((0.055, 1.0), (0.022, 0.1), (0.0, 0.05))
# A size band holds enough objects for its AP to mean something from this many, and from this share on.
_ENOUGH_OBJECTS, _ENOUGH_SHARE = 20, 0.05

__all__ = ["Proposal", "propose"]


def propose(
    inspection: Inspection,
    config: Config,
    *,
    base: Config | None = None,
    given: Collection[str] = (),
    memory_bytes: float | None = None,
    trial: bool = True,
    on_trial: Callable[[str], None] | None = None,
) -> Proposal:
    """Settings for a data set.

    Args:
        inspection: of the data, the split to train on first.
        config: a recipe, with changes if wanted.
        base: the recipe without changes, which the proposal's file is relative to; None: `config`.
        given: dotted names of settings that were chosen and shall stay as they are in `config`.
        memory_bytes: what a step may take; None: most of what is free now, on the GPU or in the machine.
        trial: check the memory by making a step in a process of its own.
        on_trial: called with a line of text before each of these steps.

    Returns:
        The proposal.

    Raises:
        InputError: the configuration describes no possible model.
    """
    classes = tuple(dict.fromkeys(item.name for item in inspection.classes)) or config.model.class_names
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, class_names=classes))
    plan = _Plan(inspection, config, frozenset(given))
    plan.input_size()
    plan.counts()
    plan.size_bands()
    plan.beta()
    memory = plan.batch_size(memory_bytes, on_trial if on_trial else lambda _: None, trial)
    plan.remarks()
    return Proposal(
        base or config, plan.config, tuple(plan.settings), tuple(plan.notes), memory, plan.items_of_an_epoch()
    )


class _Plan:
    """A proposal in the making: the rules, each of which may change `config` and adds its lines."""

    def __init__(self, inspection: Inspection, config: Config, given: frozenset[str]) -> None:
        self.inspection = inspection
        # `auto` asks for a choice and is none.
        self.auto = config.data.tile_size == "auto"
        self.config = dataclasses.replace(config, data=dataclasses.replace(config.data, tile_size=config.data.tile_px))
        self.given = given - {"data.tile_size"} if self.auto else given
        self.settings: list[Setting] = []
        self.notes: list[str] = []
        self.split: SplitObjects = inspection.main

    def decide(self, name: str, value: Any, reason: str) -> None:
        """Take a value for a setting; one that was given by the user stays."""
        section, _, inner = name.partition(".")
        present = getattr(getattr(self.config, section), inner)
        if name in self.given:
            if present != value:
                self.notes.append(f"{name} stays at the given {present}; without that it would be {value}: {reason}")
            return
        self.settings.append(Setting(name, value, reason, changed=present != value))
        if present != value:
            # Not `with_changes`: values made here need no check of their type, which takes a tenth of a second.
            part = dataclasses.replace(getattr(self.config, section), **{inner: value})
            self.config = dataclasses.replace(self.config, **{section: part})

    # --- the size of the input ---

    def input_size(self) -> None:
        """Whole images or tiles, and how large."""
        given_input = bool({"data.test_short_side", "data.test_long_side"} & self.given)
        if "data.tile_size" in self.given or (given_input and not self.auto) or not len(self.split):
            return
        stride = self.config.model.first_stride
        choice = choose_size(self.split, self.config.data, stride, fixed_input=given_input)
        if choice.action == "tiles":
            self._cut_tiles(choice)
        elif choice.action == "resize" and not given_input:
            self._resize_all(choice.growth, choice.reason)
        else:
            self.decide("data.tile_size", 0, choice.reason)
        sizes = network_sizes(self.split, self.config.data)
        if (sizes < stride).mean() > _TOO_SMALL_SHARE:
            self.notes.append(
                f"{(sizes < stride).mean():.0%} of the objects have less than {stride} px even so"
                + (
                    "; --model.first_stride 4 --model.num_feature_levels 5 gives a finer level, at several times the "
                    "memory and time"
                    if stride == 8
                    else ""
                )
            )

    def _resize_all(self, growth: float, reason: str) -> None:
        """All sides of the recipe times `growth`, in steps of 32 pixels."""
        data = self.config.data

        def scaled(side: int) -> int:
            return max(32, round(side * growth / 32) * 32)

        self.decide("data.test_short_side", scaled(data.test_short_side), reason)
        same = "in proportion to data.test_short_side"
        self.decide("data.test_long_side", scaled(data.test_long_side), same)
        for name in ("train_short_sides", "crop_short_sides", "crop_range"):
            sides = tuple(scaled(side) for side in getattr(data, name))
            self.decide(f"data.{name}", sides if name == "crop_range" else tuple(dict.fromkeys(sides)), same)
        self.decide("data.train_long_side", scaled(data.train_long_side), same)

    def _cut_tiles(self, choice: SizeChoice) -> None:
        data, side = self.config.data, choice.side
        self.decide("data.tile_size", choice.tile_size, choice.reason)
        self.decide("data.tile_overlap", choice.tile_overlap, choice.overlap_reason)
        if side != data.test_short_side:
            self.decide("data.test_short_side", side, "so that the objects of the larger tiles keep their size")
            self.decide("data.train_short_sides", (side,), "in proportion to data.test_short_side")
        for name in ("test_long_side", "train_long_side"):
            if getattr(data, name) < side:
                self.decide(f"data.{name}", side, "tiles are square")

    # --- counts ---

    def per_item(self, split: SplitObjects) -> NDArray[np.int64]:
        """Objects of each image, or of each tile."""
        data = self.config.data
        if data.tile_px:
            return objects_per_tile(split, data.tile_px, data.tile_overlap, data.tile_keep)
        return split.per_image

    def counts(self) -> None:
        """Queries, detections and denoising pairs."""
        model, evaluation, data = self.config.model, self.config.evaluation, self.config.data
        what = "tile" if data.tile_px else "image"
        fullest = max(
            (int(self.per_item(split).max(initial=0)) for split in self.inspection.splits.values()), default=0
        )
        pasted = data.copy_paste_count if data.copy_paste > 0 else 0
        wanted = _round_count(_HEAD_ROOM * (fullest + pasted))
        tokens = self._num_tokens()
        reason = f"the fullest {what} has {fullest} objects"
        if pasted:
            reason += f" and copy-paste adds up to {pasted}"
        if wanted <= model.num_queries <= tokens:
            reason += f": the recipe's {model.num_queries} leave head room"
        else:
            reason += f", and half as many again are head room: {wanted}"
        queries = max(wanted, model.num_queries)
        if queries > tokens:
            queries = max(1, tokens // 10 * 10 if tokens >= 10 else tokens)
            reason += f"; an image of the usual size has {tokens} tokens, and each query begins as one of them"
        self.decide("model.num_queries", queries, reason)
        if fullest > self.config.model.num_queries:
            self.notes.append(
                f"the fullest {what} has {fullest} objects, more than model.num_queries {self.config.model.num_queries}"
                f": the rest cannot be found; {'smaller' if data.tile_px else 'cut'} tiles (--data.tile_size) or a "
                "larger input help"
            )

        most = self.config.model.num_queries * self.config.model.num_classes
        select = min(max(_round_count(_HEAD_ROOM * fullest), evaluation.num_select), most)
        self.decide(
            "evaluation.num_select",
            select,
            f"detections kept per {what}: the fullest has {fullest} objects"
            + (f"; {most} (query, class) pairs are all there are" if select == most else ""),
        )
        of_class = max(split.most_of_a_class for split in self.inspection.splits.values())
        self.decide(
            "evaluation.max_detections",
            max(_round_count(_HEAD_ROOM * of_class), evaluation.max_detections),
            f"up to {of_class} objects of one class in one image; detections beyond this number do not count in AP",
        )
        per_item = self.per_item(self.split)
        filled = per_item[per_item > 0]
        if model.num_denoising and len(filled):
            high = float(np.percentile(filled, 95))
            pairs = model.num_denoising if high <= model.num_denoising else min(_round_count(high), 300)
            self.decide(
                "model.num_denoising",
                pairs,
                f"95 % of the {what}s with objects have at most {high:.0f}; more than {pairs} are denoised in rounds",
            )

    def _num_tokens(self) -> int:
        """Tokens of all levels at the median image's (or the tile's) size."""
        data, model = self.config.data, self.config.model
        if not self.split.num_images:
            return model.num_queries
        hw = (data.tile_px, data.tile_px)
        if not data.tile_px:
            areas = self.split.image_hw.prod(1)
            hw = tuple(self.split.image_hw[np.argsort(areas)[len(areas) // 2]].tolist())
        height, width = resize_hw(hw, data.test_short_side, data.test_long_side)
        strides = [model.first_stride * 2**level for level in range(model.num_feature_levels)]
        return sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in strides)

    # --- evaluation and loss ---

    def size_bands(self) -> None:
        """Bands that hold enough objects to be measured."""
        splits = self.inspection.splits
        name, split = ("val", splits["val"]) if len(splits.get("val", ())) else next(iter(splits.items()))
        sizes = np.sqrt(split.areas)
        enough = max(_ENOUGH_OBJECTS, math.ceil(_ENOUGH_SHARE * len(sizes)))
        if len(sizes) < 2 * enough:
            return
        known = {"the recipe": self.config.evaluation.size_bands, "COCO": EvaluationConfig().size_bands}
        known["AI-TOD"] = AITOD_SIZE_BANDS
        best: tuple[float, str, dict[str, tuple[float, float]]] | None = None
        for source, bands in known.items():
            counts = {band: int(((sizes >= low) & (sizes <= high)).sum()) for band, (low, high) in bands.items()}
            held = {band: bands[band] for band, count in counts.items() if count >= enough}
            largest = max(counts.values()) / len(sizes)
            if len(held) >= 2 and largest <= 0.8 and (best is None or largest < best[0] - 0.05):
                best = (largest, source, held)
        if best is not None:
            largest, source, bands = best
            reason = f"the bands of {source}: each of these holds at least {enough} objects of {name}, the fullest one "
            reason += f"{largest:.0%}"
            left_out = len(known[source]) - len(bands)
            reason += f"; {left_out} with fewer left out" if left_out else ""
        else:
            low, high = (max(1, round(float(value))) for value in np.percentile(sizes, (100 / 3, 200 / 3)))
            if low == high:
                return
            bands = {"small": (0.0, float(low)), "medium": (float(low), float(high)), "large": (float(high), 1e5)}
            reason = f"thirds of the objects of {name}: of COCO's and AI-TOD's bands not even two hold enough of them"
        self.decide("evaluation.size_bands", bands, reason)

    def beta(self) -> None:
        """Boost's beta from the median object's size relative to the network's input."""
        loss, data = self.config.loss, self.config.data
        if loss.classification != "boost" or not len(self.split):
            return
        if data.tile_px:
            relative = float(np.median(self.split.sizes_px)) / data.tile_px
        else:
            sides = np.sqrt(self.split.image_hw.prod(1))[self.split.image_of]
            relative = float(np.median(self.split.sizes_px / sides))
        wanted = next(beta for bound, beta in _BETAS if relative >= bound)
        reason = (
            f"the median object is {relative:.3f} of the input's side (COCO about 0.1: 1.0; VisDrone 0.03: 0.1; AI-TOD "
            "0.016: 0.05; a heuristic)"
        )
        if loss.beta < wanted:
            reason += f"; {wanted:g} would do, the recipe's smaller value is kept"
        self.decide("loss.beta", min(wanted, loss.beta), reason)

    # --- memory ---

    def batch_size(self, memory_bytes: float | None, on_trial: Callable[[str], None], trial: bool) -> MemoryPlan:
        """The largest batch up to the recipe's that fits."""
        free, source = available_bytes() if memory_bytes is None else (memory_bytes, "as given")
        limit = MEMORY_SHARE * free
        fullest = int(self.per_item(self.split).max(initial=0))
        worst = WorstBatch(worst_sizes(self.split, self.config.data), fullest)
        wanted = self.config.training.batch_size
        plan = fit_batch(
            self.config,
            worst,
            limit,
            f"{MEMORY_SHARE:.0%} of {free / 1e9:.1f} GB, {source}",
            trial=trial,
            on_trial=on_trial,
            fixed_batch="training.batch_size" in self.given,
        )
        settings = self.config.training
        if not plan.fits:
            height, width = worst.sizes_hw[0]
            self.notes.append(
                f"a step with one image of {height} x {width} px does not fit into {limit / 1e9:.1f} GB ({plan.source})"
                ": take a smaller recipe (compact), smaller images (--data.tile_size) or more memory"
            )
        if plan.activation_checkpointing != settings.activation_checkpointing:
            self.decide("training.activation_checkpointing", True, "without it not even one image fits the memory")
        self.decide("training.batch_size", plan.batch_size, plan.reason())
        if plan.batch_size < wanted:
            accumulated = math.ceil(wanted * settings.gradient_accumulation / plan.batch_size)
            self.decide(
                "training.gradient_accumulation",
                accumulated,
                f"as many images per update as the recipe ({wanted * settings.gradient_accumulation})",
            )
        return plan

    def items_of_an_epoch(self) -> int:
        """Images of an epoch, or its tiles: those with objects and a share of the others."""
        data = self.config.data
        if not data.tile_px:
            return self.split.num_images
        per_tile = self.per_item(self.split)
        full = int((per_tile > 0).sum())
        wanted = round(data.empty_tiles * full) if full else len(per_tile)
        return full + min(len(per_tile) - full, wanted)

    def remarks(self) -> None:
        """What the settings cannot mend."""
        if list(self.inspection.splits) == ["train"]:
            self.notes.append("there is no validation split: set one aside, or nobody can tell how good the model is")
        if not self.config.data.quarter_turns:
            self.notes.append(
                "for images without an upright direction (aerial, microscopy) set --data.quarter_turns true "
                "--data.vertical_flip 0.5; boxes cannot tell"
            )


def _round_count(value: float) -> int:
    """Up to a round number: tens below 100, fifties below 500, hundreds above."""
    return round_up(value, 10 if value <= 100 else 50 if value <= 500 else 100)
