/* The recurrence of Attention Free Transformers and of RWKV-4: one token after the other, as its PyTorch form has it. */
#include "common.h"

/* out [rows, S]: out[d] = u_t . v_{t-d}, for the positions t. */
struct factorised_bias {
    const i64 *positions;     /* [rows] */
    const float *query, *key; /* u, v [positions, R] */
    float *out;
    i64 window, rank; /* S, R */
};

void factorised_bias(const void *args, i64 rows, int thread, int n_threads) {
    const struct factorised_bias *o = args;
    i64 window = o->window, rank = o->rank, begin, end;
    share(rows * window, thread, n_threads, &begin, &end);
    for (i64 i = begin; i < end; i++) {
        i64 position = o->positions[i / window], other = position - i % window;
        o->out[i] = dot(o->query + position * rank, o->key + (other < 0 ? 0 : other) * rank, rank);
    }
}

/* The state of one row, and the query, key and value that come. */
struct row {
    i64 n_key, d_key, n_window, slot;  /* slot: of the ring, to be replaced */
    const float *bias;                 /* by distance */
    i64 bias_stride;                   /* between distances: n_key, or 1 if all keys share the bias */
    const float *key, *value;
    const float *decay, *scale, *change; /* of each key, if the sums decay */
    float *reference, *sums, *compensation, *keys, *values;
};

INLINE float bounded(float key) { return lowest(highest(key, -LARGEST_KEY), LARGEST_KEY); }

INLINE const float *bias_of(const struct row *r, i64 h, i64 j) {
    i64 distance = r->slot > j ? r->slot - j : r->slot + r->n_window - j;
    return r->bias + distance * r->bias_stride + (r->bias_stride == 1 ? 0 : h);
}

/* exp(key + bias) of keys h .. h+n-1 relative to the largest: weights [W, KEY_BLOCK] of the window, own of the token
 * itself, carried of the running sums. A key is taken relative to the largest first: k + w alone would round
 * to 1e-5 at |k| = 200, and so would the difference to a key that jumps up later. */
INLINE void weigh(const struct row *r, i64 h, i64 n, float *weights, float *own, float *carried) {
    float top[KEY_BLOCK], peak[KEY_BLOCK];
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
        float *logits = weights + j * KEY_BLOCK;
        if (step) for (i64 i = 0; i < n; i++) logits[i] = (keys[i] - top[i]) + w[i];
        else for (i64 i = 0; i < n; i++) logits[i] = (keys[i] - top[i]) + w[0];
        for (i64 i = 0; i < n; i++) peak[i] = highest(peak[i], logits[i]);
    }
    for (i64 j = 0; j < r->n_window; j++)
        for (i64 i = 0; i < n; i++) weights[j * KEY_BLOCK + i] = expf_(weights[j * KEY_BLOCK + i] - peak[i]);
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
    float denominator[KEY_BLOCK];
    i64 width = r->d_key;
    for (i64 i = 0; i < n; i++) denominator[i] = own[i] + carried[i] * total(r, h + i, width);
    for (i64 j = 0; j < r->n_window; j++)
        for (i64 i = 0; i < n; i++) denominator[i] += weights[j * KEY_BLOCK + i];
    if (width == 1) {
        for (i64 i = 0; i < n; i++) out[i] = own[i] * r->value[h + i] + carried[i] * total(r, h + i, 0);
        for (i64 j = 0; j < r->n_window; j++) {
            const float *values = r->values + j * r->n_key + h;
            for (i64 i = 0; i < n; i++) out[i] += weights[j * KEY_BLOCK + i] * values[i];
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
            for (i64 j = 0; j < r->n_window; j++) sum += weights[j * KEY_BLOCK + i] * load(values + j * r->n_key * width + d);
            *(vec *)(out + i * width + d) = sum;
        }
        for (; d < width; d++)
            for (i64 j = 0; j < r->n_window; j++) out[i * width + d] += weights[j * KEY_BLOCK + i] * values[j * r->n_key * width + d];
        for (d = 0; d < width; d++) out[i * width + d] /= denominator[i];
    }
}

/* Neumaier: s = s * scale + s * change + added, and what rounding took goes to c. */
INLINE void add_compensated(float *s, float *c, float scale, float change, float added) {
    float scaled = *s * scale, more = added + *s * change, sum = scaled + more, rounded = sum - scaled;
    *c = *c * (scale + change) + ((scaled - (sum - rounded)) + (more - rounded));
    *s = sum;
}

/* What absorbing one token makes of the reference of key i, and the factors of its sums. Sums that have decayed
 * below LOW_SUM get a lower reference, by multiples of the slack. */
INLINE float next_reference(const struct row *r, i64 i, float leaving, float *scale, float *change) {
    float before = r->reference[i], reference = before;
    *change = 0.0f;
    if (!r->decay) {
        if (leaving > before + REFERENCE_SLACK) reference = leaving;
        *scale = expf_(before - reference);
        return reference;
    }
    float decay = r->decay[i], left = r->sums[i * (r->d_key + 1) + r->d_key] * (r->scale[i] + r->change[i]);
    float sinks_by = left < LOW_SUM ? REFERENCE_SLACK * ceilf(decay / REFERENCE_SLACK) : 0.0f;
    float sunk = highest(before - sinks_by, EMPTY_REFERENCE);
    reference = leaving > sunk + REFERENCE_SLACK ? leaving : sunk;
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

/* out [rows, H D] = sigmoid(query) * average; the state becomes the next. Rows are sequences, of one token each, or all
 * rows are tokens of one sequence, one after the other. H keys, D features of each, W tokens in the window.
 */
struct aft {
    const float *query, *key, *value;       /* [rows, H D], [rows, H], [rows, H D]; maybe columns of one tensor */
    const i64 *positions;                   /* [rows] */
    const float *bias;                      /* by distance, [W + 1, H or 1] for all rows, or for each */
    const float *decay_factors;             /* [3, H], decay, scale and change of each key, or none if no sum decays */
    float *reference, *sums, *compensation; /* [sequences, H], and twice [sequences, H, D + 1] */
    float *keys, *values;                   /* [sequences, W, H], [sequences, W, H, D]; none if W is 0 */
    float *scratch;                         /* [threads, W, KEY_BLOCK]; none if W is 0 */
    float *out;
    i64 n_key, d_key, n_window;                /* H, D, W */
    i64 stride;                                /* from row to row of query, key and value */
    i64 bias_row_stride, bias_distance_stride; /* from row to row, or 0; from distance to distance, H or 1 */
    i64 one_sequence;
};

void aft(const void *args, i64 rows, int thread, int n_threads) {
    const struct aft *o = args;
    i64 n_key = o->n_key, d_key = o->d_key, n_window = o->n_window, width = n_key * d_key;
    i64 n_sequences = o->one_sequence ? 1 : rows, n_tokens = o->one_sequence ? rows : 1;
    i64 per_task = n_sequences < n_threads ? (n_key + n_threads - 1) / n_threads : n_key;
    if (per_task > KEY_BLOCK) per_task = KEY_BLOCK;
    i64 n_tasks = (n_key + per_task - 1) / per_task, begin, end;
    share(n_sequences * n_tasks, thread, n_threads, &begin, &end);
    float *weights = o->scratch + thread * n_window * KEY_BLOCK, own[KEY_BLOCK], carried[KEY_BLOCK];
    for (i64 task = begin; task < end; task++) {
        i64 b = task / n_tasks, h = task % n_tasks * per_task, n = n_key - h < per_task ? n_key - h : per_task;
        struct row r = {
            .n_key = n_key, .d_key = d_key, .n_window = n_window, .bias_stride = o->bias_distance_stride,
            .reference = o->reference + b * n_key,
            .sums = o->sums + b * n_key * (d_key + 1),
            .compensation = o->compensation + b * n_key * (d_key + 1),
            .keys = o->keys + b * n_window * n_key,
            .values = o->values + b * n_window * width,
        };
        if (o->decay_factors) {
            r.decay = o->decay_factors;
            r.scale = r.decay + n_key;
            r.change = r.scale + n_key;
        }
        for (i64 row = b * n_tokens; row < (b + 1) * n_tokens; row++) {
            const float *query = o->query + row * o->stride;
            float *out = o->out + row * width;
            r.key = o->key + row * o->stride;
            r.value = o->value + row * o->stride;
            r.slot = n_window ? o->positions[row] % n_window : 0;
            r.bias = o->bias + row * o->bias_row_stride;
            weigh(&r, h, n, weights, own, carried);
            average(&r, h, n, weights, own, carried, out + h * d_key);
            replace_oldest(&r, h, n);
            for (i64 c = h * d_key; c < (h + n) * d_key; c++) out[c] *= sigmoid(query[c]);
        }
    }
}
