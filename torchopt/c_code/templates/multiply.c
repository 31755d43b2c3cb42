/* Products of integers on grids; the second one may have fewer elements, each read `inner` times in a row and all again and again. */
struct multiply {
    int outer, count, inner;
    int zero_a, zero_b;
    float ratio, zero;
    int low, high;
};
/* ==== for each type T ==== */

static void multiply_T(const struct multiply *p, const T *a, const T *b, T *y)
{
    int outer, k, i;
    for (outer = 0; outer < p->outer; outer++)
        for (k = 0; k < p->count; k++)
            for (i = 0; i < p->inner; i++) {
                const float product = (float)((*a++ - p->zero_a) * (b[k] - p->zero_b)) * p->ratio;
                const int32_t value = nearest(product + p->zero);
                *y++ = (T)(value < p->low ? p->low : value > p->high ? p->high : value);
            }
}
