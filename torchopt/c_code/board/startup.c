/* A Cortex-M of QEMU's MPS2 boards from reset to main: vectors, the floating point unit, a clock that counts. */
#include <stdint.h>
#include <stdlib.h>

#define CPACR (*(volatile uint32_t *)0xE000ED88u)
#define SYST_CSR (*(volatile uint32_t *)0xE000E010u)
#define SYST_RVR (*(volatile uint32_t *)0xE000E014u)
#define SYST_CVR (*(volatile uint32_t *)0xE000E018u)

extern uint32_t stack_top;
extern void initialise_monitor_handles(void);
extern int main(void);
void reset(void);
void _fini(void);
void fault(void);
void tick(void);
unsigned long long board_ticks(void);

static volatile uint32_t wraps;

void tick(void)
{
    wraps++;
}

unsigned long long board_ticks(void)
{
    uint32_t high, low;
    do {
        high = wraps;
        low = 0xFFFFFFu - (SYST_CVR & 0xFFFFFFu);
    } while (high != wraps);
    return (unsigned long long)high << 24 | low;
}

void _fini(void)
{
}

void fault(void)
{
    _Exit(70);
}

void reset(void)
{
    CPACR |= 0xFu << 20;
    __asm volatile("dsb\n isb");
    SYST_RVR = 0xFFFFFFu;
    SYST_CVR = 0;
    SYST_CSR = 7; /* on, with an interrupt, at the processor's clock */
    initialise_monitor_handles();
    exit(main());
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &stack_top, reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, tick,
};
