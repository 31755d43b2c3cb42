/* Runs a network on every sample in inputs.bin; writes each step's values to traces.bin and its clock ticks to ticks.txt. */
#include <stddef.h>
#include <stdio.h>

#include "@name@.h"

#ifdef BOARD
extern unsigned long long board_ticks(void);
#else
#define board_ticks() 0ULL
#endif

static FILE *traces, *ticks;
static unsigned long long before;

void torchopt_trace(int step, const void *values, size_t bytes);

void torchopt_trace(int step, const void *values, size_t bytes)
{
    const unsigned long long now = board_ticks();
    fprintf(ticks, "%d %lu\n", step, (unsigned long)(now - before));
    if (fwrite(values, 1, bytes, traces) != bytes)
        fprintf(stderr, "traces.bin: cannot be written\n");
    before = board_ticks();
}

@buffers@

int main(void)
{
    FILE *inputs = fopen("inputs.bin", "rb");
    traces = fopen("traces.bin", "wb");
    ticks = fopen("ticks.txt", "w");
    if (!inputs || !traces || !ticks)
        return 2;
    while (@read@) {
        before = board_ticks();
        @name@_run(@arguments@);
        @write@
    }
    fclose(inputs);
    return fclose(traces) || fclose(ticks) ? 3 : 0;
}
