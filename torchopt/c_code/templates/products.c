/* Sums of products of rows of weights with four pixels: what convolutions and linear layers spend their time in. */
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
/* ==== for each type T ==== */

/* The sums of n products of the weights w with the pixels x[0] to x[3]. */
static void dense_T(const int8_t *w, const T *const *x, int n, int32_t *sums)
{
    const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int i;
    for (i = 0; i < n; i++) {
        s0 += x0[i] * w[i];
        s1 += x1[i] * w[i];
        s2 += x2[i] * w[i];
        s3 += x3[i] * w[i];
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

/* The same of one pixel. */
static int32_t dense_one_T(const int8_t *w, const T *x, int n)
{
    int32_t sum = 0;
    int i;
    for (i = 0; i < n; i++)
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
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
    return entry;
}
#endif

/* The sums of row `row`, which starts at `data`, with `pixels` pixels (1 to 4); returns where the next row starts. */
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
        for (; pixels > 0; pixels--, x++)
            *sums++ = dense_one_T(values, *x, n);
    (void)w;
    return data;
}
