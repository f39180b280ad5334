/* What kernels are made of. Each is a C function of one signature, beside the structure of its arguments:
 *
 *     void name(const void *args, i64 rows, int thread, int n_threads)
 *
 * computes this thread's share. Rows are tokens: the next one of each sequence of a batch, or many of one sequence.
 * What is computed for a token depends neither on what else is computed with it nor on how a text is cut: every sum is
 * taken in one fixed order. Tensors are contiguous float32 but where a structure says otherwise; strides are in
 * elements. A subclass of `Kernel` in Python has the same fields; macros that nothing here defines come from there, too
 * (compiler.py).
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t i64;
#define INLINE static inline __attribute__((always_inline))

/* A contiguous share of n items. */
INLINE void share(i64 n, int thread, int n_threads, i64 *begin, i64 *end) {
    *begin = n * thread / n_threads;
    *end = n * (thread + 1) / n_threads;
}

INLINE float lowest(float a, float b) { return a < b ? a : b; }
INLINE float highest(float a, float b) { return a > b ? a : b; }

/* exp of anything but NaN, to 2 ulp; below -87 it is 0. A polynomial, so that loops over it become vector code. */
INLINE float expf_(float x) {
    float y = lowest(highest(x, -87.0f), 88.0f);
    float scaled = y * 1.44269504f;
    int n = (int)(scaled + (scaled < 0 ? -0.5f : 0.5f));
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    int32_t bits = (n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf_(-x)); }

INLINE vec load(const float *from) { return *(const vec *)from; }

INLINE float across(vec sums) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

/* Of x [n] - mean if `squared`, and the plain sum of x otherwise. */
INLINE float sum_of_squares(const float *x, float mean, const int squared, i64 n) {
    vec sums = {0};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec d = load(x + i) - mean;
        sums += squared ? d * d : d;
    }
    float sum = across(sums);
    for (; i < n; i++) sum += squared ? (x[i] - mean) * (x[i] - mean) : x[i];
    return sum;
}

INLINE float dot(const float *x, const float *y, i64 n) {
    vec sums = {0};
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(x + i) * load(y + i);
    float sum = across(sums);
    for (; i < n; i++) sum += x[i] * y[i];
    return sum;
}
