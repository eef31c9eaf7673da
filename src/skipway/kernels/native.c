/* Passes of inference over memory that torch has no quick operator for, compiled for the processor at hand by
   `skipway.kernels.native`. Numbers of 16 bits are bfloat16; sums are kept in float32. Every function takes the number
   of threads last. */

#define _GNU_SOURCE
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The number of this thread within a parallel region. */
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

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

/* y = (x - mean) / sqrt(variance + eps) * weight + bias in each row, in two passes: the second one over differences from
   the mean, whose own sum says what rounding took from it. So neither a mean far from zero nor an outlier costs. */
#define SUMS 64
#define LAYER_NORM(name, number, read, write)                                                                         \
    void name(const number *x, const number *weight, const number *bias, number *y, int64_t rows, int64_t size,       \
              float eps, int threads) {                                                                               \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")                            \
        for (int64_t row = 0; row < rows; row++) {                                                                    \
            const number *from = x + row * size;                                                                      \
            number *to = y + row * size;                                                                              \
            float sums[SUMS] = {0}, rests[SUMS] = {0}, squares[SUMS] = {0}, sum = 0, rest = 0, square = 0;            \
            const int64_t full = size / SUMS * SUMS;                                                                  \
            for (int64_t i = 0; i < full; i += SUMS)                                                                  \
                for (int at = 0; at < SUMS; at++) sums[at] += read(from[i + at]);                                     \
            for (int64_t i = full; i < size; i++) sums[i - full] += read(from[i]);                                    \
            for (int at = 0; at < SUMS; at++) sum += sums[at];                                                        \
            const float rough = sum / (float)size;                                                                    \
            for (int64_t i = 0; i < full; i += SUMS)                                                                  \
                for (int at = 0; at < SUMS; at++) {                                                                   \
                    const float value = read(from[i + at]) - rough;                                                   \
                    rests[at] += value;                                                                               \
                    squares[at] += value * value;                                                                     \
                }                                                                                                     \
            for (int64_t i = full; i < size; i++) {                                                                   \
                const float value = read(from[i]) - rough;                                                            \
                rests[i - full] += value;                                                                             \
                squares[i - full] += value * value;                                                                   \
            }                                                                                                         \
            for (int at = 0; at < SUMS; at++) rest += rests[at], square += squares[at];                               \
            const float shift = rest / (float)size, mean = rough + shift;                                             \
            const float variance = square / (float)size - shift * shift;                                              \
            const float scale = 1 / sqrtf((variance < 0 ? 0 : variance) + eps); /* NaN stays NaN */                   \
            for (int64_t i = 0; i < size; i++)                                                                        \
                to[i] = write((read(from[i]) - mean) * scale * read(weight[i]) + read(bias[i]));                      \
        }                                                                                                             \
    }

LAYER_NORM(skipway_layer_norm_bfloat16, uint16_t, widen, narrow)
LAYER_NORM(skipway_layer_norm_float32, float, itself, itself)

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>

#define LANES 16 /* float32 numbers of a vector */

static inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

static inline __m512 load_wide(const uint16_t *from, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

static inline void store_narrow(uint16_t *to, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

/* Phi(t) - 1/2 = C[0] + C[1] t + C[2] t² for t >= 0, by least squares in sixteen segments of which the middles are
   multiples of WIDTH; off by 4e-5 at most, and x Phi(x) by 1e-4. It is
   1/2 in the last one. */
#define WIDTH 0.28f
static const float PHI[3][LANES] = {
    {-5.66394335e-06f, -0.00109759126f, -0.00822117837f, -0.0185436779f, -0.0193897567f, 0.00405651032f,
     0.0587890584f, 0.139344678f, 0.231011755f, 0.317458063f, 0.387342996f, 0.436732621f,
     0.467633404f, 0.48489752f, 0.493564652f, 0.5f},
    {0.399671307f, 0.412673728f, 0.446957043f, 0.477212156f, 0.479713671f, 0.443045266f,
     0.372203852f, 0.283660587f, 0.196187383f, 0.123329045f, 0.0705959747f, 0.0368631432f,
     0.0175875661f, 0.00767777901f, 0.00307052783f, 0.0f},
    {-0.0139117905f, -0.0534493665f, -0.0950749592f, -0.117304144f, -0.118979008f, -0.104631111f,
     -0.0816929731f, -0.0573503573f, -0.0364749405f, -0.0211190974f, -0.0111692144f, -0.00540837054f,
     -0.00240196818f, -0.000979721256f, -0.000367384561f, 0.0f},
};

/* x Phi(x), where x may be any number */
static inline __m512 gelu(__m512 x) {
    const __m512 size = _mm512_abs_ps(x), bounded = _mm512_min_ps(_mm512_set1_ps(15 * WIDTH), size);
    /* adding 1.5 * 2^23 rounds to a whole number, which is then in the lowest bits */
    const __m512 at = _mm512_fmadd_ps(bounded, _mm512_set1_ps(1 / WIDTH), _mm512_set1_ps(12582912));
    const __m512i segment = _mm512_castps_si512(at);
    __m512 phi = _mm512_permutexvar_ps(segment, _mm512_loadu_ps(PHI[2]));
    phi = _mm512_fmadd_ps(phi, bounded, _mm512_permutexvar_ps(segment, _mm512_loadu_ps(PHI[1])));
    phi = _mm512_fmadd_ps(phi, bounded, _mm512_permutexvar_ps(segment, _mm512_loadu_ps(PHI[0])));
    return _mm512_fmadd_ps(size, phi, _mm512_mul_ps(x, _mm512_set1_ps(0.5f)));
}

int skipway_has_vectors(void) { return 1; }

#define CHUNK 4096

/* x = x Phi(x) in place */
void skipway_gelu(uint16_t *x, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t start = 0; start < size; start += CHUNK) {
        uint16_t *from = x + start;
        const int64_t count = size - start < CHUNK ? size - start : CHUNK, full = count / LANES * LANES;
#pragma GCC unroll 4
        for (int64_t i = 0; i < full; i += LANES) store_narrow(from + i, 0xffff, gelu(load_wide(from + i, 0xffff)));
        const __mmask16 mask = first(count - full);
        store_narrow(from + full, mask, gelu(load_wide(from + full, mask)));
    }
}

/* The larger number in each lane, NaN where one of them is */
static inline __m512 larger(__m512 a, __m512 b) {
    const __mmask16 unordered = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), unordered, a); /* max returns b where a or b is NaN */
}

/* y (images, down, across, channels) = the largest numbers of windows of x (images, height, width, channels), whose sides
   are `side`, `stride` apart, the first one `before` outside of x. */
void skipway_max_pool(const uint16_t *x, uint16_t *y, int64_t images, int64_t height, int64_t width, int64_t channels,
                      int64_t down, int64_t across, int64_t side, int64_t stride, int64_t before, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < images * down; row++) {
        const uint16_t *plane = x + row / down * height * width * channels;
        const int64_t top = row % down * stride - before;
        for (int64_t column = 0; column < across; column++) {
            const int64_t left = column * stride - before;
            for (int64_t channel = 0; channel < channels; channel += LANES) {
                const __mmask16 mask = first(channels - channel);
                __m512 most = _mm512_set1_ps(-INFINITY);
                for (int64_t at = top < 0 ? 0 : top; at < top + side && at < height; at++)
                    for (int64_t to = left < 0 ? 0 : left; to < left + side && to < width; to++)
                        most = larger(most, load_wide(plane + (at * width + to) * channels + channel, mask));
                store_narrow(y + (row * across + column) * channels + channel, mask, most);
            }
        }
    }
}

#define ACROSS 7 /* outputs at a time along a row: 56, 28, 14 and 7 are multiples of it */

/* One row of outputs of 16 channels: rows[j] is input row y + j - side / 2 with side / 2 zeros before it. */
static inline __attribute__((always_inline)) void convolve_row(const int side, const float *const *rows,
                                                               const float *weight, __m512 bias, uint16_t *to,
                                                               int64_t width, int64_t channels, __mmask16 mask) {
    for (int64_t x = 0; x < width; x += ACROSS) {
        __m512 sums[ACROSS];
#pragma GCC unroll 7
        for (int i = 0; i < ACROSS; i++) sums[i] = bias;
        for (int row = 0; row < side; row++) {
            const float *from = rows[row] + x * LANES, *kernel = weight + row * side * LANES;
            __m512 factors[7];
#pragma GCC unroll 7
            for (int tap = 0; tap < side; tap++) factors[tap] = _mm512_load_ps(kernel + tap * LANES);
#pragma GCC unroll 13
            for (int at = 0; at < ACROSS + side - 1; at++) {
                const __m512 value = _mm512_load_ps(from + at * LANES);
#pragma GCC unroll 7
                for (int tap = 0; tap < side; tap++)
                    if (at - tap >= 0 && at - tap < ACROSS)
                        sums[at - tap] = _mm512_fmadd_ps(value, factors[tap], sums[at - tap]);
            }
        }
#pragma GCC unroll 7
        for (int i = 0; i < ACROSS; i++)
            if (x + i < width) store_narrow(to + (x + i) * channels, mask, sums[i]);
    }
}

static inline __attribute__((always_inline)) void convolve_plane(const int side, const uint16_t *x,
                                                                 const uint16_t *weight, const uint16_t *bias,
                                                                 uint16_t *y, int64_t height, int64_t width,
                                                                 int64_t channels, int64_t channel, float *memory) {
    const int64_t padded = (width + ACROSS - 1) / ACROSS * ACROSS + side - 1;
    const __mmask16 mask = first(channels - channel);
    float *kernel = memory, *nothing = memory + side * side * LANES, *ring = nothing + padded * LANES;
    memset(memory, 0, (side * side + padded * (side + 1)) * LANES * sizeof(float));
    for (int64_t lane = 0; lane < LANES && channel + lane < channels; lane++)
        for (int tap = 0; tap < side * side; tap++)
            kernel[tap * LANES + lane] = widen(weight[(channel + lane) * side * side + tap]);
    const __m512 shift = bias ? load_wide(bias + channel, mask) : _mm512_setzero_ps();
    for (int64_t row = -(side / 2); row < height; row++) {
        const int64_t next = row + side / 2; /* the input row that is read now */
        if (next < height) {
            float *to = ring + next % side * padded * LANES + side / 2 * LANES;
            const uint16_t *from = x + next * width * channels + channel;
            for (int64_t at = 0; at < width; at++)
                _mm512_store_ps(to + at * LANES, load_wide(from + at * channels, mask));
        }
        if (row < 0) continue;
        const float *rows[7];
        for (int tap = 0; tap < side; tap++) {
            const int64_t at = row + tap - side / 2;
            rows[tap] = at < 0 || at >= height ? nothing : ring + at % side * padded * LANES;
        }
        convolve_row(side, rows, kernel, shift, y + row * width * channels + channel, width, channels, mask);
    }
}

/* y = a depthwise convolution of x (images, height, width, channels) with kernels (channels, side, side), as large as x;
   bias is NULL or one number for each channel, and side 3, 5 or 7. Returns 0, or 1 without memory. */
int skipway_depthwise(const uint16_t *x, const uint16_t *weight, const uint16_t *bias, uint16_t *y, int64_t images,
                      int64_t height, int64_t width, int64_t channels, int64_t side, int threads) {
    const int64_t padded = (width + ACROSS - 1) / ACROSS * ACROSS + side - 1;
    const int64_t groups = (channels + LANES - 1) / LANES, size = (side * side + padded * (side + 1)) * LANES;
    float *memory = aligned_alloc(64, size * (threads > 1 ? threads : 1) * sizeof(float));
    if (memory == NULL) return 1;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t at = 0; at < images * groups; at++) {
        const int64_t image = at / groups * height * width * channels, channel = at % groups * LANES;
        float *mine = memory + size * THREAD;
#define PLANE(side) \
    convolve_plane(side, x + image, weight, bias, y + image, height, width, channels, channel, mine)
        if (side == 7) PLANE(7);
        else if (side == 5) PLANE(5);
        else PLANE(3);
    }
    free(memory);
    return 0;
}

#else

int skipway_has_vectors(void) { return 0; }

#endif

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <sys/syscall.h>
#include <unistd.h>

/* What was stored is in memory: compilers do not know that loads of tiles read it. */
#define WRITTEN __asm__ volatile("" ::: "memory")
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
    WRITTEN;
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

/* out = softmax(scale q kᵀ + bias) v. q (images, heads, rows, dims) and k, v with `keys` in place of rows are given by
   their steps in numbers along the first three axes; out is (images, rows, heads, dims) without gaps, and bias (windows,
   sheets, rows, keys), for image n the window n modulo `windows` and for all heads the same where there is one sheet, or
   NULL. dims is even. Returns 0, or 1 without memory. */
int skipway_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, const uint16_t *bias, uint16_t *out,
                       const int64_t *steps, int64_t images, int64_t heads, int64_t rows, int64_t keys, int64_t dims,
                       int64_t windows, int64_t sheets, float scale, int threads) {
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
        WRITTEN;
        _tile_loadconfig(&tiles);
        memset(query, 0, BLOCK * depth * 2);
        memset(weights, 0, BLOCK * padded * 2);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < images * heads; at++) {
            const int64_t image = at / heads, head = at % heads;
            pack_keys(k + image * steps[3] + head * steps[4], steps[5], keys, dims, depth, key);
            pack_values(v + image * steps[6] + head * steps[7], steps[8], keys, dims, depth, value);
            const uint16_t *from = q + image * steps[0] + head * steps[1];
            const uint16_t *biases = bias ? bias + (image % windows * sheets + head % sheets) * rows * keys : NULL;
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
                        store_narrow(to + (top + row) * heads * dims + dim, first(dims - dim), x);
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
