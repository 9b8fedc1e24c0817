// Depthwise convolution of bfloat16, forward and backward: each channel of a map with a small kernel of its own.
//
// Channels are innermost. One task is as many channels of one picture as a vector has lanes; they are written in
// float32 with the zeros around them, so that no tap has to ask where it is. KERNEL, the side of the kernel, is given
// to the compiler.

#include <omp.h>

#include "vectors.h"

#define TAPS (KERNEL * KERNEL)

typedef struct {
    const void *x;         // [B, H, W, channels]
    const float *weights;  // [KERNEL, KERNEL, channels]
    int batch, channels, height, width, out_height, out_width, stride, padding;
} Depthwise;

static long padded_width(const Depthwise *d) { return d->width + 2 * d->padding; }

static long padded_cells(const Depthwise *d) { return (d->height + 2 * d->padding) * padded_width(d); }

// floats that one thread needs
long depthwise_room(const Depthwise *d) { return 2 * padded_cells(d) * LANES; }

// where a picture's line begins, from a task's first channel on
static long line_at(const Depthwise *d, int task, long y, long height, long width) {
    const long blocks = d->channels / LANES;
    return (task / blocks * height + y) * width * d->channels + task % blocks * LANES;
}

static long inside(const Depthwise *d, long y) { return ((y + d->padding) * padded_width(d) + d->padding) * LANES; }

// the picture's channels, and zeros around them
static void take(const Depthwise *d, int task, float *room) {
    const long line = padded_width(d) * LANES, border = d->padding * LANES;
    memset(room, 0, d->padding * line * sizeof(float));
    memset(room + (d->height + d->padding) * line, 0, d->padding * line * sizeof(float));
    for (long y = 0; y < d->height; y++) {
        const long from = line_at(d, task, y, d->height, d->width);
        float *to = room + inside(d, y);
        memset(to - border, 0, border * sizeof(float));
        for (long x = 0; x < d->width; x++) *(floats *)(to + x * LANES) = load(d->x, 1, from + x * d->channels);
        memset(to + d->width * LANES, 0, border * sizeof(float));
    }
}

static void weights_of(const Depthwise *d, int task, floats *weights) {
    for (int tap = 0; tap < TAPS; tap++)
        weights[tap] = get(d->weights + (long)tap * d->channels + task % (d->channels / LANES) * LANES);
}

static void forward_task(const Depthwise *d, int task, void *out, float *room) {
    const long line = padded_width(d) * LANES, step = d->stride * LANES;
    floats weights[TAPS];
    weights_of(d, task, weights);
    take(d, task, room);
    for (long y = 0; y < d->out_height; y++) {
        const long to = line_at(d, task, y, d->out_height, d->out_width);
        for (long x = 0; x < d->out_width; x++) {
            const float *corner = room + y * d->stride * line + x * step;
            floats sums[KERNEL];  // of a line of taps each: one sum would wait for itself
            for (int i = 0; i < KERNEL; i++) sums[i] = all(0);
#pragma GCC unroll 49
            for (int tap = 0; tap < TAPS; tap++)
                sums[tap / KERNEL] += weights[tap] * get(corner + tap / KERNEL * line + tap % KERNEL * LANES);
            for (int i = 1; i < KERNEL; i++) sums[0] += sums[i];
            store(out, 1, to + x * d->channels, sums[0]);
        }
    }
}

static void backward_task(const Depthwise *d, int task, const void *to_out, void *to_x, float *to_weights,
                          float *room) {
    const long line = padded_width(d) * LANES, step = d->stride * LANES, blocks = d->channels / LANES;
    float *pulled = room + padded_cells(d) * LANES;
    floats weights[TAPS], sums[TAPS];
    weights_of(d, task, weights);
    for (int tap = 0; tap < TAPS; tap++) sums[tap] = all(0);
    take(d, task, room);
    memset(pulled, 0, padded_cells(d) * LANES * sizeof(float));
    for (long y = 0; y < d->out_height; y++) {
        const long from = line_at(d, task, y, d->out_height, d->out_width);
        for (long x = 0; x < d->out_width; x++) {
            const floats slope = load(to_out, 1, from + x * d->channels);
            const long corner = y * d->stride * line + x * step;
#pragma GCC unroll 49
            for (int tap = 0; tap < TAPS; tap++) {
                const long at = corner + tap / KERNEL * line + tap % KERNEL * LANES;
                *(floats *)(pulled + at) += weights[tap] * slope;
                sums[tap] += get(room + at) * slope;
            }
        }
    }
    for (long y = 0; y < d->height; y++) {
        const long to = line_at(d, task, y, d->height, d->width);
        for (long x = 0; x < d->width; x++)
            store(to_x, 1, to + x * d->channels, get(pulled + inside(d, y) + x * LANES));
    }
    for (int tap = 0; tap < TAPS; tap++)
        *(floats *)(to_weights + (task / blocks * TAPS + tap) * d->channels + task % blocks * LANES) = sums[tap];
}

// out [B, H', W', channels]
void depthwise_forward(const Depthwise *d, void *out, float *room, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < d->batch * d->channels / LANES; task++)
        forward_task(d, task, out, room + omp_get_thread_num() * depthwise_room(d));
}

// the gradients of x and, of each picture by itself, of the weights [B, KERNEL, KERNEL, channels]
void depthwise_backward(const Depthwise *d, const void *to_out, void *to_x, float *to_weights, float *room,
                        int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < d->batch * d->channels / LANES; task++)
        backward_task(d, task, to_out, to_x, to_weights, room + omp_get_thread_num() * depthwise_room(d));
}
