/* Products with matrices, whose weights come in several formats. */
#include "common.h"

#if defined(__AVX512F__)
enum { MAX_TILE = 12 };
#elif defined(__AVX2__)
enum { MAX_TILE = 6 };
#else
enum { MAX_TILE = 8 };
#endif
enum { PANEL = 2 * LANES };            /* columns of a matrix that lie together */
enum { ROW_BLOCK_BYTES = 256 * 1024 }; /* of inputs that are used again from the cache */

i64 panel_width(void) { return PANEL; }

typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

/* x Phi(x), with erf by Abramowitz and Stegun 7.1.26, error below 1.5e-7. */
INLINE float gelu(float x) {
    float z = (x < 0 ? -x : x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * p * expf_(-z * z); /* Phi(-|x|) */
    return x * (x < 0 ? tail : 1.0f - tail);
}

INLINE vec load_int8(const int8_t *from) {
#if defined(__AVX512F__) /* what __builtin_convertvector does one by one */
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    return __builtin_convertvector(*(const bytes *)from, vec);
#endif
}

/* A bfloat16 is the upper half of a float. */
INLINE vec load_bfloat16(const uint16_t *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    return (vec)(__builtin_convertvector(*(const halves *)from, words) << 16);
#endif
}

/* out [rows, N] = activation(x [rows, K] W^T * scale + bias), or that added to out. */
struct linear {
    const float *x;
    const void *panels;        /* [N / PANEL, K, PANEL], W^T in the format that the kernel is named after */
    const float *scale, *bias; /* [N] each, or none */
    float *out;
    i64 n, k, stride, out_stride; /* strides: from row to row of x and of out */
    i64 activation, adds;
};

/* One panel's products with n_rows <= MAX_TILE rows of x: out [n_rows, PANEL]. */
typedef void tile(int n_rows, const float *x, i64 stride, const void *panels, i64 panel, i64 k, float *out);

static void multiply(const struct linear *o, i64 rows, int thread, int n_threads, tile *of_panel) {
    i64 n = o->n, k = o->k, stride = o->stride, out_stride = o->out_stride, activation = o->activation, adds = o->adds;
    const float *x = o->x, *scale = o->scale, *bias = o->bias;
    float *outputs = o->out;
    i64 begin, end, block = ROW_BLOCK_BYTES / (4 * k) / MAX_TILE * MAX_TILE;
    if (block < MAX_TILE) block = MAX_TILE;
    share((n + PANEL - 1) / PANEL, thread, n_threads, &begin, &end);
    float sums[MAX_TILE * PANEL];
    for (i64 first = 0; first < rows; first += block) {
        i64 last = first + block < rows ? first + block : rows;
        for (i64 panel = begin; panel < end; panel++) {
            i64 column = panel * PANEL, width = n - column < PANEL ? n - column : PANEL;
            for (i64 row = first; row < last; row += MAX_TILE) {
                int n_rows = (int)(last - row < MAX_TILE ? last - row : MAX_TILE);
                of_panel(n_rows, x + row * stride, stride, o->panels, panel, k, sums);
                for (int i = 0; i < n_rows; i++) {
                    float *y = sums + i * PANEL, *out = outputs + (row + i) * out_stride + column;
                    if (scale) for (i64 c = 0; c < width; c++) y[c] *= scale[column + c];
                    if (bias) for (i64 c = 0; c < width; c++) y[c] += bias[column + c];
                    if (activation == ACTIVATION_GELU) for (i64 c = 0; c < width; c++) y[c] = gelu(y[c]);
                    if (activation == ACTIVATION_RELU_SQUARED) for (i64 c = 0; c < width; c++) y[c] = y[c] > 0 ? y[c] * y[c] : 0;
                    if (adds) for (i64 c = 0; c < width; c++) out[c] += y[c];
                    else for (i64 c = 0; c < width; c++) out[c] = y[c];
                }
            }
        }
    }
}

#define CASE(name, n)                                                                                                 \
    case n: name##_tile_of(n, x, stride, w, k, out); break;
#define SIX_CASES(name) CASE(name, 1) CASE(name, 2) CASE(name, 3) CASE(name, 4) CASE(name, 5) CASE(name, 6)
#if defined(__AVX512F__)
#define CASES(name) SIX_CASES(name) CASE(name, 7) CASE(name, 8) CASE(name, 9) CASE(name, 10) CASE(name, 11) CASE(name, 12)
#elif defined(__AVX2__)
#define CASES(name) SIX_CASES(name)
#else
#define CASES(name) SIX_CASES(name) CASE(name, 7) CASE(name, 8)
#endif

/* The kernel linear_<name>, for weights that `read` loads LANES of as floats. */
#define FORMAT(name, element, read)                                                                                   \
    INLINE void name##_tile_of(const int n_rows, const float *x, i64 stride, const element *w, i64 k, float *out) {   \
        vec left[MAX_TILE], right[MAX_TILE];                                                                          \
        _Pragma("GCC unroll 12") for (int i = 0; i < n_rows; i++) left[i] = right[i] = (vec){0};                      \
        for (i64 p = 0; p < k; p++) {                                                                                 \
            vec w_left = read(w + p * PANEL), w_right = read(w + p * PANEL + LANES);                                  \
            _Pragma("GCC unroll 12") for (int i = 0; i < n_rows; i++) {                                               \
                left[i] += x[i * stride + p] * w_left;                                                                \
                right[i] += x[i * stride + p] * w_right;                                                              \
            }                                                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 12") for (int i = 0; i < n_rows; i++) {                                                   \
            *(vec *)(out + i * PANEL) = left[i];                                                                      \
            *(vec *)(out + i * PANEL + LANES) = right[i];                                                             \
        }                                                                                                             \
    }                                                                                                                 \
    static void name##_tile(int n_rows, const float *x, i64 stride, const void *panels, i64 panel, i64 k,             \
                            float *out) {                                                                             \
        const element *w = (const element *)panels + panel * k * PANEL;                                               \
        switch (n_rows) { CASES(name) }                                                                               \
    }                                                                                                                 \
    void linear_##name(const void *args, i64 rows, int thread, int n_threads) {                                       \
        multiply(args, rows, thread, n_threads, name##_tile);                                                         \
    }

FORMAT(float32, float, load)
FORMAT(bfloat16, uint16_t, load_bfloat16)
FORMAT(int8, int8_t, load_int8)
