/* The mean of floats: of `size` numbers, `step` apart. */
struct float_mean {
    int outer, size, step;
};

static void float_mean_f32(const struct float_mean *p, const float *x, float *y)
{
    int outer, i, k;
    for (outer = 0; outer < p->outer; outer++, x += p->size * p->step)
        for (k = 0; k < p->step; k++) {
            float sum = 0;
            for (i = 0; i < p->size; i++)
                sum += x[i * p->step + k];
            *y++ = sum / (float)p->size;
        }
}
