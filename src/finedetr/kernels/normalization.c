// Batch normalization with the activation and the affine block behind it, forward and backward.
//
//   z = weight · (x - mean) / deviation + bias,   y = scale · act(z) + shift
//
// The map is read twice each way, once for the sums over all pixels and once for the answer; z is never kept. Channels
// are innermost. Where they are fewer than a vector's lanes, one row here is several pixels; `wide` is its length.

#include <omp.h>

#include "vectors.h"

#define UNROLL 4

enum { PLAIN, RELU, SILU };

typedef struct {
    const void *x;  // [pixels, channels]
    int half;       // whether it is bfloat16, and the answer with it
    const float *weight, *bias;
    float scale, shift, epsilon;  // without `affine`, 1 and 0
    int act, affine, channels;
    long pixels;
} Normalization;

static long wide(const Normalization *n) { return n->channels < 16 ? 16 : n->channels; }

static long rows_of(const Normalization *n) { return n->pixels * n->channels / wide(n); }

// rows that are worked on together: few enough for a float to hold their sum well, and for a cache to hold them
static long chunk_of(const Normalization *n) { return 32768 / wide(n) < UNROLL ? UNROLL : 32768 / wide(n); }

// doubles that one thread needs
long normalization_room(const Normalization *n) { return 4 * wide(n); }

static void add_up(double *to, floats x) {
    for (int lane = 0; lane < LANES; lane++) to[lane] += x[lane];
}

// all threads' sums in the first one's room, those of a channel together
static void gather(const Normalization *n, double *room, int threads, int sums) {
    const long row = wide(n), size = normalization_room(n);
    for (int thread = 1; thread < threads; thread++)
        for (long i = 0; i < sums * row; i++) room[i] += room[thread * size + i];
    for (int k = 0; k < sums; k++)
        for (long i = n->channels; i < row; i++) room[k * row + i % n->channels] += room[k * row + i];
}

// a number of each channel for each place of a row
static void spread(const Normalization *n, float *to, const float *from) {
    for (long i = 0; i < wide(n); i++) to[i] = from[i % n->channels];
}

static inline floats sigmoid(floats z) { return 1 / (1 + power_of_two(z * -1.44269504f)); }

static inline floats activated(int act, floats z) {
    if (act == RELU) return choose(z < 0, all(0), z);
    if (act == SILU) return z * sigmoid(z);
    return z;
}

// the slope there
static inline floats slope_at(int act, floats z) {
    if (act == RELU) return choose(z > 0, all(1), all(0));
    if (act == SILU) {
        floats s = sigmoid(z);
        return s * (1 + z * (1 - s));
    }
    return all(1);
}

// out like x; mean and inverse (of the deviation) of each channel; running statistics as torch keeps them
void normalization_forward(const Normalization *n, void *out, float *mean, float *inverse, float *running_mean,
                           float *running_variance, float momentum, double *room, int threads) {
    const long row = wide(n), rows = rows_of(n), chunk = chunk_of(n), size = normalization_room(n);
    float origin[row], factor[row], addend[row];
    for (long i = 0; i < n->channels; i++) mean[i] = single(n->x, n->half, i);
    spread(n, origin, mean);  // sums are taken from the first pixel on, so that none is a difference of large ones
    memset(room, 0, threads * size * sizeof(double));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < rows; first += chunk) {
        double *sums = room + omp_get_thread_num() * size;
        const long stop = first + chunk < rows ? first + chunk : rows;
        for (long c = 0; c < row; c += LANES) {
            floats total[UNROLL], square[UNROLL];
            for (int k = 0; k < UNROLL; k++) total[k] = square[k] = all(0);
            long r = first;
            for (; r + UNROLL <= stop; r += UNROLL)
#pragma GCC unroll 4
                for (int k = 0; k < UNROLL; k++) {
                    floats x = load(n->x, n->half, (r + k) * row + c) - get(origin + c);
                    total[k] += x;
                    square[k] += x * x;
                }
            for (; r < stop; r++) {
                floats x = load(n->x, n->half, r * row + c) - get(origin + c);
                total[0] += x;
                square[0] += x * x;
            }
            add_up(sums + c, total[0] + total[1] + (total[2] + total[3]));
            add_up(sums + row + c, square[0] + square[1] + (square[2] + square[3]));
        }
    }
    gather(n, room, threads, 2);
    for (long i = 0; i < n->channels; i++) {
        const double shift = room[i] / n->pixels, variance = fmax(room[row + i] / n->pixels - shift * shift, 0);
        mean[i] += shift;
        inverse[i] = 1 / sqrt(variance + n->epsilon);
        running_mean[i] += momentum * (mean[i] - running_mean[i]);
        running_variance[i] += momentum * (variance * n->pixels / (n->pixels - 1) - running_variance[i]);
        factor[i] = n->weight[i] * inverse[i];
        addend[i] = n->bias[i] - mean[i] * factor[i];
    }
    spread(n, factor, factor);
    spread(n, addend, addend);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < row; c += LANES) {
            floats z = load(n->x, n->half, r * row + c) * get(factor + c) + get(addend + c);
            store(out, n->half, r * row + c, activated(n->act, z) * n->scale + n->shift);
        }
}

// gradients of all that y is made of; to_affine: of scale and shift
void normalization_backward(const Normalization *n, const void *to_out, const float *mean, const float *inverse,
                            void *to_x, float *to_weight, float *to_bias, float *to_affine, double *room, int threads) {
    const long row = wide(n), rows = rows_of(n), chunk = chunk_of(n), size = normalization_room(n);
    float origin[row], over[row], weight[row], bias[row], factor[row], mean_slope[row], mean_product[row];
    spread(n, origin, mean);
    spread(n, over, inverse);
    spread(n, weight, n->weight);
    spread(n, bias, n->bias);
    memset(room, 0, threads * size * sizeof(double));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < rows; first += chunk) {
        double *sums = room + omp_get_thread_num() * size;
        const long stop = first + chunk < rows ? first + chunk : rows;
        for (long c = 0; c < row; c += LANES) {
            floats slopes[2] = {0}, products[2] = {0}, answers[2] = {0}, given[2] = {0};
            for (long r = first; r < stop; r++) {
                const floats x = (load(n->x, n->half, r * row + c) - get(origin + c)) * get(over + c);
                const floats g = load(to_out, n->half, r * row + c);
                const floats z = x * get(weight + c) + get(bias + c), slope = g * slope_at(n->act, z);
                slopes[r % 2] += slope;
                products[r % 2] += slope * x;
                if (n->affine) {
                    answers[r % 2] += g * activated(n->act, z);
                    given[r % 2] += g;
                }
            }
            add_up(sums + c, slopes[0] + slopes[1]);
            add_up(sums + row + c, products[0] + products[1]);
            add_up(sums + 2 * row + c, answers[0] + answers[1]);
            add_up(sums + 3 * row + c, given[0] + given[1]);
        }
    }
    gather(n, room, threads, 4);
    to_affine[0] = to_affine[1] = 0;
    for (long i = 0; i < n->channels; i++) {
        to_bias[i] = n->scale * room[i];
        to_weight[i] = n->scale * room[row + i];
        to_affine[0] += room[2 * row + i];
        to_affine[1] += room[3 * row + i];
        factor[i] = n->scale * n->weight[i] * inverse[i];
        mean_slope[i] = room[i] / n->pixels;
        mean_product[i] = room[row + i] / n->pixels;
    }
    spread(n, factor, factor);
    spread(n, mean_slope, mean_slope);
    spread(n, mean_product, mean_product);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < row; c += LANES) {
            const floats x = (load(n->x, n->half, r * row + c) - get(origin + c)) * get(over + c);
            const floats z = x * get(weight + c) + get(bias + c);
            const floats slope = load(to_out, n->half, r * row + c) * slope_at(n->act, z);
            const floats pulled = slope - get(mean_slope + c) - x * get(mean_product + c);
            store(to_x, n->half, r * row + c, pulled * get(factor + c));
        }
}
