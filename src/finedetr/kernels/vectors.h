// Vectors of floats, as GCC and Clang know them on every processor, and the few functions that kernels share.
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t eight_ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t four_ints __attribute__((vector_size(16), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

static inline floats get(const float *from) { return *(const floats *)from; }

static inline floats all(float x) { return x - (floats){}; }

// mask ? a : b, lane by lane, for the masks that comparisons give; of any kind of floats and the integers of their size
#define CHOOSE(mask, a, b, type, whole) ((type)(((whole)(a) & (mask)) | ((whole)(b) & ~(mask))))
#define LARGER(a, b, type, whole) CHOOSE((a) > (b), a, b, type, whole)

static inline floats choose(ints mask, floats a, floats b) { return CHOOSE(mask, a, b, floats, ints); }

static inline floats larger(floats a, floats b) { return LARGER(a, b, floats, ints); }

// 2^x, to one part in ten millions; exactly 0 below 2^-126, so that what is masked weighs nothing
static inline floats power_of_two(floats x) {
    const floats shift = all(12582912.f);  // 1.5 * 2^23: adding it rounds to whole numbers
    floats bounded = choose(x < all(-126.f), all(-126.f), x);
    floats whole = (bounded + shift) - shift, rest = bounded - whole;
    floats y = all(1.34004e-3f) * rest + 9.67604e-3f;
    y = y * rest + 5.550327e-2f;
    y = y * rest + 2.4022107e-1f;
    y = y * rest + 6.9314721e-1f;
    y = y * rest + 1.f;
    floats power = (floats)((ints)y + (__builtin_convertvector(whole, ints) << 23));
    return choose(x < all(-126.f), all(0), power);
}

typedef union { floats whole; eight half[2]; } Wide;
typedef union { eight whole; four half[2]; } Narrow;

static inline float sum(floats x) {
    const Wide wide = {x};
    Narrow narrow = {wide.half[0]};
    if (LANES == 16) narrow.whole += wide.half[1];
    const four rest = narrow.half[0] + narrow.half[1];
    return (rest[0] + rest[2]) + (rest[1] + rest[3]);
}

static inline float largest(floats x) {
    const Wide wide = {x};
    Narrow narrow = {wide.half[0]};
    if (LANES == 16) narrow.whole = LARGER(wide.half[0], wide.half[1], eight, eight_ints);
    const four rest = LARGER(narrow.half[0], narrow.half[1], four, four_ints);
    const float a = rest[0] > rest[1] ? rest[0] : rest[1], b = rest[2] > rest[3] ? rest[2] : rest[3];
    return a > b ? a : b;
}

// numbers `at` and behind it, of float32, or of bfloat16 (`half`)
static inline floats load(const void *from, int half, long at) {
    if (half) return (floats)(__builtin_convertvector(*(const halves *)((const uint16_t *)from + at), bits) << 16);
    return *(const floats *)((const float *)from + at);
}

static inline float single(const void *from, int half, long at) {
    if (!half) return ((const float *)from)[at];
    union { uint32_t raw; float number; } wide = {(uint32_t)((const uint16_t *)from)[at] << 16};
    return wide.number;
}

// the same way back; bfloat16 is rounded to nearest, ties to even
static inline void store(void *to, int half, long at, floats x) {
    if (!half) {
        *(floats *)((float *)to + at) = x;
        return;
    }
    bits raw = (bits)x, rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
    bits none = (bits)(x != x);  // a number that is none stays none
    *(halves *)((uint16_t *)to + at) = __builtin_convertvector((rounded & ~none) | (0x7fc0 & none), halves);
}
