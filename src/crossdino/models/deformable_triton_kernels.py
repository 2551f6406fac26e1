"""The Triton kernels of deformable attention; imported only where they run (see `deformable_triton.py`).

Both kernels give a program some queries of one image and head, and walk over levels and points. Pixels outside the map
are not read and count as zeros; weights are multiplied, never selected, so that a NaN location stays visible.

Arrays are contiguous: value (N, L, heads, channels), locations (N, Q, heads, levels, points, 2) and weights without the
last dimension, both float32, shapes (levels, 2) int32 heights and widths. Offsets are 64 bits wide wherever a product
with the batch, the tokens or the queries enters.
"""

# No `from __future__ import annotations`: Triton reads the annotations of its constants.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _neighbours(location, size):
    """The lower pixel along one axis, and the fraction beyond it in pixels."""
    # One map beyond the border all is zero; the comparisons let NaN through.
    location = tl.where(location < -1.0, -1.0, location)
    location = tl.where(location > 2.0, 2.0, location)
    pixel = location * size - 0.5
    low = tl.floor(pixel)
    # NaN has no integer; its fraction stays NaN.
    return tl.where(low == low, low, 0.0).to(tl.int32), pixel - low


@triton.jit
def forward_kernel(
    value,
    shapes,
    locations,
    weights,
    output,
    tokens,
    queries,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Output (N, Q, heads, channels) in its own dtype, summed in float32."""
    program = tl.program_id(0)
    head = program % HEADS
    blocks = tl.cdiv(queries, BLOCK_QUERIES)
    image = (program // HEADS // blocks).to(tl.int64)
    query = (program // HEADS % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channel = tl.arange(0, BLOCK_CHANNELS)
    alive = query < queries
    item = (image * queries + query) * HEADS + head
    maps = value + (image * tokens * HEADS + head) * CHANNELS + channel[None, :]
    total = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), dtype=tl.float32)
    start = 0
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level)
        width = tl.load(shapes + 2 * level + 1)
        for point in range(POINTS):
            place = item * (LEVELS * POINTS) + level * POINTS + point
            x, x_fraction = _neighbours(tl.load(locations + 2 * place, mask=alive, other=0.0), width)
            y, y_fraction = _neighbours(tl.load(locations + 2 * place + 1, mask=alive, other=0.0), height)
            weight = tl.load(weights + place, mask=alive, other=0.0)
            for corner in tl.static_range(4):
                x_pixel = x + corner % 2
                y_pixel = y + corner // 2
                x_weight = x_fraction if corner % 2 == 1 else 1.0 - x_fraction
                y_weight = y_fraction if corner // 2 == 1 else 1.0 - y_fraction
                inside = alive & (x_pixel >= 0) & (x_pixel < width) & (y_pixel >= 0) & (y_pixel < height)
                row = (start + y_pixel * width + x_pixel).to(tl.int64) * (HEADS * CHANNELS)
                mask = inside[:, None] & (channel < CHANNELS)[None, :]
                pixel = tl.load(maps + row[:, None], mask=mask, other=0.0).to(tl.float32)
                total += (weight * x_weight * y_weight)[:, None] * pixel
        start += height * width
    to = output + item[:, None] * CHANNELS + channel[None, :]
    tl.store(to, total.to(output.dtype.element_ty), mask=alive[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def backward_kernel(
    grad_output,
    value,
    shapes,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    tokens,
    queries,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Adds to `grad_value` (as the value, but float32, zeroed before); writes the other two, float32."""
    program = tl.program_id(0)
    head = program % HEADS
    blocks = tl.cdiv(queries, BLOCK_QUERIES)
    image = (program // HEADS // blocks).to(tl.int64)
    query = (program // HEADS % blocks) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    channel = tl.arange(0, BLOCK_CHANNELS)
    alive = query < queries
    item = (image * queries + query) * HEADS + head
    first = (image * tokens * HEADS + head) * CHANNELS + channel[None, :]
    grad = tl.load(
        grad_output + item[:, None] * CHANNELS + channel[None, :],
        mask=alive[:, None] & (channel < CHANNELS)[None, :],
        other=0.0,
    ).to(tl.float32)
    start = 0
    for level in range(LEVELS):
        height = tl.load(shapes + 2 * level)
        width = tl.load(shapes + 2 * level + 1)
        for point in range(POINTS):
            place = item * (LEVELS * POINTS) + level * POINTS + point
            x, x_fraction = _neighbours(tl.load(locations + 2 * place, mask=alive, other=0.0), width)
            y, y_fraction = _neighbours(tl.load(locations + 2 * place + 1, mask=alive, other=0.0), height)
            weight = tl.load(weights + place, mask=alive, other=0.0)
            grad_weight = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
            slope_x = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
            slope_y = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
            for corner in tl.static_range(4):
                x_pixel = x + corner % 2
                y_pixel = y + corner // 2
                x_weight = x_fraction if corner % 2 == 1 else 1.0 - x_fraction
                y_weight = y_fraction if corner // 2 == 1 else 1.0 - y_fraction
                inside = alive & (x_pixel >= 0) & (x_pixel < width) & (y_pixel >= 0) & (y_pixel < height)
                row = first + (start + y_pixel * width + x_pixel).to(tl.int64)[:, None] * (HEADS * CHANNELS)
                mask = inside[:, None] & (channel < CHANNELS)[None, :]
                pixel = tl.load(value + row, mask=mask, other=0.0).to(tl.float32)
                dot = tl.sum(pixel * grad, axis=1)
                grad_weight += x_weight * y_weight * dot
                slope_x += (dot if corner % 2 == 1 else -dot) * y_weight
                slope_y += (dot if corner // 2 == 1 else -dot) * x_weight
                passed_on = (weight * x_weight * y_weight)[:, None] * grad
                tl.atomic_add(grad_value + row, passed_on, mask=mask, sem="relaxed")
            tl.store(grad_weights + place, grad_weight, mask=alive)
            tl.store(grad_locations + 2 * place, weight * slope_x * width, mask=alive)
            tl.store(grad_locations + 2 * place + 1, weight * slope_y * height, mask=alive)
        start += height * width
