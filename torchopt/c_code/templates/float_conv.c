/* A convolution of floats, of any groups, and a linear layer, whose rows are its pixels. */
struct float_conv {
    const float *weights; /* outputs × kernel_height × kernel_width × inputs of a group */
    const float *bias;
    int in_height, in_width, in_channels;
    int out_height, out_width, out_channels;
    int kernel_height, kernel_width;
    int stride_y, stride_x, dilation_y, dilation_x;
    int pad_top, pad_left;
    int groups;
};

static void float_conv_f32(const struct float_conv *c, const float *x, float *y)
{
    const int channels = c->in_channels / c->groups, outputs = c->out_channels / c->groups;
    int line, column, channel, ky, kx, i;
    for (line = 0; line < c->out_height; line++)
        for (column = 0; column < c->out_width; column++)
            for (channel = 0; channel < c->out_channels; channel++) {
                const float *w = c->weights + channel * c->kernel_height * c->kernel_width * channels;
                float sum = c->bias[channel];
                for (ky = 0; ky < c->kernel_height; ky++)
                    for (kx = 0; kx < c->kernel_width; kx++, w += channels) {
                        const int row = line * c->stride_y - c->pad_top + ky * c->dilation_y;
                        const int at = column * c->stride_x - c->pad_left + kx * c->dilation_x;
                        const float *in = x + (row * c->in_width + at) * c->in_channels + channel / outputs * channels;
                        if (row < 0 || row >= c->in_height || at < 0 || at >= c->in_width)
                            continue;
                        for (i = 0; i < channels; i++)
                            sum += in[i] * w[i];
                    }
                *y++ = sum;
            }
}
