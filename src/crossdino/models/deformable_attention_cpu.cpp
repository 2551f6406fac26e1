// Multi-scale deformable attention for CPUs: the bilinear gather of deformable_attention.py and its gradients.
//
// Source: Deformable DETR (Zhu et al. 2021), Eq. 3. Built on first use by deformable_attention.py with the user's own
// compiler and called through ctypes: a plain C interface, no header of torch, so that it compiles in a second and
// does not depend on torch's version.
//
// Arrays are contiguous:
//   value     (N, L, heads, channels)          float or bfloat16
//   locations (N, Q, heads, levels, points, 2) float, x and y in [0, 1] of the level's map
//   weights   (N, Q, heads, levels, points)    float
//   output    (N, Q, heads, channels)          as value
// The channels of a head are worked on in vectors of 16; compilers split them where the machine's are shorter.
//
// The value is first packed to (N, heads, L, channels) floats in a workspace, and its gradient is gathered in the same
// layout: in the original one the rows of a head are 1 KB apart and use one eighth of the cache's sets. With the copy
// the forward pass of 5440 queries takes two thirds of the time.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int64_t kQueryChunk = 256;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));

struct BFloat16 {
    uint16_t bits;
};

// ---- loading and storing up to 16 channels; `count` is kLanes except at the end of an odd number of channels ----

inline Floats load(const float* from, int count) {
    Floats vector = {};
    if (count == kLanes) {
        std::memcpy(&vector, from, sizeof vector);
    } else {
        std::memcpy(&vector, from, sizeof(float) * count);
    }
    return vector;
}

inline Floats load(const BFloat16* from, int count) {
    Halves halves = {};
    if (count == kLanes) {
        std::memcpy(&halves, from, sizeof halves);
    } else {
        std::memcpy(&halves, from, sizeof(BFloat16) * count);
    }
    const Words words = __builtin_convertvector(halves, Words) << 16;
    Floats vector;
    std::memcpy(&vector, &words, sizeof vector);
    return vector;
}

inline void store(float* to, const Floats& vector, int count) {
    if (count == kLanes) {
        std::memcpy(to, &vector, sizeof vector);
    } else {
        std::memcpy(to, &vector, sizeof(float) * count);
    }
}

inline void store(BFloat16* to, const Floats& vector, int count) {
    Words words;
    std::memcpy(&words, &vector, sizeof words);
    // Round to nearest, ties to even; a NaN would overflow into infinity, so it gets its quiet pattern.
    const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
    const auto is_number = vector == vector;
    const Words chosen = is_number ? rounded : (Words{} + 0x7fc0u);
    const Halves halves = __builtin_convertvector(chosen, Halves);
    if (count == kLanes) {
        std::memcpy(to, &halves, sizeof halves);
    } else {
        std::memcpy(to, &halves, sizeof(BFloat16) * count);
    }
}

inline Floats even_lanes(const Floats& front, const Floats& back) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(front, back, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
    return __builtin_shuffle(front, back, Integers{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
#endif
}

inline Floats odd_lanes(const Floats& front, const Floats& back) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(front, back, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    return __builtin_shuffle(front, back, Integers{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#endif
}

// ---- between (N, L, heads, channels) and (N, heads, L, channels); called by all threads of a parallel region ----

template <typename From, typename To>
inline void copy_row(const From* from, To* to, int64_t channels) {
    for (int64_t channel = 0; channel < channels; channel += kLanes) {
        const int count = static_cast<int>(channels - channel < kLanes ? channels - channel : kLanes);
        store(to + channel, load(from + channel, count), count);
    }
}

template <typename T>
void pack(const T* value, float* packed, int64_t batch, int64_t tokens, int64_t heads, int64_t channels) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < batch * tokens; ++row) {
        const int64_t image = row / tokens, token = row % tokens;
        for (int64_t head = 0; head < heads; ++head) {
            float* to = packed + ((image * heads + head) * tokens + token) * channels;
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

// ---- where the points of one query, head and range of levels lie ----

struct Levels {
    // One entry a point, so that the loop over points has no inner loop over levels; padded for the last vector.
    std::vector<float> width, height;
    std::vector<int32_t> start;

    Levels(const int64_t* shapes, int64_t levels, int64_t points) {
        int64_t first = 0;
        for (int64_t level = 0; level < levels; ++level) {
            height.insert(height.end(), points, static_cast<float>(shapes[2 * level]));
            width.insert(width.end(), points, static_cast<float>(shapes[2 * level + 1]));
            start.insert(start.end(), points, static_cast<int32_t>(first));
            first += shapes[2 * level] * shapes[2 * level + 1];
        }
        height.resize(height.size() + kLanes, 1.0f);
        width.resize(width.size() + kLanes, 1.0f);
        start.resize(start.size() + kLanes, 0);
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

    void locate(const float* locations, const float* attention, const Levels& levels, int64_t first) {
        for (int64_t k = 0; k < padded; k += kLanes) {
            const int number = static_cast<int>(count - k < kLanes ? count - k : kLanes);
            const float* pairs = locations + 2 * k;
            float padded_pairs[2 * kLanes] = {};
            if (number < kLanes) {
                std::memcpy(padded_pairs, pairs, sizeof(float) * 2 * number);
                pairs = padded_pairs;
            }
            const Floats front = load(pairs, kLanes), back = load(pairs + kLanes, kLanes);
            const Floats width = load(levels.width.data() + first + k, kLanes);
            const Floats height = load(levels.height.data() + first + k, kLanes);
            const Integers columns = __builtin_convertvector(width, Integers);
            const Integers rows = __builtin_convertvector(height, Integers);
            Integers start;
            std::memcpy(&start, levels.start.data() + first + k, sizeof start);
            Axis x(even_lanes(front, back), width), y(odd_lanes(front, back), height);
            // A point with a NaN must read some pixel, so that the NaN is seen.
            x.low = y.fraction == y.fraction ? x.low : Integers{};
            y.low = x.fraction == x.fraction ? y.low : Integers{};
            const Integers inside_x[2] = {(x.low >= 0) & (x.low < columns), (x.low >= -1) & (x.low < columns - 1)};
            const Integers inside_y[2] = {(y.low >= 0) & (y.low < rows), (y.low >= -1) & (y.low < rows - 1)};
            const Floats weight_x[2] = {1.0f - x.fraction, x.fraction};
            const Floats weight_y[2] = {1.0f - y.fraction, y.fraction};
            const Floats factor = load(attention + k, number);
            for (int corner = 0; corner < 4; ++corner) {
                const int right = corner % 2, lower = corner / 2;
                const Integers place = start + (y.low + lower) * columns + x.low + right;
                const Integers tokens = (inside_x[right] & inside_y[lower]) ? place : (Integers{} - 1);
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

// ---- forward ----

// The channels [0, 16 * kVectors) of one query and head; `stride` leads from a token to the next.
template <int kVectors, typename T>
inline void gather(const float* value, int64_t stride, const Points& points, T* output, int count) {
    // One sum a corner: a single one would wait for its own latency at every addition.
    Floats sums[4][kVectors] = {};
    const int32_t* tokens = points.token.data();
    const float* weights = points.scaled.data();
    for (int64_t k = 0; k < points.count; ++k) {
#pragma GCC unroll 4
        for (int corner = 0; corner < 4; ++corner) {
            const int32_t token = tokens[corner * points.padded + k];
            if (token < 0) continue;
            const float weight = weights[corner * points.padded + k];
            const float* row = value + token * stride;
            for (int v = 0; v < kVectors; ++v) sums[corner][v] += weight * load(row + v * kLanes, count);
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        store(output + v * kLanes, (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]), count);
    }
}

template <typename T>
void forward(const T* value, const int64_t* shapes, const float* locations, const float* weights, T* output,
             float* packed_value, int64_t batch, int64_t tokens, int64_t heads, int64_t channels, int64_t queries,
             int64_t levels, int64_t points_per_level, int threads) {
    const Levels geometry(shapes, levels, points_per_level);
    const int64_t number = levels * points_per_level;
    const int64_t chunks = (queries + kQueryChunk - 1) / kQueryChunk;
#pragma omp parallel num_threads(threads)
    {
        pack(value, packed_value, batch, tokens, heads, channels);
        Points points(number);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < batch * heads * chunks; ++task) {
            const int64_t image_head = task / chunks, image = image_head / heads, head = image_head % heads;
            const int64_t first = task % chunks * kQueryChunk;
            const int64_t last = first + kQueryChunk < queries ? first + kQueryChunk : queries;
            const float* from = packed_value + image_head * tokens * channels;
            for (int64_t query = first; query < last; ++query) {
                const int64_t item = (image * queries + query) * heads + head;
                points.locate(locations + 2 * item * number, weights + item * number, geometry, 0);
                T* to = output + item * channels;
                int64_t channel = 0;
                for (; channel + 2 * kLanes <= channels; channel += 2 * kLanes) {
                    gather<2>(from + channel, channels, points, to + channel, kLanes);
                }
                for (; channel + kLanes <= channels; channel += kLanes) {
                    gather<1>(from + channel, channels, points, to + channel, kLanes);
                }
                if (channel < channels) {
                    gather<1>(from + channel, channels, points, to + channel, static_cast<int>(channels - channel));
                }
            }
        }
    }
}

// ---- backward ----

template <int kIndex>
inline Quad quarter(const Floats& vector) {
    Quad quad;
    std::memcpy(&quad, reinterpret_cast<const char*>(&vector) + kIndex * sizeof quad, sizeof quad);
    return quad;
}

// Adds to grad_value what the points of one query and head pass on, and leaves the products of the corners' values with
// the output's gradient in `dots`, as four numbers still to be added per point and corner. `kChannels` is the number of
// channels where it is known at compile time, else 0.
template <int kChannels, typename T>
inline void scatter(const float* __restrict value, const T* __restrict grad_output, int64_t channels,
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
                const float* row = value + static_cast<int64_t>(token) * number;
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

template <typename T>
void backward(const T* grad_output, const T* value, const int64_t* shapes, const float* locations,
              const float* weights, T* grad_value, float* grad_locations, float* grad_weights, float* packed_value,
              float* packed_grad, int64_t batch, int64_t tokens, int64_t heads, int64_t channels, int64_t queries,
              int64_t levels, int64_t points_per_level, int threads) {
    const Levels geometry(shapes, levels, points_per_level);
    const int64_t number = levels * points_per_level;
    // A task owns its slice of the gradient: one image, one head and, where that makes too few tasks, one level.
    const int64_t groups = batch * heads >= threads ? 1 : levels;
    const int64_t group_points = number / groups;
    const auto scatter_head = channels == 32 ? scatter<32, T> : scatter<0, T>;
#pragma omp parallel num_threads(threads)
    {
        pack(value, packed_value, batch, tokens, heads, channels);
#pragma omp for schedule(static)
        for (int64_t image_head = 0; image_head < batch * heads; ++image_head) {
            std::memset(packed_grad + image_head * tokens * channels, 0, sizeof(float) * tokens * channels);
        }
        Points points(group_points);
        std::vector<float> partial_dots(16 * group_points), dots(4 * group_points);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < batch * heads * groups; ++task) {
            const int64_t image_head = task / groups, image = image_head / heads, head = image_head % heads;
            const int64_t first = task % groups * group_points;
            const int64_t slice = image_head * tokens * channels;
            const float* width = geometry.width.data() + first;
            const float* height = geometry.height.data() + first;
            for (int64_t query = 0; query < queries; ++query) {
                const int64_t item = (image * queries + query) * heads + head;
                const int64_t place = item * number + first;
                const float* attention = weights + place;
                points.locate(locations + 2 * place, attention, geometry, first);
                scatter_head(packed_value + slice, grad_output + item * channels, channels, points,
                             packed_grad + slice, partial_dots.data());
                const float* partial = partial_dots.data();
                float* dot = dots.data();
                for (int64_t i = 0; i < 4 * group_points; ++i) {
                    dot[i] = (partial[4 * i] + partial[4 * i + 1]) + (partial[4 * i + 2] + partial[4 * i + 3]);
                }
                const float* corner_weights = points.weight.data();
                const int64_t padded = points.padded;
                float* to_weights = grad_weights + place;
                float* to_locations = grad_locations + 2 * place;
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
        unpack(packed_grad, grad_value, batch, tokens, heads, channels);
    }
}

}  // namespace

extern "C" {

// The workspace holds N * L * heads * channels floats, twice as many for the backward pass.

void crossdino_forward(int is_bfloat16, const void* value, const int64_t* shapes, const float* locations,
                       const float* weights, void* output, float* workspace, int64_t batch, int64_t tokens,
                       int64_t heads, int64_t channels, int64_t queries, int64_t levels, int64_t points, int threads) {
    if (is_bfloat16) {
        forward(static_cast<const BFloat16*>(value), shapes, locations, weights, static_cast<BFloat16*>(output),
                workspace, batch, tokens, heads, channels, queries, levels, points, threads);
    } else {
        forward(static_cast<const float*>(value), shapes, locations, weights, static_cast<float*>(output), workspace,
                batch, tokens, heads, channels, queries, levels, points, threads);
    }
}

void crossdino_backward(int is_bfloat16, const void* grad_output, const void* value, const int64_t* shapes,
                        const float* locations, const float* weights, void* grad_value, float* grad_locations,
                        float* grad_weights, float* workspace, int64_t batch, int64_t tokens, int64_t heads,
                        int64_t channels, int64_t queries, int64_t levels, int64_t points, int threads) {
    float* packed_grad = workspace + batch * tokens * heads * channels;
    if (is_bfloat16) {
        backward(static_cast<const BFloat16*>(grad_output), static_cast<const BFloat16*>(value), shapes, locations,
                 weights, static_cast<BFloat16*>(grad_value), grad_locations, grad_weights, workspace, packed_grad,
                 batch, tokens, heads, channels, queries, levels, points, threads);
    } else {
        backward(static_cast<const float*>(grad_output), static_cast<const float*>(value), shapes, locations, weights,
                 static_cast<float*>(grad_value), grad_locations, grad_weights, workspace, packed_grad, batch, tokens,
                 heads, channels, queries, levels, points, threads);
    }
}
}
