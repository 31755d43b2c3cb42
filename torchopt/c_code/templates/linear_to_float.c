/* A linear layer on integers whose results are floats: the network's last one. */
struct linear_to_float {
    struct weights weights;
    const int32_t *bias; /* with the input's zero point taken off */
    const float *ratio;  /* of each output, or one for all */
    int ratio_step;
    int rows, inputs, outputs;
};
/* ==== for each type T ==== */

static void linear_to_float_T(const struct linear_to_float *c, const T *x, float *y, void *scratch)
{
    int row, i;
    for (row = 0; row < c->rows; row++, x += c->inputs) {
        const T *const read[4] = {x, x, x, x};
        const uint8_t *data = c->weights.data;
        for (i = 0; i < c->outputs; i++) {
            int32_t sums[4 * ROWS_AT_ONCE];
            data = products_T(&c->weights, i, data, read, 1, c->inputs, scratch, sums);
            *y++ = (float)plus(sums[0], c->bias[i]) * c->ratio[i * c->ratio_step];
        }
    }
}
