// Enough of CUDA C++ for `onepass.cu` on a host: every thread of every multiprocessor is a fiber, and they take turns.
//
// Copies happen no sooner than they are waited for, and numbers are added in another order than on the chip.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#define ON_THE_HOST
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
using std::max;
using std::min;

struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Meeting { int here = 0, times = 0; };
struct Multiprocessor { std::vector<char> memory; Meeting meeting; };
struct Warp { Meeting meeting; unsigned words[32][6]; };
struct Copy { char* to; const char* from; };
struct Index { int x; };
struct Thread {
    ucontext_t context;
    Index index, block;
    Multiprocessor* on;
    Warp* warp;
    int lane;
    bool over = false;
    std::vector<char> stack;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> group;
};
inline Thread* me;
inline ucontext_t scheduler;
inline bool moved;
#define threadIdx (me->index)
#define blockIdx (me->block)

inline void others_first() { swapcontext(&me->context, &scheduler); }
inline void meet(Meeting& meeting, int all) {
    int times = meeting.times;
    if (++meeting.here == all) {
        meeting.here = 0, meeting.times++, moved = true;
    } else {
        while (meeting.times == times) others_first();
    }
}
inline void __syncthreads() { meet(me->on->meeting, 256); }
inline void __syncwarp() { meet(me->warp->meeting, 32); }
inline void __threadfence() {}
inline void __trap() { abort(); }
inline int atomicAdd(int* p, int v) { return (*p += v) - v; }
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline unsigned word_of(float f) { unsigned v; memcpy(&v, &f, 4); return v; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __shfl_xor_sync(unsigned, float v, int mask) {
    me->warp->words[me->lane][0] = word_of(v);
    __syncwarp();
    float other = __uint_as_float(me->warp->words[me->lane ^ mask][0]);
    __syncwarp();
    return other;
}

inline char* shared_memory() { return me->on->memory.data(); }
inline unsigned shared_at(const void* p) { return (const char*)p - shared_memory(); }
inline float low(unsigned v) { return __uint_as_float(v << 16); }
inline float high(unsigned v) { return __uint_as_float(v & 0xffff0000u); }
inline unsigned rounded(float f) { unsigned v = word_of(f); return (v + 0x7fff + ((v >> 16) & 1)) >> 16; }
inline unsigned pack(float l, float h) { return rounded(l) | rounded(h) << 16; }
template <class T> T there(const void* p) { T v; memcpy(&v, p, sizeof v); return v; }
inline uint4 fresh(const void* p) { return there<uint4>(p); }
inline unsigned short fresh_one(const unsigned short* p) { return *p; }
inline unsigned fresh_word(const unsigned* p) { return *p; }
inline float fresh_float(const float* p) { return *p; }
// mma.m16n8k16: lane 4 g + t has rows g and g + 8 of the first factor, column g of the second, and of the sum rows g and
// g + 8, columns 2 t and 2 t + 1.
inline void multiply(
    float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1)
{
    auto& words = me->warp->words;
    unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    memcpy(words[me->lane], mine, sizeof mine);
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < 4; t++) {
            unsigned* a = words[(me->lane & ~3) + t] + (i >> 1);
            unsigned* b = words[4 * (2 * (me->lane & 3) + (i & 1)) + t] + 4;
            for (int k = 0; k < 2; k++) sum[i] += low(a[2 * k]) * low(b[k]) + high(a[2 * k]) * high(b[k]);
        }
    __syncwarp();
}
inline void copy_16(unsigned to, const char* from) { me->group.push_back({shared_memory() + to, from}); }
inline void end_group() { me->groups.push_back(std::move(me->group)), me->group.clear(); }
inline void copied() {
    for (; (int)me->groups.size() > DEPTH - 1; me->groups.pop_front())
        for (Copy& copy : me->groups.front()) memcpy(copy.to, copy.from, 16);
}
inline void prefetch(unsigned long long) {}
inline void add_release(unsigned* p, unsigned v) { *p += v; }
inline unsigned read_acquire(const unsigned* p) { others_first(); return *p; }

// Run `body` in each of 256 threads on each of `grid` multiprocessors.
inline void launch(int grid, int shared, void (*body)()) {
    std::vector<Multiprocessor> chip(grid);
    std::vector<Warp> warps(grid * 8);
    std::vector<Thread> threads(grid * 256);
    static void (*run)();
    run = body;
    for (auto& one : chip) one.memory.assign(shared, 0x7f);  // NaN
    for (int i = 0; i < grid * 256; i++) {
        Thread& thread = threads[i];
        thread.index.x = i % 256, thread.block.x = i / 256, thread.lane = i % 32;
        thread.on = &chip[i / 256], thread.warp = &warps[i / 32];
        thread.stack.resize(1 << 16);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, (void (*)())+[] { run(), me->over = true; }, 0);
    }
    for (bool any = true; any;) {
        any = false;
        for (size_t warp = 0; warp < warps.size(); warp++) do {  // a warp at a time, as long as it gets on
            moved = false;
            for (int lane = 0; lane < 32; lane++) {
                me = &threads[32 * warp + lane];
                if (!me->over) any = true, swapcontext(&scheduler, &me->context);
            }
        } while (moved);
    }
}
