// Vectors of 16 floats for deformable_attention_cpu.cpp: loading, storing, sums, exponentials, with the compilers' own
// vector types (GCC and clang), which they split where the machine's are shorter.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;
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

// ---- sums and exponentials of vectors ----

template <int kIndex>
inline Quad quarter(const Floats& vector) {
    Quad quad;
    std::memcpy(&quad, reinterpret_cast<const char*>(&vector) + kIndex * sizeof quad, sizeof quad);
    return quad;
}

inline float sum_of(const Floats& vector) {
    const Quad sums = (quarter<0>(vector) + quarter<1>(vector)) + (quarter<2>(vector) + quarter<3>(vector));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline float largest_of(const Floats& vector) {
    const Quad a = quarter<0>(vector), b = quarter<1>(vector), c = quarter<2>(vector), d = quarter<3>(vector);
    const Quad ab = a > b ? a : b, cd = c > d ? c : d, all = ab > cd ? ab : cd;
    const float front = all[0] > all[1] ? all[0] : all[1], back = all[2] > all[3] ? all[2] : all[3];
    return front > back ? front : back;
}

// e^x of x <= 0, to about one unit in the last place; NaN stays NaN.
inline Floats exponential(const Floats& x) {
    const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
    // x = n ln 2 + r with |r| <= ln 2 / 2. Conversion cuts towards zero, so that it rounds after 0.5 is taken away.
    const Floats scaled = bounded * 1.44269504f - 0.5f;
    const Integers n = __builtin_convertvector(scaled == scaled ? scaled : Floats{}, Integers);
    const Floats whole = __builtin_convertvector(n, Floats);
    // ln 2 in two parts, the first short enough for exact products.
    const Floats r = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const Integers bits = (n + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? Floats{} : series * power;
}

}  // namespace
