/* Sums of integers on grids; the second one may have fewer elements, each read `inner` times in a row and all of them again and again. */
struct add {
    int outer, count, inner;
    float ratio_a, ratio_b, fixed;
    int low, high;
};
/* ==== for each type T ==== */

static void add_T(const struct add *p, const T *a, const T *b, T *y)
{
    int outer, k, i;
    for (outer = 0; outer < p->outer; outer++)
        for (k = 0; k < p->count; k++) {
            const float rest = fmaf((float)b[k], p->ratio_b, p->fixed);
            for (i = 0; i < p->inner; i++) {
                const int32_t sum = nearest(fmaf((float)*a++, p->ratio_a, rest));
                *y++ = (T)(sum < p->low ? p->low : sum > p->high ? p->high : sum);
            }
        }
}
