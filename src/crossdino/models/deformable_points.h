// What deformable_attention_cpu.cpp is asked for, and where the points of a query and head lie: from locations and
// weights, or from reference points, offsets and logits, to pixels and their weights.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "deformable_vectors.h"

extern "C" {

// Mirrored by `_Problem` of deformable_cpu.py; arrays are contiguous but for the rows of locations and weights.
struct Problem {
    int64_t batch, tokens, heads, channels, queries, levels, points, threads;
    // Of a reference point: 2 (x, y) or 4 (cx, cy, w, h); 0 where locations and weights are given.
    int64_t coordinates;
    int64_t value_is_bfloat16, projections_are_bfloat16;
    // Elements from one query to the next.
    int64_t location_stride, weight_stride;
    const int64_t* shapes;    // (levels, 2), height and width
    const void* value;        // (N, L, heads, channels), float or bfloat16
    const float* references;  // (N, Q, levels, coordinates)
    const void* locations;    // (N, Q, heads, levels, points, 2): locations, or offsets
    const void* weights;      // (N, Q, heads, levels, points): attention weights, or logits
    void* workspace;          // N * L * heads * channels numbers as the value; backward: and as many floats
    void* output;             // (N, Q, heads, channels), as the value; backward: its gradient
    void* grad_value;         // as the value
    float* grad_locations;    // as locations
    float* grad_weights;      // as weights
    float* grad_references;   // as references, or null
};
}

namespace {

constexpr int64_t kQueryChunk = 128;
// Queries between asking for a row of locations and weights, and using it.
constexpr int64_t kAhead = 8;

// ---- where the points of one query, head and range of levels lie ----

struct Levels {
    // One entry a point, so that the loop over points has no inner loop over levels; padded for the last vector.
    std::vector<float> width, height;
    std::vector<int32_t> start;

    explicit Levels(const Problem& problem) {
        int64_t first = 0;
        for (int64_t level = 0; level < problem.levels; ++level) {
            const int64_t rows = problem.shapes[2 * level], columns = problem.shapes[2 * level + 1];
            height.insert(height.end(), problem.points, static_cast<float>(rows));
            width.insert(width.end(), problem.points, static_cast<float>(columns));
            start.insert(start.end(), problem.points, static_cast<int32_t>(first));
            first += rows * columns;
        }
        height.resize(height.size() + kLanes, 1.0f);
        width.resize(width.size() + kLanes, 1.0f);
        start.resize(start.size() + kLanes, 0);
    }
};

// All points of one query and head: locations and attention weights, whichever way they are given.
struct Samples {
    const Problem& problem;
    int64_t number, padded;
    std::vector<float> x, y, attention;
    // In vectors of points, of each query of a chunk: where its offsets start and, for boxes, how long one is.
    std::vector<float> references;
    std::vector<float> pixel_width, pixel_height;

    Samples(const Problem& given, const Levels& levels)
        : problem(given), number(given.levels * given.points), padded((number + kLanes - 1) / kLanes * kLanes),
          x(padded + kLanes), y(padded + kLanes), attention(padded + kLanes),
          references(kQueryChunk * given.coordinates * padded), pixel_width(padded), pixel_height(padded) {
        for (int64_t k = 0; k < number; ++k) {
            pixel_width[k] = 1.0f / levels.width[k];
            pixel_height[k] = 1.0f / levels.height[k];
        }
    }

    // Spreads the references of the rows [first, last) over the points, once for all: a vector that is read just after
    // its quarters were written waits for them.
    void refer(int64_t first, int64_t last) {
        if (!problem.coordinates) return;
        for (int64_t row = first; row < last; ++row) {
            if (problem.points == 4) {
                spread<4>(row, row - first);
            } else {
                spread<0>(row, row - first);
            }
        }
    }

    template <int kPoints>
    void spread(int64_t row, int64_t place) {
        const int64_t points = kPoints ? kPoints : problem.points, coordinates = problem.coordinates;
        const float* from = problem.references + row * problem.levels * coordinates;
        // Offsets are in halves of the box, divided by the number of points.
        const float factors[4] = {1.0f, 1.0f, 0.5f / static_cast<float>(points), 0.5f / static_cast<float>(points)};
        for (int64_t coordinate = 0; coordinate < coordinates; ++coordinate) {
            float* to = references.data() + (place * coordinates + coordinate) * padded;
            for (int64_t level = 0; level < problem.levels; ++level) {
                const float number = from[level * coordinates + coordinate] * factors[coordinate];
                for (int64_t point = 0; point < points; ++point) to[level * points + point] = number;
            }
        }
    }

    const float* centre(int64_t place) const { return references.data() + place * problem.coordinates * padded; }
    const float* scale_x(int64_t place) const {
        return problem.coordinates == 4 ? centre(place) + 2 * padded : pixel_width.data();
    }
    const float* scale_y(int64_t place) const {
        return problem.coordinates == 4 ? centre(place) + 3 * padded : pixel_height.data();
    }

    // `place`: of the row in the chunk that `refer` was called for.
    template <typename P>
    void read(int64_t row, int64_t place, int64_t head) {
        const P* pairs = static_cast<const P*>(problem.locations) + row * problem.location_stride + head * number * 2;
        const P* factors = static_cast<const P*>(problem.weights) + row * problem.weight_stride + head * number;
        // The same head of another query is more than a kilobyte away, further than processors fetch on their own.
        fetch(pairs + kAhead * problem.location_stride, 2 * number);
        fetch(factors + kAhead * problem.weight_stride, number);
        if (number == padded) {
            read_vectors<true>(pairs, factors, place);
        } else {
            read_vectors<false>(pairs, factors, place);
        }
    }

    template <typename P>
    static void fetch(const P* from, int64_t count) {
        constexpr int64_t kLine = 64 / sizeof(P);
        for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
    }

    template <bool kWhole, typename P>
    void read_vectors(const P* pairs, const P* factors, int64_t place) {
        const bool projected = problem.coordinates != 0;
        const float* centre_x = centre(place);
        const float* centre_y = centre_x + padded;
        const float* width = scale_x(place);
        const float* height = scale_y(place);
        for (int64_t k = 0; k < number; k += kLanes) {
            const int count = lanes_at<kWhole>(k);
            const int in_front = 2 * count < kLanes ? 2 * count : kLanes;
            const Floats front = load(pairs + 2 * k, in_front);
            const Floats back = load(pairs + 2 * k + in_front, 2 * count - in_front);
            Floats new_x = even_lanes(front, back), new_y = odd_lanes(front, back);
            if (projected) {
                new_x = load(centre_x + k, kLanes) + new_x * load(width + k, kLanes);
                new_y = load(centre_y + k, kLanes) + new_y * load(height + k, kLanes);
            } else {
                store(attention.data() + k, load(factors + k, count), kLanes);
            }
            store(x.data() + k, new_x, kLanes);
            store(y.data() + k, new_y, kLanes);
        }
        if (projected) softmax<kWhole>(factors);
    }

    template <bool kWhole>
    int lanes_at(int64_t k) const {
        return kWhole || number - k >= kLanes ? kLanes : static_cast<int>(number - k);
    }

    template <bool kWhole, typename P>
    Floats logits_at(const P* logits, int64_t k) const {
        const int count = lanes_at<kWhole>(k);
        const Floats vector = load(logits + k, count);
        if (kWhole) return vector;
        const Integers lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return lanes < count ? vector : Floats{} - INFINITY;
    }

    template <bool kWhole, typename P>
    void softmax(const P* logits) {
        Floats largest = logits_at<kWhole>(logits, 0);
        for (int64_t k = kLanes; k < number; k += kLanes) {
            const Floats vector = logits_at<kWhole>(logits, k);
            largest = vector > largest ? vector : largest;
        }
        const float top = largest_of(largest);
        Floats sums = {};
        for (int64_t k = 0; k < number; k += kLanes) {
            const Floats power = exponential(logits_at<kWhole>(logits, k) - top);
            sums += power;
            store(attention.data() + k, power, kLanes);
        }
        const float factor = 1.0f / sum_of(sums);
        for (int64_t k = 0; k < number; k += kLanes) {
            store(attention.data() + k, load(attention.data() + k, kLanes) * factor, kLanes);
        }
    }
};

// A coordinate in pixels, split into its lower neighbour and the fraction beyond it.
struct Axis {
    Integers low;
    Floats fraction;

    Axis(Floats location, const Floats& size) {
        // One map beyond the border all is zero; the comparisons let NaN through.
        location = location < -1.0f ? Floats{} - 1.0f : location;
        location = location > 2.0f ? Floats{} + 2.0f : location;
        const Floats pixel = location * size - 0.5f;
        // NaN has no integer; its weights stay NaN.
        const Floats number = pixel == pixel ? pixel : Floats{};
        const Floats truncated = __builtin_convertvector(__builtin_convertvector(number, Integers), Floats);
        const Floats floor = truncated > number ? truncated - 1.0f : truncated;
        low = __builtin_convertvector(floor, Integers);
        fraction = pixel - floor;
    }
};

struct Points {
    // Corner c = 2 * (lower row) + (right column) of point k is at [c * padded + k]; token -1 is outside the map.
    int64_t count, padded;
    std::vector<int32_t> token;
    // The corners' bilinear weights, and the same times the point's attention.
    std::vector<float> weight, scaled;
    std::vector<float> fraction_x, fraction_y;

    explicit Points(int64_t number)
        : count(number), padded((number + kLanes - 1) / kLanes * kLanes), token(4 * padded), weight(4 * padded),
          scaled(4 * padded), fraction_x(padded), fraction_y(padded) {}

    // The samples [first, first + count).
    void locate(const Samples& samples, const Levels& levels, int64_t first) {
        for (int64_t k = 0; k < padded; k += kLanes) {
            const Floats width = load(levels.width.data() + first + k, kLanes);
            const Floats height = load(levels.height.data() + first + k, kLanes);
            const Integers columns = __builtin_convertvector(width, Integers);
            const Integers rows = __builtin_convertvector(height, Integers);
            Integers start;
            std::memcpy(&start, levels.start.data() + first + k, sizeof start);
            Axis x(load(samples.x.data() + first + k, kLanes), width);
            Axis y(load(samples.y.data() + first + k, kLanes), height);
            // A point with a NaN must read some pixel, so that the NaN is seen.
            x.low = y.fraction == y.fraction ? x.low : Integers{};
            y.low = x.fraction == x.fraction ? y.low : Integers{};
            // Negative where a pixel is outside: signs instead of comparisons, which GCC would take apart lane by lane.
            const Integers outside_x[2] = {x.low | (columns - 1 - x.low), (x.low + 1) | (columns - 2 - x.low)};
            const Integers outside_y[2] = {y.low | (rows - 1 - y.low), (y.low + 1) | (rows - 2 - y.low)};
            const Integers first_token = start + y.low * columns + x.low;
            const Floats weight_x[2] = {1.0f - x.fraction, x.fraction};
            const Floats weight_y[2] = {1.0f - y.fraction, y.fraction};
            const Floats factor = load(samples.attention.data() + first + k, kLanes);
            for (int corner = 0; corner < 4; ++corner) {
                const int right = corner % 2, lower = corner / 2;
                const Integers tokens = (first_token + right + (lower ? columns : Integers{})) |
                                        ((outside_x[right] | outside_y[lower]) >> 31);
                std::memcpy(token.data() + corner * padded + k, &tokens, sizeof tokens);
                const Floats bilinear = weight_x[right] * weight_y[lower];
                store(weight.data() + corner * padded + k, bilinear, kLanes);
                store(scaled.data() + corner * padded + k, bilinear * factor, kLanes);
            }
            store(fraction_x.data() + k, x.fraction, kLanes);
            store(fraction_y.data() + k, y.fraction, kLanes);
        }
    }
};

}  // namespace
