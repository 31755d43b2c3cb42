/* One part of a concatenation: runs of `run` elements, the start of each `step` after the last one's. */
struct concat {
    int runs, run, step, offset;
};
/* ==== for each type T ==== */

static void concat_T(const struct concat *p, const T *x, T *y)
{
    int i;
    for (i = 0; i < p->runs; i++)
        memcpy(y + p->offset + i * p->step, x + i * p->run, (size_t)p->run * sizeof(T));
}
