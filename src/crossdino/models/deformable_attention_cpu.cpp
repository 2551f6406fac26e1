// Multi-scale deformable attention for CPUs: the bilinear gather of deformable_attention.py and its gradients.
//
// Source: Deformable DETR (Zhu et al. 2021), Eq. 3. Built on first use by deformable_cpu.py with the user's own
// compiler and called through ctypes: a plain C interface, no header of torch, so that it compiles in seconds and
// does not depend on torch's version.
//
// The kernel takes either sampling locations and attention weights, or what they are made of: reference points,
// offsets and logits. The latter become locations and weights in registers, one query and head at a time; as tensors
// they would be written and read again by half a dozen operations, which takes as long as the attention itself.
//
// The channels of a head are worked on in vectors of 16; compilers split them where the machine's are shorter.
//
// The value is first packed to (N, heads, L, channels) in a workspace, and its gradient is gathered in the same
// layout: in the original one the rows of a head are 1 KB apart and use one eighth of the cache's sets. With the copy
// the forward pass of 5440 queries takes two thirds of the time.
//
// Results do not depend on the number of threads: each sum is made by one thread in a fixed order.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "deformable_points.h"
#include "deformable_vectors.h"

namespace {

// ---- between (N, L, heads, channels) and (N, heads, L, channels); called by all threads of a parallel region ----

template <typename From, typename To>
inline void copy_row(const From* from, To* to, int64_t channels) {
    for (int64_t channel = 0; channel < channels; channel += kLanes) {
        const int count = static_cast<int>(channels - channel < kLanes ? channels - channel : kLanes);
        store(to + channel, load(from + channel, count), count);
    }
}

template <typename T>
void pack(const T* value, T* packed, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch * tokens; ++row) {
        const int64_t image = row / tokens, token = row % tokens;
        for (int64_t head = 0; head < heads; ++head) {
            T* to = packed + ((image * heads + head) * tokens + token) * channels;
            const T* from = value + (row * heads + head) * channels;
            copy_row(from, to, channels);
        }
    }
}

template <typename T>
void unpack(const float* packed, T* value, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch * tokens; ++row) {
        const int64_t image = row / tokens, token = row % tokens;
        for (int64_t head = 0; head < heads; ++head) {
            const float* from = packed + ((image * heads + head) * tokens + token) * channels;
            T* to = value + (row * heads + head) * channels;
            copy_row(from, to, channels);
        }
    }
}

// ---- forward ----

// The channels [0, 16 * kVectors) of one query and head, or fewer than 16 if kVectors is 0 (`count` then says how many);
// `stride` leads from a token to the next.
template <int kVectors, typename T>
inline void gather(const T* value, int64_t stride, const Points& points, T* output, int count = kLanes) {
    constexpr int kSums = kVectors ? kVectors : 1;
    if (kVectors) count = kLanes;
    // One sum a corner: a single one would wait for its own latency at every addition.
    Floats sums[4][kSums] = {};
    const int32_t* tokens = points.token.data();
    const float* weights = points.scaled.data();
    for (int64_t k = 0; k < points.count; ++k) {
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
            const int64_t token = tokens[corner * points.padded + k];
            if (token < 0) continue;
            const float weight = weights[corner * points.padded + k];
            const T* row = value + token * stride;
            for (int v = 0; v < kSums; ++v) sums[corner][v] += weight * load(row + v * kLanes, count);
        }
    }
    for (int v = 0; v < kSums; ++v) {
        store(output + v * kLanes, (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]), count);
    }
}

template <typename T, typename P>
void forward(const Problem& problem) {
    const int64_t batch = problem.batch, tokens = problem.tokens, heads = problem.heads, channels = problem.channels;
    const int64_t queries = problem.queries;
    const Levels levels(problem);
    const int64_t chunks = (queries + kQueryChunk - 1) / kQueryChunk;
    T* packed_value = static_cast<T*>(problem.workspace);
    T* output = static_cast<T*>(problem.output);
#pragma omp parallel num_threads(problem.threads)
    {
        pack(static_cast<const T*>(problem.value), packed_value, batch, tokens, heads, channels);
        Samples samples(problem, levels);
        Points points(samples.number);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < batch * heads * chunks; ++task) {
            const int64_t image_head = task / chunks, image = image_head / heads, head = image_head % heads;
            const int64_t first = task % chunks * kQueryChunk;
            const int64_t last = first + kQueryChunk < queries ? first + kQueryChunk : queries;
            const T* from = packed_value + image_head * tokens * channels;
            samples.refer(image * queries + first, image * queries + last);
            for (int64_t query = first; query < last; ++query) {
                const int64_t row = image * queries + query;
                samples.read<P>(row, query - first, head);
                points.locate(samples, levels, 0);
                T* to = output + (row * heads + head) * channels;
                int64_t channel = 0;
                for (; channel + 2 * kLanes <= channels; channel += 2 * kLanes) {
                    gather<2>(from + channel, channels, points, to + channel);
                }
                for (; channel + kLanes <= channels; channel += kLanes) {
                    gather<1>(from + channel, channels, points, to + channel);
                }
                if (channel < channels) {
                    gather<0>(from + channel, channels, points, to + channel, static_cast<int>(channels - channel));
                }
            }
        }
    }
}

// ---- backward ----

// Adds to grad_value what the points of one query and head pass on, and leaves the products of the corners' values with
// the output's gradient in `dots`, as four numbers still to be added per point and corner. `kChannels` is the number of
// channels where it is known at compile time, else 0.
template <int kChannels, typename T>
inline void scatter(const T* __restrict value, const T* __restrict grad_output, int64_t channels,
                    const Points& points, float* __restrict grad_value, float* __restrict dots) {
    const int number = kChannels ? kChannels : static_cast<int>(channels);
    const int32_t* tokens = points.token.data();
    const float* weights = points.scaled.data();
    const int64_t count = points.count, padded = points.padded;
    for (int64_t k = 0; k < count; ++k) {
        for (int corner = 0; corner < 4; ++corner) {
            const int32_t token = tokens[corner * padded + k];
            Floats products = {};
            if (token >= 0) {
                const float weight = weights[corner * padded + k];
                const T* row = value + static_cast<int64_t>(token) * number;
                float* grad_row = grad_value + static_cast<int64_t>(token) * number;
                for (int channel = 0; channel < number; channel += kLanes) {
                    const int lanes = number - channel < kLanes ? number - channel : kLanes;
                    const Floats gradient = load(grad_output + channel, lanes);
                    products += load(row + channel, lanes) * gradient;
                    store(grad_row + channel, load(grad_row + channel, lanes) + weight * gradient, lanes);
                }
            }
            const Quad sums = (quarter<0>(products) + quarter<1>(products)) +
                              (quarter<2>(products) + quarter<3>(products));
            std::memcpy(dots + 4 * (4 * k + corner), &sums, sizeof sums);
        }
    }
}

// From the gradients of one query's locations and attention weights, which its row of grad_locations and grad_weights
// holds, to those of its offsets, logits and references.
template <typename P>
void project_gradients(const Problem& problem, Samples& samples, int64_t row) {
    const int64_t number = samples.number, width = problem.levels * problem.coordinates;
    float* grad_reference = problem.grad_references ? problem.grad_references + row * width : nullptr;
    if (grad_reference) std::memset(grad_reference, 0, sizeof(float) * width);
    samples.refer(row, row + 1);
    const float* scale_x = samples.scale_x(0);
    const float* scale_y = samples.scale_y(0);
    for (int64_t head = 0; head < problem.heads; ++head) {
        samples.read<P>(row, 0, head);
        float* grad_pairs = problem.grad_locations + row * problem.location_stride + head * number * 2;
        float* grad_logits = problem.grad_weights + row * problem.weight_stride + head * number;
        Floats products = {};
        for (int64_t k = 0; k < number; k += kLanes) {
            const int count = static_cast<int>(number - k < kLanes ? number - k : kLanes);
            products += load(samples.attention.data() + k, count) * load(grad_logits + k, count);
        }
        const float mean = sum_of(products);
        const float* attention = samples.attention.data();
        for (int64_t k = 0; k < number; ++k) grad_logits[k] = attention[k] * (grad_logits[k] - mean);
        if (grad_reference) {
            const P* offsets =
                static_cast<const P*>(problem.locations) + row * problem.location_stride + head * number * 2;
            const float half = 0.5f / static_cast<float>(problem.points);
            for (int64_t k = 0; k < number; ++k) {
                float* to = grad_reference + k / problem.points * problem.coordinates;
                const float grad_x = grad_pairs[2 * k], grad_y = grad_pairs[2 * k + 1];
                to[0] += grad_x;
                to[1] += grad_y;
                if (problem.coordinates == 4) {
                    to[2] += grad_x * half * load(offsets + 2 * k, 1)[0];
                    to[3] += grad_y * half * load(offsets + 2 * k + 1, 1)[0];
                }
            }
        }
        for (int64_t k = 0; k < number; ++k) {
            grad_pairs[2 * k] *= scale_x[k];
            grad_pairs[2 * k + 1] *= scale_y[k];
        }
    }
}

template <typename T, typename P>
void backward(const Problem& problem) {
    const int64_t batch = problem.batch, tokens = problem.tokens, heads = problem.heads, channels = problem.channels;
    const int64_t queries = problem.queries;
    const Levels levels(problem);
    const int64_t number = problem.levels * problem.points;
    // A task owns its slice of the gradient: one image, one head and, where that makes too few tasks, one level.
    const int64_t groups = batch * heads >= problem.threads ? 1 : problem.levels;
    const int64_t group_points = number / groups;
    const auto scatter_head = channels == 32 ? scatter<32, T> : scatter<0, T>;
    const T* grad_output = static_cast<const T*>(problem.output);
    T* packed_value = static_cast<T*>(problem.workspace);
    float* packed_grad = reinterpret_cast<float*>(packed_value + batch * tokens * heads * channels);
#pragma omp parallel num_threads(problem.threads)
    {
        pack(static_cast<const T*>(problem.value), packed_value, batch, tokens, heads, channels);
#pragma omp for schedule(static)
        for (int64_t image_head = 0; image_head < batch * heads; ++image_head) {
            std::memset(packed_grad + image_head * tokens * channels, 0, sizeof(float) * tokens * channels);
        }
        Samples samples(problem, levels);
        Points points(group_points);
        std::vector<float> partial_dots(16 * group_points), dots(4 * group_points);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < batch * heads * groups; ++task) {
            const int64_t image_head = task / groups, image = image_head / heads, head = image_head % heads;
            const int64_t first = task % groups * group_points;
            const int64_t slice = image_head * tokens * channels;
            const float* width = levels.width.data() + first;
            const float* height = levels.height.data() + first;
            const float* attention = samples.attention.data() + first;
            for (int64_t query = 0; query < queries; ++query) {
                const int64_t row = image * queries + query, place = query % kQueryChunk;
                if (place == 0) samples.refer(row, row + std::min(kQueryChunk, queries - query));
                samples.read<P>(row, place, head);
                points.locate(samples, levels, first);
                scatter_head(packed_value + slice, grad_output + (row * heads + head) * channels, channels, points,
                             packed_grad + slice, partial_dots.data());
                const float* partial = partial_dots.data();
                float* dot = dots.data();
                for (int64_t i = 0; i < 4 * group_points; ++i) {
                    dot[i] = (partial[4 * i] + partial[4 * i + 1]) + (partial[4 * i + 2] + partial[4 * i + 3]);
                }
                const float* corner_weights = points.weight.data();
                const int64_t padded = points.padded;
                float* to_weights = problem.grad_weights + row * problem.weight_stride + head * number + first;
                float* to_locations =
                    problem.grad_locations + row * problem.location_stride + 2 * (head * number + first);
                const float* fractions_x = points.fraction_x.data();
                const float* fractions_y = points.fraction_y.data();
#pragma omp simd
                for (int64_t k = 0; k < group_points; ++k) {
                    const float upper_left = dot[4 * k], upper_right = dot[4 * k + 1];
                    const float lower_left = dot[4 * k + 2], lower_right = dot[4 * k + 3];
                    const float right = fractions_x[k], lower = fractions_y[k];
                    to_weights[k] = corner_weights[k] * upper_left + corner_weights[padded + k] * upper_right +
                                    corner_weights[2 * padded + k] * lower_left +
                                    corner_weights[3 * padded + k] * lower_right;
                    const float slope_x =
                        (1.0f - lower) * (upper_right - upper_left) + lower * (lower_right - lower_left);
                    const float slope_y =
                        (1.0f - right) * (lower_left - upper_left) + right * (lower_right - upper_right);
                    to_locations[2 * k] = attention[k] * width[k] * slope_x;
                    to_locations[2 * k + 1] = attention[k] * height[k] * slope_y;
                }
            }
        }
        unpack(packed_grad, static_cast<T*>(problem.grad_value), batch, tokens, heads, channels);
        if (problem.coordinates) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < batch * queries; ++row) project_gradients<P>(problem, samples, row);
        }
    }
}

}  // namespace

extern "C" {

void crossdino_forward(const Problem* problem) {
    if (problem->value_is_bfloat16) {
        problem->projections_are_bfloat16 ? forward<BFloat16, BFloat16>(*problem) : forward<BFloat16, float>(*problem);
    } else {
        problem->projections_are_bfloat16 ? forward<float, BFloat16>(*problem) : forward<float, float>(*problem);
    }
}

void crossdino_backward(const Problem* problem) {
    if (problem->value_is_bfloat16) {
        problem->projections_are_bfloat16 ? backward<BFloat16, BFloat16>(*problem)
                                          : backward<BFloat16, float>(*problem);
    } else {
        problem->projections_are_bfloat16 ? backward<float, BFloat16>(*problem) : backward<float, float>(*problem);
    }
}
}
