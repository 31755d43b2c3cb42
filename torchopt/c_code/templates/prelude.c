#if defined(__FAST_MATH__)
#error "the integers of this file need IEEE arithmetic: compile without -ffast-math"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "the integers of this file need float arithmetic in float: compile with -msse2 -mfpmath=sse, or for a target that does so"
#endif
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
