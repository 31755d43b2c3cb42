/* The largest value of each window and channel. */
struct max_pool {
    int in_height, in_width, channels;
    int out_height, out_width;
    int kernel_height, kernel_width;
    int stride_y, stride_x, dilation_y, dilation_x;
    int pad_top, pad_left;
};
/* ==== for each type T ==== */

static void max_pool_T(const struct max_pool *p, const T *x, T *y)
{
    int line, column, channel, ky, kx;
    for (line = 0; line < p->out_height; line++)
        for (column = 0; column < p->out_width; column++)
            for (channel = 0; channel < p->channels; channel++) {
                int found = 0;
                T largest = 0;
                for (ky = 0; ky < p->kernel_height; ky++)
                    for (kx = 0; kx < p->kernel_width; kx++) {
                        const int row = line * p->stride_y - p->pad_top + ky * p->dilation_y;
                        const int at = column * p->stride_x - p->pad_left + kx * p->dilation_x;
                        if (row >= 0 && row < p->in_height && at >= 0 && at < p->in_width) {
                            const T value = x[(row * p->in_width + at) * p->channels + channel];
                            largest = !found || value > largest ? value : largest;
                            found = 1;
                        }
                    }
                *y++ = largest;
            }
}
