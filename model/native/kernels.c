/* A model's pass as a list of operations on float32, run by all threads together.
 *
 * Rows are tokens: the next one of each sequence of a batch, or many of one sequence. What is computed for a token
 * depends neither on what else is computed with it nor on how a text is cut: every sum is taken in one fixed order.
 * Python (runner.py, linear.py) writes the list; see `struct op`.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, MAX_TILE = 12 };
#elif defined(__AVX2__)
enum { LANES = 8, MAX_TILE = 6 };
#else
enum { LANES = 4, MAX_TILE = 8 };
#endif
enum { PANEL = 2 * LANES };            /* columns of a matrix that lie together */
enum { ROW_BLOCK_BYTES = 256 * 1024 }; /* of inputs that are used again from the cache */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int64_t i64;
#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE()
#endif

enum kind { EMBED, NORM, LINEAR, FACTORISED_BIAS, AFT, TOKEN_SHIFT, ADD_GATED };
enum format { FLOAT32, INT8, BFLOAT16 }; /* of a matrix */
enum activation { NONE, GELU, RELU_SQUARED };

/* What the fields mean is said at each operation. `in`, `out`: [rows, ...] with a stride in elements. */
struct op {
    i64 kind;
    i64 n[7];
    const void *in, *in2;
    const void *weights[4];
    void *out;
    void *state[6];
    double eps;
};

i64 panel_width(void) { return PANEL; }

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

/* x Phi(x), with erf by Abramowitz and Stegun 7.1.26, error below 1.5e-7. */
INLINE float gelu(float x) {
    float z = (x < 0 ? -x : x) * 0.70710678f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * p * expf_(-z * z); /* Phi(-|x|) */
    return x * (x < 0 ? tail : 1.0f - tail);
}

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE vec load_as_float(const int8_t *from) {
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

INLINE void widen(const uint16_t *from, i64 n, float *to) {
    for (i64 i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

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

/* EMBED: rows of weights[0] [V, C] at in [rows] int64; plus rows of weights[1] at in2 [rows] int64, if given.
 * n: C, format of weights[0], FLOAT32 or BFLOAT16
 */
static void embed(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 width = op->n[0], begin, end;
    share(rows, thread, n_threads, &begin, &end);
    for (i64 b = begin; b < end; b++) {
        float *out = (float *)op->out + b * width;
        i64 at = ((const i64 *)op->in)[b] * width;
        if (op->n[1] == BFLOAT16) widen((const uint16_t *)op->weights[0] + at, width, out);
        else memcpy(out, (const float *)op->weights[0] + at, width * 4);
        if (op->weights[1]) {
            const float *added = (const float *)op->weights[1] + ((const i64 *)op->in2)[b] * width;
            for (i64 c = 0; c < width; c++) out[c] += added[c];
        }
    }
}

/* NORM: layer norm of in [rows, C] by weights[0], weights[1]. n: C */
static void norm(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 width = op->n[0], begin, end;
    share(rows, thread, n_threads, &begin, &end);
    const float *weight = op->weights[0], *bias = op->weights[1];
    for (i64 b = begin; b < end; b++) {
        const float *x = (const float *)op->in + b * width;
        float *out = (float *)op->out + b * width;
        float mean = sum_of_squares(x, 0.0f, 0, width) / width;
        float scale = (float)(1.0 / sqrt(sum_of_squares(x, mean, 1, width) / width + op->eps));
        for (i64 c = 0; c < width; c++) out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
    }
}

/* n_rows x PANEL outputs: products of rows of x with a panel w [k, PANEL]. */
#define TILE(name, element, read)                                                                                     \
    INLINE void name(const int n_rows, const float *x, i64 stride, const element *w, i64 k, float *out) {             \
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
    }
TILE(float_tile, float, load)
TILE(int8_tile, int8_t, load_as_float)
TILE(bfloat16_tile, uint16_t, load_bfloat16)

static void tile(int n_rows, const float *x, i64 stride, const void *weights, i64 panel, i64 k, i64 format, float *out) {
    i64 start = panel * k * PANEL;
#define CASE(n)                                                                                                       \
    case n:                                                                                                           \
        if (format == INT8) int8_tile(n, x, stride, (const int8_t *)weights + start, k, out);                         \
        else if (format == BFLOAT16) bfloat16_tile(n, x, stride, (const uint16_t *)weights + start, k, out);          \
        else float_tile(n, x, stride, (const float *)weights + start, k, out);                                        \
        break;
    switch (n_rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if !defined(__AVX2__) || defined(__AVX512F__)
        CASE(7) CASE(8)
#endif
#if defined(__AVX512F__)
        CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

/* LINEAR: out [rows, N] = activation(in [rows, K] W^T * scale + bias), or that added to out.
 * weights: W in panels [N / PANEL, K, PANEL]; scale [N] of int8; bias [N] or none.
 * n: N, K, strides of in and out, activation, format of W, whether to add
 */
static void linear(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 n = op->n[0], k = op->n[1], stride = op->n[2], out_stride = op->n[3];
    i64 activation = op->n[4], format = op->n[5], adds = op->n[6];
    const float *scale = op->weights[1], *bias = op->weights[2];
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
                tile(n_rows, (const float *)op->in + row * stride, stride, op->weights[0], panel, k, format, sums);
                for (int i = 0; i < n_rows; i++) {
                    float *y = sums + i * PANEL, *out = (float *)op->out + (row + i) * out_stride + column;
                    if (scale) for (i64 c = 0; c < width; c++) y[c] *= scale[column + c];
                    if (bias) for (i64 c = 0; c < width; c++) y[c] += bias[column + c];
                    if (activation == GELU) for (i64 c = 0; c < width; c++) y[c] = gelu(y[c]);
                    if (activation == RELU_SQUARED) for (i64 c = 0; c < width; c++) y[c] = y[c] > 0 ? y[c] * y[c] : 0;
                    if (adds) for (i64 c = 0; c < width; c++) out[c] += y[c];
                    else for (i64 c = 0; c < width; c++) out[c] = y[c];
                }
            }
        }
    }
}

/* FACTORISED_BIAS: out [rows, S], out[d] = u_t . v_{t-d}, for t = in [rows] int64. weights: u, v [positions, R].
 * n: S, R
 */
static void factorised_bias(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 window = op->n[0], rank = op->n[1], begin, end;
    share(rows * window, thread, n_threads, &begin, &end);
    for (i64 i = begin; i < end; i++) {
        i64 position = ((const i64 *)op->in)[i / window], other = position - i % window;
        const float *u = (const float *)op->weights[0] + position * rank;
        const float *v = (const float *)op->weights[1] + (other < 0 ? 0 : other) * rank;
        ((float *)op->out)[i] = dot(u, v, rank);
    }
}

/* The state of one row, and the query, key and value that come. */
struct row {
    i64 n_key, d_key, n_window, slot;  /* slot: of the ring, to be replaced */
    const float *bias;                 /* by distance */
    i64 bias_stride;                   /* between distances: n_key, or 1 if all keys share the bias */
    const float *key, *value;
    const float *decay, *scale, *change; /* ops.decay_factors */
    float *reference, *sums, *compensation, *keys, *values;
};

enum { BLOCK = 64 }; /* keys that are taken together, side by side in vectors */
enum { SLACK = 16 }; /* REFERENCE_SLACK of ops.py; the others are called there as here */
static const float LARGEST_KEY = 1e38f, EMPTY_REFERENCE = -3.40282347e38f, LOW = 1.12535175e-7f;
INLINE float bounded(float key) { return lowest(highest(key, -LARGEST_KEY), LARGEST_KEY); }

INLINE const float *bias_of(const struct row *r, i64 h, i64 j) {
    i64 distance = r->slot > j ? r->slot - j : r->slot + r->n_window - j;
    return r->bias + distance * r->bias_stride + (r->bias_stride == 1 ? 0 : h);
}

/* exp(key + bias) of keys h .. h+n-1 relative to the largest: weights [W, BLOCK] of the window, own of the token
 * itself, carried of the running sums. A key is taken relative to the largest first, as in ops.py. */
INLINE void weigh(const struct row *r, i64 h, i64 n, float *weights, float *own, float *carried) {
    float top[BLOCK], peak[BLOCK];
    const float *reference = r->reference + h, *bias = r->bias + (r->bias_stride == 1 ? 0 : h);
    i64 step = r->bias_stride != 1; /* along the keys */
    for (i64 i = 0; i < n; i++) top[i] = highest(bounded(r->key[h + i]), reference[i]);
    for (i64 j = 0; j < r->n_window; j++) {
        const float *keys = r->keys + j * r->n_key + h;
        for (i64 i = 0; i < n; i++) top[i] = highest(top[i], keys[i]);
    }
    for (i64 i = 0; i < n; i++) {
        own[i] = (bounded(r->key[h + i]) - top[i]) + bias[i * step];
        carried[i] = reference[i] - top[i];
        peak[i] = highest(own[i], carried[i]);
    }
    for (i64 j = 0; j < r->n_window; j++) {
        const float *keys = r->keys + j * r->n_key + h, *w = bias_of(r, h, j);
        float *logits = weights + j * BLOCK;
        if (step) for (i64 i = 0; i < n; i++) logits[i] = (keys[i] - top[i]) + w[i];
        else for (i64 i = 0; i < n; i++) logits[i] = (keys[i] - top[i]) + w[0];
        for (i64 i = 0; i < n; i++) peak[i] = highest(peak[i], logits[i]);
    }
    for (i64 j = 0; j < r->n_window; j++)
        for (i64 i = 0; i < n; i++) weights[j * BLOCK + i] = expf_(weights[j * BLOCK + i] - peak[i]);
    for (i64 i = 0; i < n; i++) own[i] = expf_(own[i] - peak[i]), carried[i] = expf_(carried[i] - peak[i]);
}

/* sums [D + 1] of key h: those of the row, numerators and denominator. */
INLINE float total(const struct row *r, i64 h, i64 d) {
    i64 at = h * (r->d_key + 1) + d;
    return r->sums[at] + r->compensation[at];
}

/* out [n, D]: the weighted averages of the values. */
INLINE void average(const struct row *r, i64 h, i64 n, const float *weights, const float *own, const float *carried,
                    float *out) {
    float denominator[BLOCK];
    i64 width = r->d_key;
    for (i64 i = 0; i < n; i++) denominator[i] = own[i] + carried[i] * total(r, h + i, width);
    for (i64 j = 0; j < r->n_window; j++)
        for (i64 i = 0; i < n; i++) denominator[i] += weights[j * BLOCK + i];
    if (width == 1) {
        for (i64 i = 0; i < n; i++) out[i] = own[i] * r->value[h + i] + carried[i] * total(r, h + i, 0);
        for (i64 j = 0; j < r->n_window; j++) {
            const float *values = r->values + j * r->n_key + h;
            for (i64 i = 0; i < n; i++) out[i] += weights[j * BLOCK + i] * values[i];
        }
        for (i64 i = 0; i < n; i++) out[i] /= denominator[i];
        return;
    }
    for (i64 i = 0; i < n; i++) {
        const float *values = r->values + (h + i) * width, *value = r->value + (h + i) * width;
        for (i64 d = 0; d < width; d++) out[i * width + d] = own[i] * value[d] + carried[i] * total(r, h + i, d);
        i64 d = 0;
        for (; d + LANES <= width; d += LANES) {
            vec sum = load(out + i * width + d);
            for (i64 j = 0; j < r->n_window; j++) sum += weights[j * BLOCK + i] * load(values + j * r->n_key * width + d);
            *(vec *)(out + i * width + d) = sum;
        }
        for (; d < width; d++)
            for (i64 j = 0; j < r->n_window; j++) out[i * width + d] += weights[j * BLOCK + i] * values[j * r->n_key * width + d];
        for (d = 0; d < width; d++) out[i * width + d] /= denominator[i];
    }
}

/* Neumaier: s = s * scale + s * change + added, and what rounding took goes to c. */
INLINE void add_compensated(float *s, float *c, float scale, float change, float added) {
    float scaled = *s * scale, more = added + *s * change, sum = scaled + more, rounded = sum - scaled;
    *c = *c * (scale + change) + ((scaled - (sum - rounded)) + (more - rounded));
    *s = sum;
}

/* ops.absorb for one token: the reference of key i, and the factors of its sums, which may decay. */
INLINE float next_reference(const struct row *r, i64 i, float leaving, float *scale, float *change) {
    float before = r->reference[i], reference = before;
    *change = 0.0f;
    if (!r->decay) {
        if (leaving > before + SLACK) reference = leaving;
        *scale = expf_(before - reference);
        return reference;
    }
    float decay = r->decay[i], left = r->sums[i * (r->d_key + 1) + r->d_key] * (r->scale[i] + r->change[i]);
    float sinks_by = left < LOW ? SLACK * ceilf(decay / SLACK) : 0.0f;
    float sunk = highest(before - sinks_by, EMPTY_REFERENCE);
    reference = leaving > sunk + SLACK ? leaving : sunk;
    if (reference == before) *scale = r->scale[i], *change = r->change[i];
    else *scale = expf_((before - reference) - decay);
    return reference;
}

/* The token takes the slot of the one that leaves the window, which goes into the running sums. */
INLINE void replace_oldest(const struct row *r, i64 h, i64 n) {
    i64 width = r->d_key;
    for (i64 i = h; i < h + n; i++) {
        float key = bounded(r->key[i]);
        float *slot_key = r->keys + r->slot * r->n_key + i, *slot_value = r->values + (r->slot * r->n_key + i) * width;
        float leaving = r->n_window ? *slot_key : key, scale, change;
        const float *value = r->n_window ? slot_value : r->value + i * width;
        float reference = next_reference(r, i, leaving, &scale, &change), weight = expf_(leaving - reference);
        float *sums = r->sums + i * (width + 1), *compensation = r->compensation + i * (width + 1);
        for (i64 d = 0; d < width; d++) add_compensated(sums + d, compensation + d, scale, change, weight * value[d]);
        add_compensated(sums + width, compensation + width, scale, change, weight);
        r->reference[i] = reference;
        if (r->n_window) {
            *slot_key = key;
            for (i64 d = 0; d < width; d++) slot_value[d] = r->value[i * width + d];
        }
    }
}

/* AFT: out [rows, H D] = sigmoid(q) * average, for in [rows, HD + H + HD] = q, k, v; the state becomes the next.
 * The rows are sequences, of one token each, or all rows are tokens of one sequence, one after the other.
 * in2: position [rows] int64; weights[0]: bias by distance, [W + 1, H or 1] for all rows, or one for each;
 * weights[1]: [3, H] decay, scale and change of each key, if the sums decay
 * state: reference [sequences, H], sums and compensation [sequences, H, D + 1], keys [sequences, W, H],
 * values [sequences, W, H, D], scratch [threads, W, BLOCK]
 * n: H, D, W, stride of the bias between rows, between distances, whether it is one sequence
 */
static void aft(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 n_key = op->n[0], d_key = op->n[1], n_window = op->n[2], width = n_key * d_key;
    i64 n_sequences = op->n[5] ? 1 : rows, n_tokens = op->n[5] ? rows : 1;
    i64 per_task = n_sequences < n_threads ? (n_key + n_threads - 1) / n_threads : n_key;
    if (per_task > BLOCK) per_task = BLOCK;
    i64 n_tasks = (n_key + per_task - 1) / per_task, begin, end;
    share(n_sequences * n_tasks, thread, n_threads, &begin, &end);
    float *weights = (float *)op->state[5] + thread * n_window * BLOCK, own[BLOCK], carried[BLOCK];
    for (i64 task = begin; task < end; task++) {
        i64 b = task / n_tasks, h = task % n_tasks * per_task, n = n_key - h < per_task ? n_key - h : per_task;
        struct row r = {
            .n_key = n_key, .d_key = d_key, .n_window = n_window, .bias_stride = op->n[4],
            .reference = (float *)op->state[0] + b * n_key,
            .sums = (float *)op->state[1] + b * n_key * (d_key + 1),
            .compensation = (float *)op->state[2] + b * n_key * (d_key + 1),
            .keys = (float *)op->state[3] + b * n_window * n_key,
            .values = (float *)op->state[4] + b * n_window * width,
        };
        if (op->weights[1]) {
            r.decay = op->weights[1];
            r.scale = r.decay + n_key;
            r.change = r.scale + n_key;
        }
        for (i64 row = b * n_tokens; row < (b + 1) * n_tokens; row++) {
            const float *query = (const float *)op->in + row * (2 * width + n_key);
            float *out = (float *)op->out + row * width;
            r.key = query + width;
            r.value = r.key + n_key;
            r.slot = n_window ? ((const i64 *)op->in2)[row] % n_window : 0;
            r.bias = (const float *)op->weights[0] + row * op->n[3];
            weigh(&r, h, n, weights, own, carried);
            average(&r, h, n, weights, own, carried, out + h * d_key);
            replace_oldest(&r, h, n);
            for (i64 c = h * d_key; c < (h + n) * d_key; c++) out[c] *= sigmoid(query[c]);
        }
    }
}

/* TOKEN_SHIFT: out [M, capacity, C] = mix * in + (1 - mix) * before, for in [rows, C], what came one token before it,
 * and M mixes, weights[0] [M, C]. Rows as of AFT; state[0]: the last token [sequences, S, C], replaced.
 * n: C, M, capacity, S C, whether it is one sequence
 */
static void token_shift(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 width = op->n[0], n_mix = op->n[1], capacity = op->n[2], stride = op->n[3], one_sequence = op->n[4], begin, end;
    share(width, thread, n_threads, &begin, &end);
    for (i64 row = 0; row < rows; row++) {
        const float *x = (const float *)op->in + row * width;
        float *last = (float *)op->state[0] + (one_sequence ? 0 : row) * stride;
        const float *before = one_sequence && row ? x - width : last;
        for (i64 m = 0; m < n_mix; m++) {
            const float *mix = (const float *)op->weights[0] + m * width;
            float *out = (float *)op->out + (m * capacity + row) * width;
            for (i64 c = begin; c < end; c++) out[c] = x[c] * mix[c] + before[c] * (1.0f - mix[c]);
        }
        if (!one_sequence || row == rows - 1) memcpy(last + begin, x + begin, (end - begin) * 4);
    }
}

/* ADD_GATED: out [rows, C] += sigmoid(in) * in2. n: C */
static void add_gated(const struct op *op, i64 rows, int thread, int n_threads) {
    i64 begin, end;
    share(rows * op->n[0], thread, n_threads, &begin, &end);
    const float *gate = op->in, *x = op->in2;
    float *out = op->out;
    for (i64 i = begin; i < end; i++) out[i] += sigmoid(gate[i]) * x[i];
}

static void run_one(const struct op *op, i64 rows, int thread, int n_threads) {
    switch (op->kind) {
        case EMBED: embed(op, rows, thread, n_threads); break;
        case NORM: norm(op, rows, thread, n_threads); break;
        case LINEAR: linear(op, rows, thread, n_threads); break;
        case FACTORISED_BIAS: factorised_bias(op, rows, thread, n_threads); break;
        case AFT: aft(op, rows, thread, n_threads); break;
        case TOKEN_SHIFT: token_shift(op, rows, thread, n_threads); break;
        case ADD_GATED: add_gated(op, rows, thread, n_threads); break;
    }
}

#ifdef _OPENMP
/* Until all threads are here, for whom the counter has gone on to n_arrivals. One that waits for long gives its core to
 * whoever wants it, on a small machine the event loop and clients: OpenMP's own barrier keeps it for milliseconds.
 */
static void barrier(atomic_llong *arrived, i64 n_arrivals, int patience) {
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < n_arrivals) {
        if (patience-- > 0) PAUSE();
        else patience = 0, sched_yield();
    }
}
#endif

void run(const struct op *ops, i64 n_ops, i64 rows, int n_threads) {
#ifdef _OPENMP
    atomic_llong arrived = 0;
    int patience = n_threads > omp_get_num_procs() ? 0 : 2000;
#pragma omp parallel num_threads(n_threads)
    for (i64 i = 0; i < n_ops; i++) {
        run_one(ops + i, rows, omp_get_thread_num(), omp_get_num_threads());
        barrier(&arrived, (i + 1) * omp_get_num_threads(), patience);
    }
#else
    for (i64 i = 0; i < n_ops; i++) run_one(ops + i, rows, 0, 1);
#endif
}
