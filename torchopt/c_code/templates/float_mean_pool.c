/* The mean of each window and channel of floats. */
struct float_mean_pool {
    int in_height, in_width, channels;
    int out_height, out_width;
    int kernel_height, kernel_width;
    int stride_y, stride_x;
    int pad_top, pad_left;
    int whole; /* 1: divide by the kernel's size also at the edges */
};

static void float_mean_pool_f32(const struct float_mean_pool *p, const float *x, float *y)
{
    int line, column, channel, row, at;
    for (line = 0; line < p->out_height; line++)
        for (column = 0; column < p->out_width; column++) {
            const int top = line * p->stride_y - p->pad_top, left = column * p->stride_x - p->pad_left;
            const int bottom = top + p->kernel_height, right = left + p->kernel_width;
            const int first = top < 0 ? 0 : top, last = bottom > p->in_height ? p->in_height : bottom;
            const int from = left < 0 ? 0 : left, to = right > p->in_width ? p->in_width : right;
            const int count = p->whole ? p->kernel_height * p->kernel_width : (last - first) * (to - from);
            for (channel = 0; channel < p->channels; channel++) {
                float sum = 0;
                for (row = first; row < last; row++)
                    for (at = from; at < to; at++)
                        sum += x[(row * p->in_width + at) * p->channels + channel];
                *y++ = sum / (float)count;
            }
        }
}
