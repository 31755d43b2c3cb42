/* The mean of each channel over all positions. */
struct global_mean {
    int channels, pixels;
    int in_zero;
    float ratio; /* of the sum to the output */
    float low, high;
    int out_zero;
};
/* ==== for each type T ==== */

static void global_mean_T(const struct global_mean *p, const T *x, T *y)
{
    int channel, pixel;
    for (channel = 0; channel < p->channels; channel++) {
        int32_t sum = -p->in_zero * p->pixels;
        for (pixel = 0; pixel < p->pixels; pixel++)
            sum += x[pixel * p->channels + channel];
        y[channel] = (T)(requantized(sum, p->ratio, p->low, p->high) + p->out_zero);
    }
}
