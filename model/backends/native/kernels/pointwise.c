/* What stands between matrix products, but for the recurrence. */
#include "common.h"

INLINE void widen(const uint16_t *from, i64 n, float *to) {
    for (i64 i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

/* out [rows, C] = rows of table [V, C], float32 or bfloat16, at ids; plus those of added at positions, if there is one. */
struct embed {
    const i64 *ids, *positions;
    const void *table;
    const float *added;
    float *out;
    i64 width, is_bfloat16; /* width: C; is_bfloat16: of the table */
};

void embed(const void *args, i64 rows, int thread, int n_threads) {
    const struct embed *o = args;
    i64 begin, end;
    share(rows, thread, n_threads, &begin, &end);
    for (i64 b = begin; b < end; b++) {
        float *out = o->out + b * o->width;
        i64 at = o->ids[b] * o->width;
        if (o->is_bfloat16) widen((const uint16_t *)o->table + at, o->width, out);
        else memcpy(out, (const float *)o->table + at, o->width * 4);
        if (o->added) {
            const float *added = o->added + o->positions[b] * o->width;
            for (i64 c = 0; c < o->width; c++) out[c] += added[c];
        }
    }
}

/* out [rows, C] = layer norm of x [rows, C] by weight and bias [C]. */
struct norm {
    const float *x, *weight, *bias;
    float *out;
    i64 width, stride; /* C; from row to row of x */
    double eps;
};

void norm(const void *args, i64 rows, int thread, int n_threads) {
    const struct norm *o = args;
    i64 width = o->width, begin, end;
    share(rows, thread, n_threads, &begin, &end);
    const float *weight = o->weight, *bias = o->bias;
    for (i64 b = begin; b < end; b++) {
        const float *x = o->x + b * o->stride;
        float *out = o->out + b * width;
        float mean = sum_of_squares(x, 0.0f, 0, width) / width;
        float scale = (float)(1.0 / sqrt(sum_of_squares(x, mean, 1, width) / width + o->eps));
        for (i64 c = 0; c < width; c++) out[c] = (x[c] - mean) * scale * weight[c] + bias[c];
    }
}

/* out [M, capacity, C] = mix * x + (1 - mix) * before, for x [rows, C], what came one token before it, and M mixes,
 * mix [M, C]. That came before is last, [C] of each sequence, which the last of x replaces. Rows are sequences, of one
 * token each, or all rows are tokens of one sequence, one after the other.
 */
struct token_shift {
    const float *x, *mix;
    float *last, *out;
    i64 width, n_mixes, capacity, last_stride, one_sequence; /* width: C; last_stride: from sequence to sequence */
};

void token_shift(const void *args, i64 rows, int thread, int n_threads) {
    const struct token_shift *o = args;
    i64 width = o->width, begin, end;
    share(width, thread, n_threads, &begin, &end);
    for (i64 row = 0; row < rows; row++) {
        const float *x = o->x + row * width;
        float *last = o->last + (o->one_sequence ? 0 : row) * o->last_stride;
        const float *before = o->one_sequence && row ? x - width : last;
        for (i64 m = 0; m < o->n_mixes; m++) {
            const float *mix = o->mix + m * width;
            float *out = o->out + (m * o->capacity + row) * width;
            for (i64 c = begin; c < end; c++) out[c] = x[c] * mix[c] + before[c] * (1.0f - mix[c]);
        }
        if (!o->one_sequence || row == rows - 1) memcpy(last + begin, x + begin, (end - begin) * 4);
    }
}

/* out [rows, C] += sigmoid(gate) * x */
struct add_gated {
    const float *gate, *x;
    float *out;
    i64 width; /* C */
};

void add_gated(const void *args, i64 rows, int thread, int n_threads) {
    const struct add_gated *o = args;
    i64 begin, end;
    share(rows * o->width, thread, n_threads, &begin, &end);
    const float *gate = o->gate, *x = o->x;
    float *out = o->out;
    for (i64 i = begin; i < end; i++) out[i] += sigmoid(gate[i]) * x[i];
}
