/* Passes of inference over memory that torch has no quick operator for, compiled for the processor at hand by
   `skipway.kernels.native`. Numbers of 16 bits are bfloat16; sums are kept in float32. Every function takes the number
   of threads last. */

#define _GNU_SOURCE
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* to the nearest, ties to even; NaN stays NaN */
static inline uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float itself(float value) { return value; }

/* y = (x - mean) / sqrt(variance + eps) * weight + bias in each row. Both sums are those of differences from the first
   number of the row: that loses nothing where the mean is far from zero. */
#define LAYER_NORM(name, number, read, write)                                                                         \
    void name(const number *x, const number *weight, const number *bias, number *y, int64_t rows, int64_t size,       \
              float eps, int threads) {                                                                               \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")                            \
        for (int64_t row = 0; row < rows; row++) {                                                                    \
            const number *from = x + row * size;                                                                      \
            number *to = y + row * size;                                                                              \
            const float origin = read(from[0]);                                                                       \
            float sum = 0, squares = 0;                                                                               \
            for (int64_t i = 0; i < size; i++) {                                                                      \
                const float value = read(from[i]) - origin;                                                           \
                sum += value;                                                                                         \
                squares += value * value;                                                                             \
            }                                                                                                         \
            const float shift = sum / (float)size, mean = origin + shift;                                             \
            const float variance = squares / (float)size - shift * shift;                                             \
            const float scale = 1 / sqrtf((variance < 0 ? 0 : variance) + eps); /* NaN stays NaN */                   \
            for (int64_t i = 0; i < size; i++)                                                                        \
                to[i] = write((read(from[i]) - mean) * scale * read(weight[i]) + read(bias[i]));                      \
        }                                                                                                             \
    }

LAYER_NORM(skipway_layer_norm_bfloat16, uint16_t, widen, narrow)
LAYER_NORM(skipway_layer_norm_float32, float, itself, itself)

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16  /* rows of a tile, and float32 numbers or pairs of bfloat16 in one of its rows */
#define BLOCK 32 /* queries at a time: two tiles */

/* Whether this process may use tiles: the kernel is asked for their memory (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA).
 */
int skipway_has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t columns[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) Configuration;

/* e^x for x <= 0, relative error 3e-6; NaN stays NaN */
static inline __m512 exponential(__m512 x) {
    const __m512 power = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-100), x), _mm512_set1_ps(1.4426950408889634f));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(power, whole);
    __m512 value = _mm512_set1_ps(0.009560510516166687f);
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.05591703951358795f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.24024981260299683f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.6931219696998596f));
    value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.9999991655349731f));
    return _mm512_scalef_ps(value, whole);
}

static inline __mmask16 first(int64_t count) { return count >= TILE ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

static inline __m512 load_wide(const uint16_t *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

/* Keys as the second factor of q kᵀ: tiles of 16 pairs of dimensions by 16 keys, those of one group of keys together. */
static void pack_keys(const uint16_t *k, int64_t step, int64_t keys, int64_t dims, int64_t depth, uint32_t *to) {
    const __m512i apart = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)step));
    for (int64_t group = 0; group < keys; group += TILE) {
        const __mmask16 mask = first(keys - group);
        for (int64_t pair = 0; pair < depth / 2; pair++, to += TILE) {
            __m512i row = _mm512_setzero_si512();
            if (pair < dims / 2) row = _mm512_mask_i32gather_epi32(row, mask, apart, k + group * step + 2 * pair, 2);
            _mm512_store_si512(to, row);
        }
    }
}

/* Values as the second factor of p v: tiles of 16 pairs of keys by 16 dimensions, those of 32 keys together. */
static void pack_values(const uint16_t *v, int64_t step, int64_t keys, int64_t dims, int64_t depth, uint32_t *to) {
    for (int64_t group = 0; group < keys; group += 2 * TILE)
        for (int64_t dim = 0; dim < depth; dim += TILE)
            for (int64_t pair = 0; pair < TILE; pair++, to += TILE) {
                const int64_t key = group + 2 * pair;
                const __mmask16 low = key < keys ? first(dims - dim) : 0, high = key + 1 < keys ? low : 0;
                const uint16_t *from = v + key * step + dim;
                const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low, from));
                const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high, from + step));
                _mm512_store_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
}

/* c = a b for 32 rows: a (32, inner) bfloat16, b in tiles, those of `wide` columns in a row of 32 numbers apart by
   `across` and of the next 32 numbers of `inner` by `down` (in pairs); c (32, outer) float32. outer is a multiple of 16. */
static void multiply(const uint16_t *a, const uint32_t *b, float *c, int64_t inner, int64_t outer, int64_t across,
                     int64_t down) {
    for (int64_t column = 0; column < outer; column += 2 * TILE) {
        const int both = column + TILE < outer;
        const uint32_t *left = b + column / TILE * across, *right = left + across;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t at = 0; at < inner; at += 2 * TILE, left += down, right += down) {
            _tile_loadd(4, a + at, inner * 2);
            _tile_loadd(5, a + TILE * inner + at, inner * 2);
            _tile_loadd(6, left, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
            if (both) {
                _tile_loadd(7, right, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, c + column, outer * 4);
        _tile_stored(1, c + TILE * outer + column, outer * 4);
        if (both) {
            _tile_stored(2, c + column + TILE, outer * 4);
            _tile_stored(3, c + TILE * outer + column + TILE, outer * 4);
        }
    }
}

/* scale x + bias, -inf where the mask ends */
static inline __m512 scaled(const float *x, const uint16_t *bias, __m512 scale, __mmask16 mask) {
    __m512 value = _mm512_mul_ps(_mm512_load_ps(x), scale);
    if (bias) value = _mm512_add_ps(value, load_wide(bias, mask));
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, value);
}

/* to = e^(scale x + bias - its maximum), bfloat16; returns 1 / its sum, 0 for a row that is hidden. */
static float weigh(float *x, const uint16_t *bias, float scale, int64_t keys, uint16_t *to) {
    const __m512 factor = _mm512_set1_ps(scale);
    const int64_t full = keys / TILE * TILE;
    __m512 largest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t i = 0; i < full; i += TILE) {
        const __m512 value = scaled(x + i, bias ? bias + i : NULL, factor, 0xffff);
        largest = _mm512_max_ps(largest, value);
        _mm512_store_ps(x + i, value);
    }
    if (full < keys) {
        const __m512 value = scaled(x + full, bias ? bias + full : NULL, factor, first(keys - full));
        largest = _mm512_max_ps(largest, value);
        _mm512_store_ps(x + full, value);
    }
    const float top = _mm512_reduce_max_ps(largest);
    const __m512 most = _mm512_set1_ps(top == -INFINITY ? 0 : top);
#pragma GCC unroll 4
    for (int64_t i = 0; i < full; i += TILE) {
        const __m512 value = exponential(_mm512_sub_ps(_mm512_load_ps(x + i), most));
        sum = _mm512_add_ps(sum, value);
        _mm256_store_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(value));
    }
    if (full < keys) {
        const __m512 value = exponential(_mm512_sub_ps(_mm512_load_ps(x + full), most));
        const __m512 kept = _mm512_maskz_mov_ps(first(keys - full), value);
        sum = _mm512_add_ps(sum, kept);
        _mm256_store_si256((__m256i *)(to + full), (__m256i)_mm512_cvtneps_pbh(kept));
    }
    return top == -INFINITY ? 0 : 1 / _mm512_reduce_add_ps(sum);
}

/* The number of this thread within a parallel region. */
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* out = softmax(scale q kᵀ + bias) v. q (images, heads, rows, dims) and k, v with `keys` in place of rows are given by
   their steps in numbers along the first three axes; out is (images, rows, heads, dims) without gaps, and bias (windows,
   heads, rows, keys), for image n the window n modulo `windows`, or NULL. dims is even. Returns 0, or 1 without memory. */
int skipway_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *bias, uint16_t *out,
                       const int64_t *steps, int64_t images, int64_t heads, int64_t rows, int64_t keys, int64_t dims,
                       int64_t windows, float scale, int threads) {
    const int64_t depth = (dims + 31) / 32 * 32, padded = (keys + 31) / 32 * 32, groups = (keys + 15) / 16 * 16;
    const size_t packed = (size_t)padded * depth * 2, size = 2 * packed + (size_t)BLOCK * (padded + depth) * 6;
    char *memory = aligned_alloc(64, size * (threads > 1 ? threads : 1));
    if (memory == NULL) return 1;
    Configuration tiles = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) tiles.rows[tile] = TILE, tiles.columns[tile] = 64;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *mine = memory + size * THREAD;
        uint32_t *key = (uint32_t *)mine, *value = (uint32_t *)(mine + packed);
        float *logits = (float *)(mine + 2 * packed), *sums = logits + BLOCK * padded;
        uint16_t *query = (uint16_t *)(sums + BLOCK * depth), *weights = query + BLOCK * depth;
        Configuration before; /* of whoever else computes in tiles on this thread */
        _tile_storeconfig(&before);
        _tile_loadconfig(&tiles);
        memset(query, 0, BLOCK * depth * 2);
        memset(weights, 0, BLOCK * padded * 2);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < images * heads; at++) {
            const int64_t image = at / heads, head = at % heads;
            pack_keys(k + image * steps[3] + head * steps[4], steps[5], keys, dims, depth, key);
            pack_values(v + image * steps[6] + head * steps[7], steps[8], keys, dims, depth, value);
            const uint16_t *from = q + image * steps[0] + head * steps[1];
            const uint16_t *biases = bias ? bias + (image % windows * heads + head) * rows * keys : NULL;
            uint16_t *to = out + image * rows * heads * dims + head * dims;
            for (int64_t top = 0; top < rows; top += BLOCK) {
                const int64_t count = rows - top < BLOCK ? rows - top : BLOCK;
                float factors[BLOCK];
                for (int64_t row = 0; row < count; row++)
                    memcpy(query + row * depth, from + (top + row) * steps[2], dims * 2);
                multiply(query, key, logits, depth, groups, depth / 2 * TILE, TILE * TILE);
                for (int64_t row = 0; row < count; row++)
                    factors[row] = weigh(logits + row * groups, biases ? biases + (top + row) * keys : NULL, scale, keys,
                                         weights + row * padded);
                multiply(weights, value, sums, padded, depth, TILE * TILE, depth * TILE);
                for (int64_t row = 0; row < count; row++)
                    for (int64_t dim = 0; dim < dims; dim += TILE) {
                        const __m512 sum = _mm512_load_ps(sums + row * depth + dim);
                        const __m512 x = _mm512_mul_ps(sum, _mm512_set1_ps(factors[row]));
                        _mm256_mask_storeu_epi16(to + (top + row) * heads * dims + dim, first(dims - dim),
                                                 (__m256i)_mm512_cvtneps_pbh(x));
                    }
            }
        }
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
    free(memory);
    return 0;
}

#else

int skipway_has_tiles(void) { return 0; }

#endif
