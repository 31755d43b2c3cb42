/* A sum with its bias, modulo 2^32 as ONNX Runtime's kernels add it. */
static inline int32_t plus(int32_t sum, int32_t bias)
{
    return (int32_t)((uint32_t)sum + (uint32_t)bias);
}
