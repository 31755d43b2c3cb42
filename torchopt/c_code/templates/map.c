/* A function of each float by itself. */
enum function { CLIP, LEAKY, SIGMOID, HARD_SIGMOID, HARD_SWISH, TANH, EXPONENTIAL, LOGARITHM, ROOT, ABSOLUTE, ELU, ERROR, SOFT_PLUS, GELU };

struct map {
    enum function function;
    int count;
    float a, b;
};

static float mapped(enum function function, float x, float a, float b)
{
    float gate;
    switch (function) {
    case CLIP:
        x = x < a ? a : x;
        return x > b ? b : x;
    case LEAKY:
        return x < 0 ? a * x : x;
    case SIGMOID:
        return 1.0f / (1.0f + expf(-x));
    case HARD_SIGMOID:
    case HARD_SWISH:
        gate = a * x + b;
        gate = gate < 0 ? 0 : gate > 1 ? 1 : gate;
        return function == HARD_SWISH ? x * gate : gate;
    case TANH:
        return tanhf(x);
    case EXPONENTIAL:
        return expf(x);
    case LOGARITHM:
        return logf(x);
    case ROOT:
        return sqrtf(x);
    case ABSOLUTE:
        return fabsf(x);
    case ELU:
        return x < 0 ? a * expm1f(x) : x;
    case ERROR:
        return erff(x);
    case SOFT_PLUS:
        return x > 0 ? x + log1pf(expf(-x)) : log1pf(expf(x));
    default:
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    }
}

static void map_f32(const struct map *p, const float *x, float *y)
{
    int i;
    for (i = 0; i < p->count; i++)
        y[i] = mapped(p->function, x[i], p->a, p->b);
}
