/* Arithmetic of floats; the second operand may have fewer elements, each read `inner` times in a row and all again and again. */
enum operation { SUM, DIFFERENCE, DIFFERENCE_FROM, PRODUCT, QUOTIENT, QUOTIENT_OF, LARGER, SMALLER };

struct binary {
    enum operation operation;
    int outer, count, inner;
};

static float combined(enum operation operation, float a, float b)
{
    switch (operation) {
    case SUM:
        return a + b;
    case DIFFERENCE:
        return a - b;
    case DIFFERENCE_FROM:
        return b - a;
    case PRODUCT:
        return a * b;
    case QUOTIENT:
        return a / b;
    case QUOTIENT_OF:
        return b / a;
    case LARGER:
        return a > b ? a : b;
    default:
        return a < b ? a : b;
    }
}

static void binary_f32(const struct binary *p, const float *a, const float *b, float *y)
{
    int outer, k, i;
    for (outer = 0; outer < p->outer; outer++)
        for (k = 0; k < p->count; k++)
            for (i = 0; i < p->inner; i++)
                *y++ = combined(p->operation, *a++, b[k]);
}
