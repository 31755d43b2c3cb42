/* Elements in another order: the output's sizes, and how far apart in the input neighbours along each lie; outside is `fill`. */
struct move {
    int sizes[6];
    int steps[6];
    int before[6]; /* filled positions before the input's */
    int inside[6]; /* and how many of the input's there are */
    double fill;
};
/* ==== for each type T ==== */

static void move_T(const struct move *p, const T *x, T *y)
{
    int at[6] = {0, 0, 0, 0, 0, 0};
    int level;
    do {
        int place = 0, outside = 0;
        for (level = 0; level < 6; level++) {
            const int position = at[level] - p->before[level];
            outside |= position < 0 || position >= p->inside[level];
            place += position * p->steps[level];
        }
        *y++ = outside ? (T)p->fill : x[place];
        for (level = 5; level >= 0 && ++at[level] == p->sizes[level]; level--)
            at[level] = 0;
    } while (level >= 0);
}
