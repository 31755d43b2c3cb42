/* A convolution on integers that gives each channel a kernel of its own. */
#ifndef CHANNELS_AT_ONCE
#if defined(__x86_64__) || defined(__aarch64__)
#define CHANNELS_AT_ONCE 32 /* as vector units like it */
#else
#define CHANNELS_AT_ONCE 4 /* as registers hold */
#endif
#endif

struct depthwise {
    const int8_t *weights; /* kernel_height × kernel_width × channels */
    const int32_t *bias;
    const float *ratio;    /* of each channel, or one for all */
    int ratio_step;
    int in_height, in_width, channels;
    int out_height, out_width;
    int kernel_height, kernel_width;
    int stride_y, stride_x, dilation_y, dilation_x;
    int pad_top, pad_left;
    int in_zero, out_zero;
    float low, high;
};
/* ==== for each type T ==== */

/* Add to the sums of `count` channels from `first` on what one output pixel reads; outside the picture nothing is added. */
static inline void depthwise_sums_T(const struct depthwise *c, const T *x, int top, int left, int first, int count, int32_t *sums)
{
    int ky, kx, i;
    for (ky = 0; ky < c->kernel_height; ky++) {
        const int line = top + ky * c->dilation_y;
        if (line < 0 || line >= c->in_height)
            continue;
        for (kx = 0; kx < c->kernel_width; kx++) {
            const int column = left + kx * c->dilation_x;
            const T *in = x + (line * c->in_width + column) * c->channels + first;
            const int8_t *w = c->weights + (ky * c->kernel_width + kx) * c->channels + first;
            if (column < 0 || column >= c->in_width)
                continue;
            for (i = 0; i < count; i++)
                sums[i] += (in[i] - c->in_zero) * w[i];
        }
    }
}

static void depthwise_T(const struct depthwise *c, const T *x, T *y)
{
    int line, column, first, i;
    for (line = 0; line < c->out_height; line++)
        for (column = 0; column < c->out_width; column++, y += c->channels)
            for (first = 0; first < c->channels; first += CHANNELS_AT_ONCE) {
                const int count = c->channels - first < CHANNELS_AT_ONCE ? c->channels - first : CHANNELS_AT_ONCE;
                const int top = line * c->stride_y - c->pad_top, left = column * c->stride_x - c->pad_left;
                int32_t sums[CHANNELS_AT_ONCE];
                memcpy(sums, c->bias + first, (size_t)count * sizeof *sums);
                if (count == CHANNELS_AT_ONCE) /* a constant, so that the compiler unrolls */
                    depthwise_sums_T(c, x, top, left, first, CHANNELS_AT_ONCE, sums);
                else
                    depthwise_sums_T(c, x, top, left, first, count, sums);
                for (i = 0; i < count; i++)
                    y[first + i] = (T)(requantized(sums[i], c->ratio[(first + i) * c->ratio_step], c->low, c->high) + c->out_zero);
            }
}
