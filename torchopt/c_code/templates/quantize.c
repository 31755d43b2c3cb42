/* Floats to integers, one channel after another of a picture whose channels lie first (then they come to lie last). */
struct quantize {
    int channels, pixels; /* 1 channel where the layout stays */
    float scale;
    float low, high;
    int zero;
};
/* ==== for each type T ==== */

static void quantize_T(const struct quantize *p, const float *x, T *y)
{
    int channel, pixel;
    for (channel = 0; channel < p->channels; channel++)
        for (pixel = 0; pixel < p->pixels; pixel++) {
            float value = *x++ / p->scale;
            value = value < p->low ? p->low : value;
            value = value > p->high ? p->high : value;
            y[pixel * p->channels + channel] = (T)(nearest(value) + p->zero);
        }
}
