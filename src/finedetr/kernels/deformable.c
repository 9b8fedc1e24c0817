// The sum of deformable attention, forward and backward: each query and head adds bilinear samples of the pyramid.
//
// Offsets and the logits of the weights come as the linear layers answer them. Softmax, places and samples are made of
// them here, for one query and head at a time, and again in the backward pass; none of them is kept. The width of a
// head (HEAD) and the points of one (POINTS, of all levels) are given to the compiler.

#include <omp.h>

#include "vectors.h"

#define PADDED ((POINTS + LANES - 1) / LANES * LANES)
#define LEVELS 8  // the most; kernels/deformable.py has the same number

typedef struct {
    const void *offsets, *logits;  // [B, N, 2 (x, y), heads · POINTS], [B, N, heads · POINTS]
    const float *references;       // [B, N, 4 (cx, cy, w, h)] or [B, N, 2 (x, y)]
    const float *stretch;          // how far an offset of one goes [2 (x, y), heads · POINTS], on the map or in a box
    const void *levels[LEVELS];    // the pyramid, [B, H, W, heads · HEAD] each
    int half, half_levels;         // whether offsets and logits, and whether the pyramid, are bfloat16
    int heights[LEVELS], widths[LEVELS], points[LEVELS];
    int level_count, batch, heads, count, reference_width;
} Sampling;

// what is known of the points of one head before they are: sizes of their levels, and how far an offset of one goes
typedef struct { float width[PADDED], height[PADDED], stretch_x[PADDED], stretch_y[PADDED]; } Head;

// of each point of a head, where it lies; its corners: upper left, upper right, lower left, lower right
typedef struct {
    float offset_x[PADDED], offset_y[PADDED], weight[PADDED];
    float x[PADDED], y[PADDED];            // from the upper left corner towards the others, 0..1
    float free_x[PADDED], free_y[PADDED];  // cells to the map's side; 0 where the place is held at the border
    int32_t cell[4][PADDED];               // of the corners
    float exists[4][PADDED];               // 0 where a corner lies outside
    float part[4][PADDED];                 // of each corner, in the sum
} Places;

static Head head_of(const Sampling *s, int head) {
    Head constants = {0};
    int k = 0;
    for (int level = 0; level < s->level_count; level++)
        for (int i = 0; i < s->points[level]; i++, k++)
            constants.width[k] = s->widths[level], constants.height[k] = s->heights[level];
    memcpy(constants.stretch_x, s->stretch + head * POINTS, POINTS * sizeof(float));
    memcpy(constants.stretch_y, s->stretch + (s->heads + head) * POINTS, POINTS * sizeof(float));
    return constants;
}

// numbers of one head's points, in float32, and back
static inline void take(float *to, const void *from, int half, long at) {
    if (half)
        for (int k = 0; k < POINTS; k++) ((uint32_t *)to)[k] = (uint32_t)((const uint16_t *)from)[at + k] << 16;
    else
        memcpy(to, (const float *)from + at, POINTS * sizeof(float));
}

static inline void put(void *to, int half, long at, const float *numbers) {
    uint16_t halved[PADDED];
    if (half) {
        for (int k = 0; k < PADDED; k += LANES) store(halved, 1, k, get(numbers + k));
        memcpy((uint16_t *)to + at, halved, POINTS * sizeof(uint16_t));
    } else {
        memcpy((float *)to + at, numbers, POINTS * sizeof(float));
    }
}

static inline floats whole_below(floats x) {
    floats cut = __builtin_convertvector(__builtin_convertvector(x, ints), floats);
    return choose(cut > x, cut - 1, cut);
}

static inline floats one_where(ints mask) { return choose(mask, all(1), all(0)); }

static inline floats held(floats x, floats size) { return choose(x > -1, choose(x < size, x, size), all(-1)); }

static void find(const Sampling *s, const Head *constants, long row, int head, Places *p) {
    const long all_points = (long)s->heads * POINTS, first = head * POINTS;
    const float *reference = s->references + row * s->reference_width;
    const int boxes = s->reference_width == 4;
    const float box_width = boxes ? reference[2] : 1, box_height = boxes ? reference[3] : 1;
    floats top = all(-3e38f), total = all(0);
    for (int k = POINTS; k < PADDED; k++) p->weight[k] = -INFINITY, p->offset_x[k] = p->offset_y[k] = 0;
    take(p->weight, s->logits, s->half, row * all_points + first);
    take(p->offset_x, s->offsets, s->half, 2 * row * all_points + first);
    take(p->offset_y, s->offsets, s->half, (2 * row + 1) * all_points + first);
    for (int k = 0; k < PADDED; k += LANES) top = larger(get(p->weight + k), top);
    const float most = largest(top);
    for (int k = 0; k < PADDED; k += LANES)
        total += *(floats *)(p->weight + k) = power_of_two((get(p->weight + k) - most) * 1.44269504f);
    const float share = 1 / sum(total);
    for (int k = 0; k < PADDED; k += LANES) {
        const floats width = get(constants->width + k), height = get(constants->height + k);
        const floats right = get(p->offset_x + k) * get(constants->stretch_x + k) * box_width;
        const floats down = get(p->offset_y + k) * get(constants->stretch_y + k) * box_height;
        const floats wanted_x = (right + reference[0]) * width - .5f, wanted_y = (down + reference[1]) * height - .5f;
        const floats held_x = held(wanted_x, width), held_y = held(wanted_y, height);
        const floats left = whole_below(held_x), upper = whole_below(held_y), cell = upper * width + left;
        // a place that is no number makes its answer none: it goes on in the shares of the corners
        const floats x = choose(wanted_x == wanted_x, held_x - left, wanted_x);
        const floats y = choose(wanted_y == wanted_y, held_y - upper, wanted_y);
        const floats has[4] = {one_where((left >= 0) & (left < width)), one_where(left + 1 < width),
                               one_where((upper >= 0) & (upper < height)), one_where(upper + 1 < height)};
        const floats weight = get(p->weight + k) * share, below = weight * y, above = weight - below;
        const floats parts[4] = {above - above * x, above * x, below - below * x, below * x};
        *(floats *)(p->weight + k) = weight;
        *(floats *)(p->x + k) = x;
        *(floats *)(p->y + k) = y;
        *(floats *)(p->free_x + k) = choose(held_x == wanted_x, width, all(0));
        *(floats *)(p->free_y + k) = choose(held_y == wanted_y, height, all(0));
        for (int corner = 0; corner < 4; corner++) {
            const floats exists = has[corner % 2] * has[2 + corner / 2];
            const floats at = cell + (corner % 2 ? all(1) : all(0)) + (corner / 2 ? width : all(0));
            *(floats *)(p->exists[corner] + k) = exists;
            *(floats *)(p->part[corner] + k) = parts[corner] * exists;
            *(ints *)(p->cell[corner] + k) = __builtin_convertvector(at * exists, ints);
        }
    }
}

// One task is one head of one picture: nobody else writes its channels, of the answers or of the pyramid's gradient.
static void forward_task(const Sampling *s, int task, void *out, int half_out) {
    const long width = (long)s->heads * HEAD, picture = task / s->heads, head = task % s->heads;
    const Head constants = head_of(s, head);
    for (long row = picture * s->count; row < (picture + 1) * s->count; row++) {
        Places p;
        find(s, &constants, row, head, &p);
        floats sums[HEAD / LANES] = {0};
        for (int level = 0, k = 0; level < s->level_count; level++) {
            const long start = picture * s->heights[level] * s->widths[level] * width + head * HEAD;
            for (const int end = k + s->points[level]; k < end; k++)
                for (int corner = 0; corner < 4; corner++)
                    for (int d = 0; d < HEAD / LANES; d++)
                        sums[d] += p.part[corner][k] * load(s->levels[level], s->half_levels,
                                                            start + p.cell[corner][k] * width + d * LANES);
        }
        for (int d = 0; d < HEAD / LANES; d++) store(out, half_out, row * width + head * HEAD + d * LANES, sums[d]);
    }
}

// floats that one thread needs in the backward pass
long deformable_room(const Sampling *s) {
    long cells = 0;
    for (int level = 0; level < s->level_count; level++) cells += (long)s->heights[level] * s->widths[level];
    return cells * HEAD;
}

typedef struct {
    const void *out;  // [B, N, heads · HEAD], bfloat16 or not
    int half_out;
    void *offsets, *logits, *levels[LEVELS];
    float *references;  // [B, N, heads, 4 or 2], or none
} Gradients;

// the gradients of a head's points for one query, given how much each corner agrees with the answer's gradient
static void pull(const Sampling *s, const Head *constants, const Gradients *to, const Places *p,
                 float seen[4][PADDED], long row, int head) {
    const long all_points = (long)s->heads * POINTS, first = head * POINTS;
    const float *reference = s->references + row * s->reference_width;
    const int boxes = s->reference_width == 4;
    const float box_width = boxes ? reference[2] : 1, box_height = boxes ? reference[3] : 1;
    float logits[PADDED], offsets_x[PADDED], offsets_y[PADDED];
    floats mean = all(0), to_x = all(0), to_y = all(0), to_width = all(0), to_height = all(0);
    for (int k = 0; k < PADDED; k += LANES) {
        const floats weight = get(p->weight + k), x = get(p->x + k), y = get(p->y + k);
        const floats upper_left = get(seen[0] + k), upper_over = get(seen[1] + k) - upper_left;
        const floats lower_left = get(seen[2] + k), lower_over = get(seen[3] + k) - lower_left;
        const floats upper = upper_left + x * upper_over, lower = lower_left + x * lower_over;
        const floats sample = upper + y * (lower - upper);
        const floats right = (upper_over + y * (lower_over - upper_over)) * weight * get(p->free_x + k);
        const floats down = (lower - upper) * weight * get(p->free_y + k);
        const floats goes_x = get(constants->stretch_x + k), goes_y = get(constants->stretch_y + k);
        mean += weight * sample;
        *(floats *)(logits + k) = sample;
        *(floats *)(offsets_x + k) = right * goes_x * box_width;
        *(floats *)(offsets_y + k) = down * goes_y * box_height;
        to_x += right;
        to_y += down;
        to_width += right * goes_x * get(p->offset_x + k);
        to_height += down * goes_y * get(p->offset_y + k);
    }
    const float whole = sum(mean);
    for (int k = 0; k < PADDED; k += LANES)
        *(floats *)(logits + k) = get(p->weight + k) * (get(logits + k) - whole);
    put(to->logits, s->half, row * all_points + first, logits);
    put(to->offsets, s->half, 2 * row * all_points + first, offsets_x);
    put(to->offsets, s->half, (2 * row + 1) * all_points + first, offsets_y);
    if (to->references) {
        const float sums[4] = {sum(to_x), sum(to_y), sum(to_width), sum(to_height)};
        memcpy(to->references + (row * s->heads + head) * s->reference_width, sums, s->reference_width * sizeof(float));
    }
}

static void backward_task(const Sampling *s, int task, const Gradients *to, float *room) {
    const long width = (long)s->heads * HEAD, picture = task / s->heads, head = task % s->heads;
    const Head constants = head_of(s, head);
    memset(room, 0, deformable_room(s) * sizeof(float));
    for (long row = picture * s->count; row < (picture + 1) * s->count; row++) {
        Places p;
        find(s, &constants, row, head, &p);
        float seen[4][PADDED] = {0}, *sums = room;
        floats slope[HEAD / LANES];
        for (int d = 0; d < HEAD / LANES; d++)
            slope[d] = load(to->out, to->half_out, row * width + head * HEAD + d * LANES);
        for (int level = 0, k = 0; level < s->level_count; level++) {
            const long cells = (long)s->heights[level] * s->widths[level];
            const long start = picture * cells * width + head * HEAD;
            for (const int end = k + s->points[level]; k < end; k++)
                for (int corner = 0; corner < 4; corner++) {
                    const long cell = p.cell[corner][k];
                    floats product = all(0);
                    for (int d = 0; d < HEAD / LANES; d++) {
                        product += slope[d] * load(s->levels[level], s->half_levels, start + cell * width + d * LANES);
                        *(floats *)(sums + cell * HEAD + d * LANES) += p.part[corner][k] * slope[d];
                    }
                    seen[corner][k] = sum(product) * p.exists[corner][k];
                }
            sums += cells * HEAD;
        }
        pull(s, &constants, to, &p, seen, row, head);
    }
    for (int level = 0; level < s->level_count; level++) {
        const long cells = (long)s->heights[level] * s->widths[level];
        for (long cell = 0; cell < cells; cell++, room += HEAD)
            for (int d = 0; d < HEAD; d += LANES)
                store(to->levels[level], s->half_levels, (picture * cells + cell) * width + head * HEAD + d,
                      get(room + d));
    }
}

// out [B, N, heads · HEAD], bfloat16 or not
void deformable_forward(const Sampling *s, void *out, int half_out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < s->batch * s->heads; task++) forward_task(s, task, out, half_out);
}

void deformable_backward(const Sampling *s, const Gradients *to, float *room, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int task = 0; task < s->batch * s->heads; task++)
        backward_task(s, task, to, room + omp_get_thread_num() * deformable_room(s));
}
