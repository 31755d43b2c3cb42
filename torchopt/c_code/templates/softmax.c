/* Rows of floats as shares of 1, or their logarithms. */
struct softmax {
    int rows, size, logarithm;
};

static void softmax_f32(const struct softmax *p, const float *x, float *y)
{
    int row, i;
    for (row = 0; row < p->rows; row++, x += p->size, y += p->size) {
        float largest = x[0], sum = 0;
        for (i = 1; i < p->size; i++)
            largest = x[i] > largest ? x[i] : largest;
        for (i = 0; i < p->size; i++) {
            y[i] = x[i] - largest;
            sum += expf(y[i]);
        }
        for (i = 0; i < p->size; i++)
            y[i] = p->logarithm ? y[i] - logf(sum) : expf(y[i]) / sum;
    }
}
