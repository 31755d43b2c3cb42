/* x * ratio, cut off at low and high, as a whole number. */
static inline int32_t requantized(int32_t x, float ratio, float low, float high)
{
    float y = (float)x * ratio;
    y = y < low ? low : y;
    y = y > high ? high : y;
    return nearest(y);
}
