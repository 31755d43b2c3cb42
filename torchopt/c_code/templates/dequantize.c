/* Integers to floats. */
struct dequantize {
    int count;
    float scale;
    int zero;
};
/* ==== for each type T ==== */

static void dequantize_T(const struct dequantize *p, const T *x, float *y)
{
    int i;
    for (i = 0; i < p->count; i++)
        y[i] = (float)(x[i] - p->zero) * p->scale;
}
