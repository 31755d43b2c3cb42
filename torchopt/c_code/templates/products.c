/* Sums of products of rows of weights with four pixels: what convolutions and linear layers spend their time in. */
#define ROWS_AT_ONCE 16 /* whose sums wait for their rounding together */

enum form { DENSE, CODES, RUNS, RUNS4 };

struct weights {
    enum form form;
    int table_step;         /* 16 where each row has a table of its own, else 0 */
    const void *data;       /* rows, one after another */
    const int8_t *table;    /* of 16 values, for CODES and RUNS4 */
    const uint16_t *counts; /* entries of each row, for RUNS and RUNS4 */
};
#if USES_CODES

/* Write the n weights of a row of codes, and return where the next row starts. */
static const uint8_t *unpacked(const uint8_t *code, const int8_t *table, int n, int8_t *row)
{
    for (; n > 1; n -= 2) {
        *row++ = table[*code & 15];
        *row++ = table[*code++ >> 4];
    }
    if (n > 0)
        *row = table[*code++ & 15];
    return code;
}
#endif
#if defined(__ARM_FEATURE_DSP) && !defined(TORCHOPT_PORTABLE)
#define PAIRS 1 /* two products at once, of 16 bits each, with exact sums: Cortex-M4 and above */

static inline uint32_t word_at(const void *bytes)
{
    uint32_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static inline int32_t two_products(uint32_t a, uint32_t b, int32_t sum)
{
    int32_t result;
    __asm__("smlad %0, %1, %2, %3" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

/* The bytes 0 and 2, or 1 and 3, of a word as two values of 16 bits. */
static inline uint32_t even_s8(uint32_t word)
{
    uint32_t result;
    __asm__("sxtb16 %0, %1" : "=r"(result) : "r"(word));
    return result;
}

static inline uint32_t odd_s8(uint32_t word)
{
    uint32_t result;
    __asm__("sxtb16 %0, %1, ror #8" : "=r"(result) : "r"(word));
    return result;
}

static inline uint32_t even_u8(uint32_t word)
{
    uint32_t result;
    __asm__("uxtb16 %0, %1" : "=r"(result) : "r"(word));
    return result;
}

static inline uint32_t odd_u8(uint32_t word)
{
    uint32_t result;
    __asm__("uxtb16 %0, %1, ror #8" : "=r"(result) : "r"(word));
    return result;
}
#endif
/* ==== for each type T ==== */

/* The sums of n products of the weights w with the pixels x[0] to x[3]. */
static void dense_T(const int8_t *w, const T *const *x, int n, int32_t *sums)
{
    const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int i = 0;
#ifdef PAIRS
    const int8_t *end = w + (n & ~3);
    while (w != end) { /* each word is used up before the next is read: all fits into registers */
        uint32_t word = word_at(w);
        const uint32_t even = even_s8(word), odd = odd_s8(word);
        w += 4;
        word = word_at(x0);
        x0 += 4;
        s0 = two_products(odd_T(word), odd, two_products(even_T(word), even, s0));
        word = word_at(x1);
        x1 += 4;
        s1 = two_products(odd_T(word), odd, two_products(even_T(word), even, s1));
        word = word_at(x2);
        x2 += 4;
        s2 = two_products(odd_T(word), odd, two_products(even_T(word), even, s2));
        word = word_at(x3);
        x3 += 4;
        s3 = two_products(odd_T(word), odd, two_products(even_T(word), even, s3));
    }
    n &= 3;
#endif
    for (; i < n; i++) {
        s0 += x0[i] * w[i];
        s1 += x1[i] * w[i];
        s2 += x2[i] * w[i];
        s3 += x3[i] * w[i];
    }
    sums[0] = s0;
    sums[ROWS_AT_ONCE] = s1;
    sums[2 * ROWS_AT_ONCE] = s2;
    sums[3 * ROWS_AT_ONCE] = s3;
}

/* The same of one pixel. */
static int32_t dense_one_T(const int8_t *w, const T *x, int n)
{
    int32_t sum = 0;
    int i = 0;
#ifdef PAIRS
    for (; i + 4 <= n; i += 4) {
        const uint32_t weights = word_at(w + i), a = word_at(x + i);
        sum = two_products(odd_T(a), odd_s8(weights), two_products(even_T(a), even_s8(weights), sum));
    }
#endif
    for (; i < n; i++)
        sum += x[i] * w[i];
    return sum;
}
#if USES_RUNS || USES_RUNS4

/* The same where zeros are skipped: each entry says how many, and which weight comes then. */
static const uint8_t *runs_T(const uint8_t *entry, int count, const int8_t *table, const T *const *x, int32_t *sums)
{
    const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    const uint8_t *end;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int i = -1;
#if USES_RUNS
    if (!table) {
        for (end = entry + 2 * count; entry != end; entry += 2) {
            const int32_t w = (int8_t)entry[1];
            i += entry[0] + 1;
            s0 += x0[i] * w;
            s1 += x1[i] * w;
            s2 += x2[i] * w;
            s3 += x3[i] * w;
        }
    }
#endif
#if USES_RUNS4
    if (table) {
        for (end = entry + count; entry != end; entry++) {
            const int32_t w = table[*entry & 15];
            i += (*entry >> 4) + 1;
            s0 += x0[i] * w;
            s1 += x1[i] * w;
            s2 += x2[i] * w;
            s3 += x3[i] * w;
        }
    }
#endif
    sums[0] = s0;
    sums[ROWS_AT_ONCE] = s1;
    sums[2 * ROWS_AT_ONCE] = s2;
    sums[3 * ROWS_AT_ONCE] = s3;
    return entry;
}
#endif

/* The sums of row `row`, which starts at `data`, with `pixels` pixels (1 to 4), ROWS_AT_ONCE apart; returns where the next row starts. */
static const uint8_t *products_T(const struct weights *w, int row, const uint8_t *data, const T *const *x, int pixels, int n,
                                 int8_t *unpacked_row, int32_t *sums)
{
    const int8_t *values = (const int8_t *)data;
    (void)row;
    (void)unpacked_row;
#if USES_RUNS || USES_RUNS4
    if (w->form == RUNS || w->form == RUNS4)
        return runs_T(data, w->counts[row], w->table ? w->table + row * w->table_step : 0, x, sums);
#endif
#if USES_CODES
    if (w->form == CODES) {
        data = unpacked(data, w->table + row * w->table_step, n, unpacked_row);
        values = unpacked_row;
    } else
#endif
        data += n;
    if (pixels == 4)
        dense_T(values, x, n, sums);
    else
        for (; pixels > 0; pixels--, x++, sums += ROWS_AT_ONCE)
            *sums = dense_one_T(values, *x, n);
    (void)w;
    return data;
}
