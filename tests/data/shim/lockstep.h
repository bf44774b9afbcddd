// Runs the body of a GPU kernel on the CPU: the 32 threads of a group are fibers that take turns
// where they exchange values, so all of them do the same steps and none waits for a real thread.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>

constexpr unsigned LANES = 32;

struct uint3 {
    unsigned x, y, z;
};

static uint3 group_position, lane_position;  // of the group and the fiber at work
static void (*work)();
static jmp_buf scheduler, fibers[LANES];
static bool finished[LANES];
alignas(16) static char stacks[LANES][64 * 1024];

static __attribute__((noinline)) void give_way() {
    if (_setjmp(fibers[lane_position.x]) == 0) _longjmp(scheduler, 1);
}

static void fiber() {
    for (;;) {
        give_way();
        work();
        finished[lane_position.x] = true;
    }
}

static __attribute__((noinline)) void resume(unsigned lane) {
    lane_position.x = lane;
    if (_setjmp(scheduler) == 0) _longjmp(fibers[lane], 1);
}

static __attribute__((noinline)) void start(unsigned lane) {
    static ucontext_t context, nowhere;
    lane_position.x = lane;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[lane];
    context.uc_stack.ss_size = sizeof(stacks[lane]);
    context.uc_link = &nowhere;
    makecontext(&context, fiber, 0);
    if (_setjmp(scheduler) == 0) setcontext(&context);
}

static void run_groups(unsigned count, void (*body)()) {
    static bool started = false;
    if (!started) {
        for (unsigned lane = 0; lane < LANES; lane++) start(lane);
        started = true;
    }
    work = body;
    for (unsigned group = 0; group < count; group++) {
        group_position.x = group;
        for (bool& flag : finished) flag = false;
        for (bool busy = true; busy;) {
            busy = false;
            for (unsigned lane = 0; lane < LANES; lane++) {
                if (finished[lane]) continue;
                resume(lane);
                busy = true;
            }
        }
    }
}

// What all lanes pass to their current exchange. A lane is at most one exchange ahead of another,
// so two sets of slots, used in turn, keep them apart.
template <typename T>
static const T* exchange(T value) {
    static T slots[2][LANES];
    static bool turn[LANES];
    const unsigned lane = lane_position.x;
    const bool mine = turn[lane] = !turn[lane];
    slots[mine][lane] = value;
    give_way();
    return slots[mine];
}

// Metal's names.
using uint = unsigned;
#define threadgroup_position_in_grid group_position
#define thread_position_in_threadgroup lane_position

static float simd_max(float value) {
    const float* all = exchange(value);
    float top = all[0];
    for (unsigned lane = 1; lane < LANES; lane++) top = all[lane] > top ? all[lane] : top;
    return top;
}

static uint simd_min(uint value) {
    const uint* all = exchange(value);
    uint least = all[0];
    for (unsigned lane = 1; lane < LANES; lane++) least = all[lane] < least ? all[lane] : least;
    return least;
}

static inline float rounded_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#define fma rounded_fma

// CUDA's names.
#define blockIdx group_position
#define threadIdx lane_position

static inline float __int_as_float(int bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
}
// Volatile: rounded by themselves, whatever the compiler may contract.
static inline float __fsub_rn(float a, float b) { volatile float r = a - b; return r; }
static inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
static inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }

template <typename T>
static T __shfl_xor_sync(unsigned, T value, unsigned offset) {
    const unsigned lane = lane_position.x;
    return exchange(value)[lane ^ offset];
}
