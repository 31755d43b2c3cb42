/* A convolution on integers that gives each channel a kernel of its own. */
#if defined(__x86_64__) || defined(__aarch64__)
#define SIDE_BY_SIDE 16 /* channels, as vector units like it */
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

/* The taps of one output pixel that lie inside the picture: rows ky to ky_end, columns kx to kx_end; x and w are those of the first. */
struct taps_T {
    const T *x;
    const int8_t *w;
    int rows, columns;
    int x_row, x_column, w_row, w_column; /* from one to the next */
};

static int32_t depthwise_one_T(const struct taps_T *t, int zero)
{
    int32_t sum = 0;
    int ky, kx;
    for (ky = 0; ky < t->rows; ky++)
        for (kx = 0; kx < t->columns; kx++)
            sum += (t->x[ky * t->x_row + kx * t->x_column] - zero) * t->w[ky * t->w_row + kx * t->w_column];
    return sum;
}

/* Four channels in registers. */
static void depthwise_four_T(const struct taps_T *t, int zero, int32_t *sums)
{
    const int x_column = t->x_column, w_column = t->w_column;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    int ky, kx;
    for (ky = 0; ky < t->rows; ky++) {
        const T *x = t->x + ky * t->x_row;
        const int8_t *w = t->w + ky * t->w_row;
        for (kx = 0; kx < t->columns; kx++, x += x_column, w += w_column) {
            s0 += (x[0] - zero) * w[0];
            s1 += (x[1] - zero) * w[1];
            s2 += (x[2] - zero) * w[2];
            s3 += (x[3] - zero) * w[3];
        }
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}
#ifdef SIDE_BY_SIDE

static void depthwise_many_T(const struct taps_T *t, int zero, int32_t *sums)
{
    int32_t own[SIDE_BY_SIDE]; /* which no bytes that are read can be a part of, so that they stay in registers */
    const T *x = t->x;
    const int8_t *w = t->w;
    int left = t->rows * t->columns, column = 0, i;
    memset(own, 0, sizeof own);
    for (; left > 0; left--) { /* one loop over all taps: compilers shall vectorize the inner one */
        for (i = 0; i < SIDE_BY_SIDE; i++)
            own[i] += (x[i] - zero) * w[i];
        x += t->x_column;
        w += t->w_column;
        if (++column == t->columns) {
            x += t->x_row - column * t->x_column;
            w += t->w_row - column * t->w_column;
            column = 0;
        }
    }
    memcpy(sums, own, sizeof own);
}
#endif

/* The sums of `count` channels, rounded to their grid. */
static void depthwise_block_T(const struct depthwise *c, const struct taps_T *t, int first, int count, T *y)
{
    int32_t sums[16];
    const float *ratio = c->ratio + first * c->ratio_step;
    int i;
    if (count == 1)
        sums[0] = depthwise_one_T(t, c->in_zero);
#ifdef SIDE_BY_SIDE
    else if (count == SIDE_BY_SIDE)
        depthwise_many_T(t, c->in_zero, sums);
#endif
    else
        depthwise_four_T(t, c->in_zero, sums);
    for (i = 0; i < count; i++)
        y[first + i] = (T)(requantized(plus(sums[i], c->bias[first + i]), ratio[i * c->ratio_step], c->low, c->high) + c->out_zero);
}

static void depthwise_T(const struct depthwise *c, const T *x, T *y)
{
    int line, column, count;
    for (line = 0; line < c->out_height; line++)
        for (column = 0; column < c->out_width; column++, y += c->channels) {
            int top = line * c->stride_y - c->pad_top, left = column * c->stride_x - c->pad_left;
            int ky = 0, kx = 0, ky_end = c->kernel_height, kx_end = c->kernel_width, first = 0;
            struct taps_T t;
            while (ky < ky_end && top + ky * c->dilation_y < 0)
                ky++;
            while (ky < ky_end && top + (ky_end - 1) * c->dilation_y >= c->in_height)
                ky_end--;
            while (kx < kx_end && left + kx * c->dilation_x < 0)
                kx++;
            while (kx < kx_end && left + (kx_end - 1) * c->dilation_x >= c->in_width)
                kx_end--;
            top += ky * c->dilation_y;
            left += kx * c->dilation_x;
            t.rows = ky_end - ky;
            t.columns = kx_end - kx;
            t.x_row = c->dilation_y * c->in_width * c->channels;
            t.x_column = c->dilation_x * c->channels;
            t.w_row = c->kernel_width * c->channels;
            t.w_column = c->channels;
            t.x = x;
            t.w = c->weights;
            if (t.rows > 0 && t.columns > 0) {
                t.x += (top * c->in_width + left) * c->channels;
                t.w += (ky * c->kernel_width + kx) * c->channels;
            }
            for (; first < c->channels; first += count, t.x += count, t.w += count) {
                const int left_over = c->channels - first;
                count = left_over >= 4 ? 4 : 1;
#ifdef SIDE_BY_SIDE
                count = left_over >= SIDE_BY_SIDE ? SIDE_BY_SIDE : count;
#endif
                depthwise_block_T(c, &t, first, count, y);
            }
        }
}
