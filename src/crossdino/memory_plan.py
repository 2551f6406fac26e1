"""The batch size that fits the memory: estimated first, then checked by steps that are made (`crossdino.trial`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from crossdino.config import Config, DataConfig
from crossdino.data.inspection import SplitObjects
from crossdino.data.transforms import resize_hw
from crossdino.trial import Trial, WorstBatch, activation_bytes, fixed_bytes, run_trial

_MOST_TRIALS = 7


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step takes.

    Attributes:
        limit_bytes: what it may take.
        source: where the limit comes from, in words.
        worst: sizes and objects that were assumed.
        estimated_bytes: before any trial, of the batch size that was tried first.
        batch_size: the one proposed.
        activation_checkpointing: whether it needs that.
        trials: the steps that were made, in order.
        largest_batch: the largest batch that would fit, going by estimate and trials.
        fits: false where not even one image fits.
    """

    limit_bytes: float
    source: str
    worst: WorstBatch
    estimated_bytes: int
    batch_size: int
    activation_checkpointing: bool
    trials: tuple[Trial, ...]
    largest_batch: int
    fits: bool

    def reason(self) -> str:
        """Why it is this batch size, with the numbers."""
        height, width = self.worst.sizes_hw[0]
        batch = f"{self.batch_size} x {height} x {width} px with {self.worst.num_objects} objects each"
        limit = f"{self.limit_bytes / 1e9:.1f} GB"
        seen = next((t for t in reversed(self.trials) if t.fits and t.batch_size == self.batch_size), None)
        if not self.fits:
            text = f"not even this fits into {limit}"
        elif seen is not None:
            text = f"a trial step of {batch} took {seen.peak_bytes / 1e9:.1f} GB of {limit} ({self.source})"
        else:
            text = f"{batch}: estimated at {self.estimated_bytes / 1e9:.1f} GB of {limit} ({self.source}), not tried"
        return f"{text}; up to about {self.largest_batch} would fit" if self.largest_batch > self.batch_size else text


def fit_batch(
    config: Config,
    worst: WorstBatch,
    limit_bytes: float,
    source: str,
    *,
    trial: bool = True,
    on_trial: Callable[[str], None] = lambda _: None,
    fixed_batch: bool = False,
) -> MemoryPlan:
    """Find the batch size, at most that of the configuration, whose step fits into the memory.

    The estimate decides what is tried first; a step that takes too much is tried again with half the batch, at last
    with activation checkpointing; one that leaves room with as many images as its own measure allows.

    Args:
        config: with the number of classes of the data.
        worst: sizes and objects of the step.
        limit_bytes: what the step may take.
        source: of the limit, in words.
        trial: make the steps; False goes by the estimate.
        on_trial: told before each step what is tried.
        fixed_batch: only look whether the configuration's batch size fits.

    Returns:
        What was found.
    """
    wanted = config.training.batch_size
    fixed = fixed_bytes(config)

    def estimate(checkpointing: bool) -> float:
        training = dataclasses.replace(config.training, activation_checkpointing=checkpointing)
        return activation_bytes(dataclasses.replace(config, training=training), worst)

    def most(per_image: float) -> int:
        return max(0, int((limit_bytes - fixed) / max(per_image, 1.0)))

    checkpointing = config.training.activation_checkpointing
    per_image = estimate(checkpointing)
    if most(per_image) < 1 and not checkpointing:
        checkpointing, per_image = True, estimate(True)
    batch = wanted if fixed_batch else min(wanted, max(1, most(per_image)))
    first_estimate = round(fixed + batch * per_image)
    trials: list[Trial] = []
    good: Trial | None = None
    too_large, failures = wanted + 1, 0
    fits = most(per_image) >= batch
    while trial and len(trials) < _MOST_TRIALS:
        on_trial(f"trial step: {batch} images of {worst.sizes_hw[0][0]} x {worst.sizes_hw[0][1]} px")
        training = dataclasses.replace(config.training, batch_size=batch, activation_checkpointing=checkpointing)
        made = run_trial(dataclasses.replace(config, training=training), worst, batch, limit_bytes)
        trials.append(made)
        fits = made.fits
        if fits:
            good, per_image = made, (made.peak_bytes - fixed) / batch
            larger = min(wanted, too_large - 1, most(per_image))
            if larger <= batch:
                break
            batch = larger
        elif fixed_batch or (batch == 1 and checkpointing):
            break
        elif batch == 1:
            checkpointing, too_large, failures = True, wanted + 1, 0
        else:
            too_large, failures = batch, failures + 1
            batch = (good.batch_size + batch) // 2 if good else batch // 2 if failures == 1 else 1
            if good and batch == good.batch_size:
                break
    if good is not None:  # where the last word was a step too far
        fits, batch = True, good.batch_size
    return MemoryPlan(
        limit_bytes,
        source,
        worst,
        first_estimate,
        batch,
        checkpointing,
        tuple(trials),
        max(most(per_image), batch if fits else 0),
        fits,
    )


def worst_sizes(split: SplitObjects, data: DataConfig) -> tuple[tuple[int, int], ...]:
    """The largest inputs of a training: that of most pixels, and, if it is another, that of the other orientation."""
    short_side = max(data.train_short_sides)
    shapes = {(data.tile_px, data.tile_px)} if data.tile_px else set(map(tuple, split.image_hw.tolist()))
    if data.crop_short_sides:
        low, high = data.crop_range
        shapes |= {(low, high), (high, low), (high, high)}
    found = {resize_hw(shape, short_side, data.train_long_side) for shape in shapes or {(short_side, short_side)}}
    if data.quarter_turns:
        found |= {(width, height) for height, width in found}
    largest = max(found, key=lambda hw: (hw[0] * hw[1], hw[1]))
    height, width = largest
    other = [hw for hw in found if (hw[0] > hw[1]) != (height > width) and hw[0] != hw[1] and height != width]
    return (largest, max(other, key=lambda hw: hw[0] * hw[1])) if other else (largest,)
