/* A convolution on integers, of any groups, and a linear layer, whose rows are its pixels. */
struct conv {
    struct weights weights;
    const int32_t *bias;  /* with the input's zero point taken off */
    const float *ratio;   /* of each output channel, or one for all */
    int ratio_step;       /* 1 or 0 */
    int in_height, in_width, in_channels;
    int out_height, out_width, out_channels;
    int kernel_height, kernel_width;
    int stride_y, stride_x, dilation_y, dilation_x;
    int pad_top, pad_left;
    int groups;
    int in_zero, out_zero;
    float low, high; /* the ends of the output, without its zero point */
};
/* ==== for each type T ==== */

/* Copy what one output pixel reads of one group into a row; outside the picture lies the zero point. */
static void gather_T(const struct conv *c, const T *x, int line, int column, int first, int channels, T *row)
{
    const int top = line * c->stride_y - c->pad_top, left = column * c->stride_x - c->pad_left;
    const int whole = c->groups == 1 && c->dilation_x == 1 && left >= 0 && left + c->kernel_width <= c->in_width;
    int ky, kx, i;
    for (ky = 0; ky < c->kernel_height; ky++) {
        const int y = top + ky * c->dilation_y;
        if (whole && y >= 0 && y < c->in_height) { /* the kernel's line lies in one piece */
            memcpy(row, x + (y * c->in_width + left) * channels, (size_t)(c->kernel_width * channels) * sizeof(T));
            row += c->kernel_width * channels;
            continue;
        }
        for (kx = 0; kx < c->kernel_width; kx++, row += channels) {
            const int at = left + kx * c->dilation_x;
            if (y < 0 || y >= c->in_height || at < 0 || at >= c->in_width)
                for (i = 0; i < channels; i++)
                    row[i] = (T)c->in_zero;
            else
                memcpy(row, x + (y * c->in_width + at) * c->in_channels + first, (size_t)channels * sizeof(T));
        }
    }
}

/* Round the sums of `count` channels from `first` on to their grid. */
static void rounded_T(const struct conv *c, int first, int count, const int32_t *sums, T *y)
{
    const int32_t *bias = c->bias + first;
    const float *ratio = c->ratio + first * c->ratio_step;
    int i;
    if (c->ratio_step)
        for (i = 0; i < count; i++)
            y[i] = (T)(requantized(plus(sums[i], bias[i]), ratio[i], c->low, c->high) + c->out_zero);
    else
        for (i = 0; i < count; i++)
            y[i] = (T)(requantized(plus(sums[i], bias[i]), *ratio, c->low, c->high) + c->out_zero);
}

static void conv_T(const struct conv *c, const T *x, T *y, void *scratch)
{
    const int channels = c->in_channels / c->groups, outputs = c->out_channels / c->groups;
    const int pixels = c->out_height * c->out_width;
    const int taps = c->kernel_height * c->kernel_width * channels;
    const int direct = c->kernel_height * c->kernel_width == 1 && !c->pad_top && !c->pad_left
                       && (c->out_height - 1) * c->stride_y < c->in_height && (c->out_width - 1) * c->stride_x < c->in_width;
    T *rows = scratch;
    int8_t *unpacked_row = (int8_t *)scratch + (direct ? 0 : 4 * (size_t)taps);
    int pixel, group, i, line = 0, column = 0;
    for (pixel = 0; pixel < pixels; pixel += 4) {
        const int count = pixels - pixel < 4 ? pixels - pixel : 4;
        const uint8_t *data = c->weights.data;
        int lines[4], columns[4];
        for (i = 0; i < 4; i++) { /* where these pixels are; the last ones stand in for those that are not */
            lines[i] = line;
            columns[i] = column;
            if (i < count && pixel + i + 1 < pixels && ++column == c->out_width) {
                column = 0;
                line++;
            }
        }
        for (group = 0; group < c->groups; group++) {
            const T *read[4];
            int first;
            for (i = 0; i < 4; i++)
                if (direct) {
                    const int at = lines[i] * c->stride_y * c->in_width + columns[i] * c->stride_x;
                    read[i] = x + at * c->in_channels + group * channels;
                } else {
                    read[i] = rows + (i < count ? i : 0) * taps;
                    if (i < count)
                        gather_T(c, x, lines[i], columns[i], group * channels, channels, rows + i * taps);
                }
            for (first = group * outputs; first < (group + 1) * outputs; first += ROWS_AT_ONCE) {
                const int left = (group + 1) * outputs - first, many = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
                int32_t sums[4 * ROWS_AT_ONCE];
                for (i = 0; i < many; i++)
                    data = products_T(&c->weights, first + i, data, read, count, taps, unpacked_row, sums + i);
                for (i = 0; i < count; i++)
                    rounded_T(c, first, many, sums + i * ROWS_AT_ONCE, y + (pixel + i) * c->out_channels + first);
            }
        }
    }
}
