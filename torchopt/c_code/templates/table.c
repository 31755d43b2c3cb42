/* Any function of one integer of 8 bits, by a table of all 256. */
struct table {
    int count;
    const void *values; /* by the byte that is read */
};
/* ==== for each type T ==== */

static void table_T(const struct table *p, const T *x, T *y)
{
    const T *values = p->values;
    int i;
    for (i = 0; i < p->count; i++)
        y[i] = values[(uint8_t)x[i]];
}
