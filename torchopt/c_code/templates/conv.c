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
static void gather_T(const struct conv *c, const T *x, int pixel, int first, int channels, T *row)
{
    const int top = pixel / c->out_width * c->stride_y - c->pad_top;
    const int left = pixel % c->out_width * c->stride_x - c->pad_left;
    int ky, kx, i;
    for (ky = 0; ky < c->kernel_height; ky++) {
        const int y = top + ky * c->dilation_y;
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

static void conv_T(const struct conv *c, const T *x, T *y, void *scratch)
{
    const int channels = c->in_channels / c->groups, outputs = c->out_channels / c->groups;
    const int pixels = c->out_height * c->out_width;
    const int taps = c->kernel_height * c->kernel_width * channels;
    const int direct = c->kernel_height * c->kernel_width == 1 && !c->pad_top && !c->pad_left
                       && (c->out_height - 1) * c->stride_y < c->in_height && (c->out_width - 1) * c->stride_x < c->in_width;
    T *rows = scratch;
    int8_t *unpacked_row = (int8_t *)scratch + (direct ? 0 : 4 * (size_t)taps);
    int pixel, group, i;
    for (pixel = 0; pixel < pixels; pixel += 4) {
        const int count = pixels - pixel < 4 ? pixels - pixel : 4;
        const uint8_t *data = c->weights.data;
        for (group = 0; group < c->groups; group++) {
            const T *read[4];
            int channel;
            for (i = 0; i < 4; i++) {
                const int at = pixel + (i < count ? i : 0);
                if (direct) {
                    const int line = at / c->out_width * c->stride_y, column = at % c->out_width * c->stride_x;
                    read[i] = x + (line * c->in_width + column) * c->in_channels + group * channels;
                } else {
                    read[i] = rows + (i < count ? i : 0) * taps;
                    if (i < count)
                        gather_T(c, x, at, group * channels, channels, rows + i * taps);
                }
            }
            for (channel = group * outputs; channel < (group + 1) * outputs; channel++) {
                int32_t sums[4];
                const float ratio = c->ratio[channel * c->ratio_step];
                data = products_T(&c->weights, channel, data, read, count, taps, unpacked_row, sums);
                for (i = 0; i < count; i++)
                    y[(pixel + i) * c->out_channels + channel] =
                        (T)(requantized(sums[i] + c->bias[channel], ratio, c->low, c->high) + c->out_zero);
            }
        }
    }
}
