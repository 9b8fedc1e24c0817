// Attention of queries to one another, forward and backward, without a map of it in memory.
//
// One task is one head of one picture. Its queries, keys and values are written in float32, row after row and, where
// products run over columns, the other way round. Then ROWS queries at a time meet COLUMNS keys at a time; blocks of
// keys that none of these queries may see are left out. HEAD, the width of a head, is given to the compiler.
//
// Products of two bfloat16 numbers are exact in float32, and processors that know bfloat16 add up two of them in the
// time of one. There, two channels of a query or key are one entry of the tables that such products are made of.

#include <omp.h>

#include "vectors.h"

#define ROWS (LANES / 2)  // with two vectors of each, as many sums as there are registers for
#define COLUMNS (2 * LANES)
#define SHARPNESS (1.44269504f / sqrtf(HEAD))  // of scores, for powers of two

#ifdef __AVX512BF16__
#include <immintrin.h>
#define PAIRS 1
#else
#define PAIRS 0
#endif

// sum + x · y, of numbers or of pairs
static inline floats add_product(floats sum, floats x, float y, const int pairs) {
#ifdef __AVX512BF16__
    if (pairs) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)x, (__m512bh)_mm512_set1_ps(y));
#endif
    (void)pairs;
    return sum + x * y;
}

typedef struct {
    const void *joint;           // queries and keys side by side [B, N, 2 · heads · HEAD]
    const void *values;          // [B, N, heads · HEAD]
    int half;                    // whether they are bfloat16
    const uint8_t *blocked;      // for the first `extra` queries, what they must not see [*B, extra, N]
    long blocked_stride;         // from one picture's to the next's; 0 where all have one
    uint8_t *survey;             // room for what `survey` makes of it
    int extra, batch, heads, count;
} Attention;

enum { NONE, SOME, ALL };

typedef struct {
    float *queries, *keys, *values, *answers, *to_answers, *to_keys, *to_values;
    float *pairs, *more_pairs;           // of rows for products
    float *keys_across, *values_across;  // the other way round
    float *scores, *slopes;  // of ROWS queries
    int *columns;            // where the blocks of keys begin that they see
    uint8_t *partly;         // those of which they see a part only
} Room;

static long padded(long count) { return count + COLUMNS + ROWS; }

static long room_of(long count) { return padded(count) * (11 * HEAD + 2 * ROWS + 2); }

static Room divide(float *room, long count) {
    const long size = padded(count), table = size * HEAD;
    float *rest = room + 11 * table;
    return (Room){room,
                  room + table,
                  room + 2 * table,
                  room + 3 * table,
                  room + 4 * table,
                  room + 5 * table,
                  room + 6 * table,
                  room + 7 * table,
                  room + 8 * table,
                  room + 9 * table,
                  room + 10 * table,
                  rest,
                  rest + ROWS * size,
                  (int *)(rest + 2 * ROWS * size),
                  (uint8_t *)(rest + (2 * ROWS + 1) * size)};
}

static int paired(const Attention *a) { return PAIRS && a->half; }

static void take(float *to, const void *from, int half, long at, long stride, long count) {
    for (long i = 0; i < count; i++)
        for (int d = 0; d < HEAD; d += LANES) *(floats *)(to + i * HEAD + d) = load(from, half, at + i * stride + d);
    memset(to + count * HEAD, 0, (padded(count) - count) * HEAD * sizeof(float));
}

// rows for products: those that were taken, or, where numbers come as bfloat16 and are paired, `to` with pairs of them
static const float *rows_for_products(const Attention *a, float *to, const float *taken, const void *from, long at,
                                      long stride) {
    const long size = padded(a->count), steps = HEAD / 2;
    if (!paired(a)) return taken;
    for (long i = 0; i < a->count; i++)
        memcpy(to + i * steps, (const uint16_t *)from + at + i * stride, steps * sizeof(float));
    memset(to + a->count * steps, 0, (size - a->count) * steps * sizeof(float));
    return to;
}

// the same the other way round
static void turn(const Attention *a, float *to, const float *rows) {
    const long size = padded(a->count), steps = paired(a) ? HEAD / 2 : HEAD;
    for (int d = 0; d < steps; d++)
        for (long i = 0; i < size; i++) ((uint32_t *)to)[d * size + i] = ((const uint32_t *)rows)[i * steps + d];
}

// rows · columns, for ROWS rows and the columns from `at` on
static inline void products(float *to, const float *down, const float *across, long size, long at, const int pairs) {
    const int steps = pairs ? HEAD / 2 : HEAD;
    floats left[ROWS], right[ROWS];
    for (int r = 0; r < ROWS; r++) left[r] = right[r] = all(0);
    for (int d = 0; d < steps; d++) {
        const floats x = get(across + d * size + at), y = get(across + d * size + at + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const float row = down[r * steps + d];
            left[r] = add_product(left[r], x, row, pairs);
            right[r] = add_product(right[r], y, row, pairs);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        *(floats *)(to + r * size + at) = left[r];
        *(floats *)(to + r * size + at + LANES) = right[r];
    }
}

static void meet(const Attention *a, const Room *room, float *to, const float *down, const float *across, long first,
                 int found) {
    const long size = padded(a->count);
    if (paired(a))
        for (int b = 0; b < found; b++) products(to, down + first * HEAD / 2, across, size, room->columns[b], PAIRS);
    else
        for (int b = 0; b < found; b++) products(to, down + first * HEAD, across, size, room->columns[b], 0);
}

static long blocks_of(long count, long size) { return (count + size - 1) / size; }

static long of_picture(const Attention *a, long picture, long size) { return a->blocked_stride ? picture * size : 0; }

static long pictures_of(const Attention *a) { return a->blocked_stride ? a->batch : 1; }

// floats that one thread needs
long attention_room(const Attention *a) { return room_of(a->count); }

// of what must not be seen: its rows with room behind each, all of it hidden, and how much ROWS of them see of COLUMNS
static uint8_t *hidden_of(const Attention *a, long picture) {
    return a->survey + of_picture(a, picture, a->extra * padded(a->count));
}

static uint8_t *blocks_seen(const Attention *a, long picture) {
    const long size = blocks_of(a->extra, ROWS) * blocks_of(a->count, COLUMNS);
    return a->survey + pictures_of(a) * a->extra * padded(a->count) + of_picture(a, picture, size);
}

// bytes of both
long attention_survey(const Attention *a) {
    return pictures_of(a) *
           (a->extra * padded(a->count) + blocks_of(a->extra, ROWS) * blocks_of(a->count, COLUMNS));
}

static void survey(const Attention *a) {
    const long size = padded(a->count), wide = blocks_of(a->count, COLUMNS), high = blocks_of(a->extra, ROWS);
    for (long picture = 0; picture < pictures_of(a); picture++) {
        const uint8_t *blocked = a->blocked + picture * a->blocked_stride;
        uint8_t *hidden = hidden_of(a, picture), *blocks = blocks_seen(a, picture);
        memset(hidden, 1, a->extra * size);
        for (long i = 0; i < a->extra; i++) memcpy(hidden + i * size, blocked + i * a->count, a->count);
        for (long b = 0; b < high * wide; b++) {
            const long first = b / wide * ROWS, stop = first + ROWS < a->extra ? first + ROWS : a->extra;
            int found = 0;
            for (long i = first; i < stop; i++)
                for (long j = 0; j < COLUMNS; j++) found += hidden[i * size + b % wide * COLUMNS + j];
            blocks[b] = found == 0 ? ALL : found < (stop - first) * COLUMNS ? SOME : NONE;
        }
    }
}

// the blocks of keys that the ROWS queries from `first` on see: extra ones what they may, others those that are none
static int look(const Attention *a, long picture, long first, const Room *room) {
    const long wide = blocks_of(a->count, COLUMNS);
    int found = 0;
    if (first >= a->extra) {
        for (long at = a->extra; at < a->count; at += COLUMNS) {
            room->columns[found] = at;
            room->partly[found++] = at + COLUMNS > a->count;
        }
        return found;
    }
    const uint8_t *blocks = blocks_seen(a, picture) + first / ROWS * wide;
    for (long b = 0; b < wide; b++) {
        if (blocks[b] == NONE) continue;
        room->columns[found] = b * COLUMNS;
        room->partly[found++] = blocks[b] == SOME;
    }
    return found;
}

// scores of query `i` from key `at` on, without those that it must not see
static inline floats seen(const Attention *a, const uint8_t *hidden, long i, long at, floats scores) {
    ints none;
    if (i < a->extra) {
        none = __builtin_convertvector(*(const bytes *)(hidden + i * padded(a->count) + at), ints) != 0;
    } else {
        for (int lane = 0; lane < LANES; lane++) none[lane] = -(at + lane >= a->count);
    }
    return choose(none, all(-INFINITY), scores);
}

// the next ROWS queries, or as many as there are of their kind
static int rows_from(const Attention *a, long first) {
    long end = first < a->extra ? a->extra : a->count;
    return end - first < ROWS ? end - first : ROWS;
}

// where the numbers of a task are
typedef struct {
    long picture, width, size;        // numbers of a row of values; rows of a table
    long of_queries, of_keys, of_values;  // the first ones
    const uint8_t *hidden;
} Task;

// takes queries, keys and values, and turns the keys
static Task begin(const Attention *a, int number, const Room *room) {
    const long picture = number / a->heads, width = (long)a->heads * HEAD, head = number % a->heads * HEAD;
    const long before = picture * a->count * width;
    const Task task = {picture, width, padded(a->count), 2 * before + head, 2 * before + head + width, before + head,
                       hidden_of(a, picture)};
    take(room->queries, a->joint, a->half, task.of_queries, 2 * width, a->count);
    take(room->keys, a->joint, a->half, task.of_keys, 2 * width, a->count);
    take(room->values, a->values, a->half, task.of_values, width, a->count);
    turn(a, room->keys_across, rows_for_products(a, room->pairs, room->keys, a->joint, task.of_keys, 2 * width));
    return task;
}

static void forward_task(const Attention *a, int number, const Room *room, void *out, float *levels) {
    const Task task = begin(a, number, room);
    const long width = task.width, size = task.size;
    const float *rows_of_queries =
        rows_for_products(a, room->pairs, room->queries, a->joint, task.of_queries, 2 * width);
    for (long first = 0, rows; first < a->count; first += rows) {
        rows = rows_from(a, first);
        int found = look(a, task.picture, first, room);
        float weight[ROWS];
        meet(a, room, room->scores, rows_of_queries, room->keys_across, first, found);
        for (int r = 0; r < rows; r++) {
            float *scores = room->scores + r * size;
            floats left = all(-3e38f), right = left, total = all(0);
            for (int b = 0; b < found; b++) {
                const long at = room->columns[b];
                floats *one = (floats *)(scores + at), *other = one + 1;
                if (room->partly[b]) {
                    *one = seen(a, task.hidden, first + r, at, *one);
                    *other = seen(a, task.hidden, first + r, at + LANES, *other);
                }
                left = larger(*one, left);
                right = larger(*other, right);
            }
            const float top = largest(larger(left, right)) * SHARPNESS;
            for (int b = 0; b < found; b++)
                for (int c = 0; c < COLUMNS; c += LANES) {
                    floats *score = (floats *)(scores + room->columns[b] + c);
                    total += *score = power_of_two(*score * SHARPNESS - top);
                }
            float whole = sum(total);
            weight[r] = whole == 0 ? 0 : 1 / whole;  // one that sees nothing answers nothing
            levels[number * (long)a->count + first + r] = whole == 0 ? INFINITY : top + log2f(whole);
        }
        for (int d = 0; d < HEAD; d += LANES) {
            floats answer[ROWS];
            for (int r = 0; r < ROWS; r++) answer[r] = all(0);
            for (int b = 0; b < found; b++)
                for (long j = room->columns[b]; j < room->columns[b] + COLUMNS; j++) {
                    floats value = get(room->values + j * HEAD + d);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) answer[r] += room->scores[r * size + j] * value;
                }
            for (int r = 0; r < rows; r++)
                store(out, a->half, task.of_values + (first + r) * width + d, answer[r] * weight[r]);
        }
    }
}

static void backward_task(const Attention *a, int number, const Room *room, const void *out, const void *to_out,
                          const float *levels, void *to_joint, void *to_values) {
    const Task task = begin(a, number, room);
    const long width = task.width, size = task.size;
    take(room->answers, out, a->half, task.of_values, width, a->count);
    take(room->to_answers, to_out, a->half, task.of_values, width, a->count);
    turn(a, room->values_across, rows_for_products(a, room->pairs, room->values, a->values, task.of_values, width));
    const float *rows_of_queries =
        rows_for_products(a, room->pairs, room->queries, a->joint, task.of_queries, 2 * width);
    const float *rows_of_answers =
        rows_for_products(a, room->more_pairs, room->to_answers, to_out, task.of_values, width);
    memset(room->to_keys, 0, size * HEAD * sizeof(float));
    memset(room->to_values, 0, size * HEAD * sizeof(float));
    for (long first = 0, rows; first < a->count; first += rows) {
        rows = rows_from(a, first);
        int found = look(a, task.picture, first, room);
        const float *queries = room->queries + first * HEAD, *to_answers = room->to_answers + first * HEAD;
        meet(a, room, room->scores, rows_of_queries, room->keys_across, first, found);
        meet(a, room, room->slopes, rows_of_answers, room->values_across, first, found);
        for (int r = 0; r < ROWS; r++) {
            float *scores = room->scores + r * size, *slopes = room->slopes + r * size;
            float level = INFINITY;  // no weights where no query is
            floats product = all(0);
            if (r < rows) {
                level = levels[number * (long)a->count + first + r];
                for (int d = 0; d < HEAD; d += LANES)
                    product += get(to_answers + r * HEAD + d) * get(room->answers + (first + r) * HEAD + d);
            }
            float mean = sum(product);
            for (int b = 0; b < found; b++)
                for (int c = 0; c < COLUMNS; c += LANES) {
                    const long at = room->columns[b] + c;
                    floats *score = (floats *)(scores + at), *slope = (floats *)(slopes + at);
                    if (room->partly[b] && r < rows) *score = seen(a, task.hidden, first + r, at, *score);
                    *score = power_of_two(*score * SHARPNESS - level);
                    *slope = *score * (*slope - mean);
                }
        }
        for (int d = 0; d < HEAD; d += LANES) {
            floats query[ROWS], to_answer[ROWS], to_query[ROWS];
            for (int r = 0; r < ROWS; r++) {
                query[r] = get(queries + r * HEAD + d);
                to_answer[r] = get(to_answers + r * HEAD + d);
                to_query[r] = all(0);
            }
            for (int b = 0; b < found; b++)
                for (long j = room->columns[b]; j < room->columns[b] + COLUMNS; j++) {
                    floats key = get(room->keys + j * HEAD + d);
                    floats *to_key = (floats *)(room->to_keys + j * HEAD + d);
                    floats *to_value = (floats *)(room->to_values + j * HEAD + d);
                    floats key_sum = *to_key, value_sum = *to_value;
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        float slope = room->slopes[r * size + j];
                        to_query[r] += slope * key;
                        key_sum += slope * query[r];
                        value_sum += room->scores[r * size + j] * to_answer[r];
                    }
                    *to_key = key_sum;
                    *to_value = value_sum;
                }
            for (int r = 0; r < rows; r++)
                store(to_joint, a->half, task.of_queries + (first + r) * 2 * width + d, to_query[r] / sqrtf(HEAD));
        }
    }
    for (long i = 0; i < a->count; i++)
        for (int d = 0; d < HEAD; d += LANES) {
            store(to_joint, a->half, task.of_keys + i * 2 * width + d,
                  get(room->to_keys + i * HEAD + d) / sqrtf(HEAD));
            store(to_values, a->half, task.of_values + i * width + d, get(room->to_values + i * HEAD + d));
        }
}

// out [B, N, heads · HEAD]; levels [B, heads, N]: the logarithm, to base 2, of each query's sum of powers
void attention_forward(const Attention *a, void *out, float *levels, float *room, int threads) {
    survey(a);
#pragma omp parallel num_threads(threads)
    {
        Room own = divide(room + omp_get_thread_num() * room_of(a->count), a->count);
#pragma omp for schedule(static)
        for (int number = 0; number < a->batch * a->heads; number++) forward_task(a, number, &own, out, levels);
    }
}

// the gradients of joint and values, given that of out
void attention_backward(const Attention *a, const void *out, const void *to_out, const float *levels, void *to_joint,
                        void *to_values, float *room, int threads) {
    survey(a);
#pragma omp parallel num_threads(threads)
    {
        Room own = divide(room + omp_get_thread_num() * room_of(a->count), a->count);
#pragma omp for schedule(static)
        for (int number = 0; number < a->batch * a->heads; number++)
            backward_task(a, number, &own, out, to_out, levels, to_joint, to_values);
    }
}
