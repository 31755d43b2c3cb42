/* The whole number nearest to x, halves to the even one; |x| < 2^22. */
static inline int32_t nearest(float x)
{
    const float shifted = x + 12582912.0f; /* 1.5 * 2^23: here floats are whole numbers */
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4B400000;
}
