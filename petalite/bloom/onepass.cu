// One decode step of up to 8 rows through every block of a span: one kernel that stays on every multiprocessor.
//
// What a step costs is reading the weights once. Kernels of their own for each product leave the memory idle whenever
// one ends and the next begins; here the first weights of a product are on their way into shared memory while the
// multiprocessors wait for each other at the end of the one before, or attend.
//
// Work comes in units, TILE output channels x all inputs, dealt to the multiprocessors in turn. Of each unit a warp has
// its own share of the inputs, SHARE of every PIECE: it copies them into a ring of its own and multiplies them on the
// matrix units, and the warps' sums are added in shared memory. What the product is applied to, at most C numbers of
// each row, stays in registers.
//
// The end of a product waits for the slowest copy, so nobody copies ahead of it then: `held`.
//
// Given with -D: C hidden size, HEADS, LAYERS, ROWS (1 to 8), GRID multiprocessors, DEPTH slots of a ring, EPS, and
// HALF for float16 instead of bfloat16. Heads are of 128 numbers, and C is a multiple of PIECE.

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define WARPS 8
#define THREADS (WARPS * 32)
#define TILE 16
#define PIECE 1024  // inputs that all warps copy at a time
#define SHARE (PIECE / WARPS)
#define PIECES (C / PIECE)
#define SLOT_BYTES (TILE * SHARE * 2)
#define CHUNKS (SHARE / 8)  // of 16 bytes in a row of a share
#define COPIED (32 / CHUNKS)  // rows that a warp copies at a time
#define HEAD 128
#define KEYS 64  // that a multiprocessor looks at at a time
#define HELD (KEYS / WARPS / 2)  // of them in half a warp
#define SPLITS (GRID / (ROWS * HEADS) > 1 ? GRID / (ROWS * HEADS) : 1)

// A block's pointers, as `onepass.py` lists them.
enum { W_QKV, B_QKV, W_DENSE, B_DENSE, W_UP, B_UP, W_DOWN, B_DOWN, G_IN, S_IN, G_POST, S_POST, KEY, VALUE, POINTERS };
enum { QKV, DENSE, UP, DOWN, PRODUCTS };

// What only the chip's own language says; a test says it for the host

#ifndef ON_THE_HOST
__device__ __forceinline__ u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

// Numbers of the span's type, two in a word

#ifdef HALF
__device__ __forceinline__ float low(u32 v) {
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
    return f;
}
__device__ __forceinline__ float high(u32 v) {
    float f;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
    return f;
}
__device__ __forceinline__ u32 pack(float l, float h) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(h), "f"(l));
    return v;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float l, float h) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(h), "f"(l));
    return v;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif

// What other multiprocessors wrote meanwhile: past this one's own cache.
__device__ __forceinline__ uint4 fresh(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u16 fresh_one(const u16* p) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 fresh_word(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float fresh_float(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm(MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Copies into shared memory, by groups. `copied` waits for all groups but the last DEPTH - 1.
__device__ __forceinline__ void copy_16(u32 to, const char* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void copied() { asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 1) : "memory"); }
// Closer to the chip.
__device__ __forceinline__ void prefetch(u64 p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }

// Between multiprocessors: what was written before an addition is seen by those who have read its result.
__device__ __forceinline__ void add_release(u32* p, u32 v) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ u32 read_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
#endif

struct Shared {
    float sums[2][WARPS][TILE * 8];
    float heads[WARPS][HEAD + 2];
    float stats[2][WARPS][8];
    u64 pointers[LAYERS * POINTERS];
    int ticket;
};

// The second half of the MLP has four times as many inputs. It goes by pairs of tiles, one quarter of both after the
// other.
__device__ __forceinline__ int tiles_of(int product) { return product == DOWN ? 2 : 1; }
__device__ __forceinline__ int quarters_of(int product) { return product == DOWN ? 4 : 1; }
__device__ __forceinline__ int units_of(int product) {
    return (product == QKV ? 3 : product == UP ? 4 : 1) * (C / TILE) / tiles_of(product);
}

// Where the ring stands: the piece that is copied next.
struct Ahead {
    int layer, product, unit, piece, held;  // so many slots were not filled
};

// Copy this warp's share of the next piece into `slot`, if it is one of the product that is `now`, and step on. A group
// is committed in any case: waiting counts them.
__device__ __forceinline__ void copy_next(
    Ahead& at, int now, const Shared& shared, u32 slot, int warp, int lane)
{
    while (at.layer < LAYERS && at.unit >= units_of(at.product)) {
        at.unit -= units_of(at.product);
        if (++at.product == PRODUCTS) at.product = 0, at.layer++;
    }
    if (at.product != now) {
        at.held++;
    } else if (at.layer < LAYERS) {
        int tiles = tiles_of(at.product), inputs = quarters_of(at.product) * C;
        const char* weight = (const char*)shared.pointers[at.layer * POINTERS + 2 * at.product];
        int chunk = lane % CHUNKS, row = lane / CHUNKS;
        int tile = at.unit * tiles + (at.piece / PIECES) % tiles, quarter = at.piece / (PIECES * tiles);
        u64 first = (u64)(tile * TILE + row) * inputs + quarter * C + at.piece % PIECES * PIECE + warp * SHARE;
        const char* from = weight + 2 * first + 16 * chunk;
        // Odd rows lie half a line further, so that two rows never meet in a bank.
        u32 to = slot + row * (SHARE * 2) + 16 * (chunk ^ ((row & 1) << 2));
        #pragma unroll
        for (int i = 0; i < TILE / COPIED; i++)
            copy_16(to + i * COPIED * SHARE * 2, from + (u64)i * COPIED * 2 * inputs);
        if (++at.piece == PIECES * tiles * quarters_of(at.product)) at.piece = 0, at.unit += GRID;
    }
    end_group();
}

// Copy what was held back of the product that is next, into the slots before `slot`.
__device__ __forceinline__ void catch_up(
    Ahead& at, int next, const Shared& shared, const char* ring, int slot, int warp, int lane)
{
    for (int held = at.held; held > 0; held--) {
        at.held = 0;
        copy_next(at, next, shared, shared_at(ring + (slot - held + DEPTH) % DEPTH * SLOT_BYTES), warp, lane);
        if (at.held) {  // none of its units are ours
            at.held = held;
            return;
        }
    }
}

// All multiprocessors wait for each other: `come`, then `everybody`, behind which what they wrote is seen. The top bit
// of `arrived` turns with each time; `turned` is what it will be.
__device__ __forceinline__ void come(u32* arrived) {
    __syncthreads();
    if (threadIdx.x == 0)
        add_release(arrived, blockIdx.x == 0 ? 0x80000000u - (GRID - 1) : 1u);
}
__device__ __forceinline__ void everybody(u32* arrived, u32& turned) {
    if (threadIdx.x == 0) {
        u32 now;
        int patience = 1 << 26;
        do {
            now = read_acquire(arrived);
            if (--patience == 0) __trap();  // some were never started: an error is better than to hang
        } while ((now ^ turned) & 0x80000000u);
        turned ^= 0x80000000u;
    }
    __syncthreads();
}

// Bring a norm's gain and shift closer, a line each.
__device__ __forceinline__ void ask_for(const u64* gain_and_shift) {
    int line = blockIdx.x / 2;
    if (threadIdx.x == 0 && line < C / 64)
        prefetch(gain_and_shift[blockIdx.x & 1] + 128 * line);
}

typedef uint4 Inputs[PIECES][SHARE / 32];

// This warp's share of `from` (ROWS, width) from `first` on, as the matrix units want it. Four lanes share a row.
__device__ __forceinline__ void take(Inputs& x, const u16* from, int width, int first, int warp, int lane) {
    int row = lane >> 2;
    const u16* at = from + (u64)row * width + first + warp * SHARE + 8 * (lane & 3);
    #pragma unroll
    for (int p = 0; p < PIECES; p++)
        #pragma unroll
        for (int j = 0; j < SHARE / 32; j++)
            x[p][j] = row < ROWS ? fresh(at + p * PIECE + j * 32) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ float row_total(float part, float (&stats)[WARPS][8], int warp, int lane) {
    part += __shfl_xor_sync(~0u, part, 1);
    part += __shfl_xor_sync(~0u, part, 2);
    if ((lane & 3) == 0) stats[warp][lane >> 2] = part;
    __syncthreads();
    float total = 0;
    #pragma unroll
    for (int w = 0; w < WARPS; w++) total += stats[w][lane >> 2];
    return total;
}

__device__ __forceinline__ u32 scaled(u32 v, u32 g, u32 s, float mean, float factor) {
    return pack((low(v) - mean) * factor * low(g) + low(s), (high(v) - mean) * factor * high(g) + high(s));
}

// Layer norm of rows whose numbers lie in the registers of all warps.
__device__ __forceinline__ void normalize(
    Inputs& x, const u16* gain, const u16* shift, Shared& shared, int warp, int lane)
{
    float part = 0;
    #pragma unroll
    for (int p = 0; p < PIECES; p++)
        #pragma unroll
        for (int j = 0; j < SHARE / 32; j++) {
            uint4 v = x[p][j];
            part += low(v.x) + high(v.x) + low(v.y) + high(v.y) + low(v.z) + high(v.z) + low(v.w) + high(v.w);
        }
    float mean = row_total(part, shared.stats[0], warp, lane) / C;
    part = 0;
    #pragma unroll
    for (int p = 0; p < PIECES; p++)
        #pragma unroll
        for (int j = 0; j < SHARE / 32; j++) {
            const u32 v[4] = {x[p][j].x, x[p][j].y, x[p][j].z, x[p][j].w};
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float l = low(v[i]) - mean, h = high(v[i]) - mean;
                part += l * l + h * h;
            }
        }
    float factor = rsqrtf(row_total(part, shared.stats[1], warp, lane) / C + EPS);
    int first = warp * SHARE + 8 * (lane & 3);
    #pragma unroll
    for (int p = 0; p < PIECES; p++)
        #pragma unroll
        for (int j = 0; j < SHARE / 32; j++) {
            uint4 g = *(const uint4*)(gain + first + p * PIECE + j * 32);
            uint4 s = *(const uint4*)(shift + first + p * PIECE + j * 32);
            uint4& v = x[p][j];
            v.x = scaled(v.x, g.x, s.x, mean, factor);
            v.y = scaled(v.y, g.y, s.y, mean, factor);
            v.z = scaled(v.z, g.z, s.z, mean, factor);
            v.w = scaled(v.w, g.w, s.w, mean, factor);
        }
}

// A warp's share of a tile, from its ring: adds to the sums of TILE channels x 8 rows.
__device__ __forceinline__ void add_up(
    float (&sum)[4], const Inputs& x, const char* ring, int& slot, Ahead& ahead, int now, const Shared& shared,
    int warp, int lane)
{
    int channel = lane >> 2;
    u32 from = channel * (SHARE * 2), turned = (channel & 1) << 2;
    float odd[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const char* piece = ring + slot * SLOT_BYTES;
        copied();
        __syncwarp();
        uint4 a[SHARE / 32], b[SHARE / 32];
        #pragma unroll
        for (int j = 0; j < SHARE / 32; j++) {
            const char* at = piece + from + 16 * ((4 * j + (lane & 3)) ^ turned);
            a[j] = *(const uint4*)at;
            b[j] = *(const uint4*)(at + 8 * SHARE * 2);
        }
        __syncwarp();
        copy_next(ahead, now, shared, shared_at(piece), warp, lane);
        #pragma unroll
        for (int j = 0; j < SHARE / 32; j++) {
            // Which inputs are the matrix units' first and which their ninth does not matter, if both sides agree.
            multiply(sum, a[j].x, b[j].x, a[j].y, b[j].y, x[p][j].x, x[p][j].y);
            multiply(odd, a[j].z, b[j].z, a[j].w, b[j].w, x[p][j].z, x[p][j].w);
        }
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    #pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += odd[i];
}

// The online softmax of one half of a warp, which looks at every second key of 16.
struct Seen {
    float most, weight, gathered[8];
};

__device__ __forceinline__ void join(Seen& one, float most, float weight, const float (&gathered)[8]) {
    float top = fmaxf(one.most, most), level = top == -INFINITY ? 0.f : top;
    float keep = __expf(one.most - level), add = __expf(most - level);
    one.most = top;
    one.weight = one.weight * keep + weight * add;
    #pragma unroll
    for (int i = 0; i < 8; i++) one.gathered[i] = one.gathered[i] * keep + gathered[i] * add;
}

__device__ __forceinline__ void unpack(float (&f)[8], uint4 v) {
    f[0] = low(v.x), f[1] = high(v.x), f[2] = low(v.y), f[3] = high(v.y);
    f[4] = low(v.z), f[5] = high(v.z), f[6] = low(v.w), f[7] = high(v.w);
}

__device__ __forceinline__ float dot(const float (&q)[8], uint4 k) {
    float f[8], total = 0;
    unpack(f, k);
    #pragma unroll
    for (int i = 0; i < 8; i++) total += q[i] * f[i];
    #pragma unroll
    for (int i = 1; i < 16; i *= 2) total += __shfl_xor_sync(~0u, total, i);
    return total;
}

// Attention of one new token over the keys [begin, end) of one head, by all warps: `numbers` and what they weigh, valid
// in the first HEAD threads, thread d having number d.
__device__ __forceinline__ void attend(
    float& number, float& most, float& weight, const u16* mine, u16* keys, u16* values, float slope,
    int begin, int end, int position, bool own, Shared& shared, int warp, int lane)
{
    int half = lane >> 4, d = 8 * (lane & 15);
    float q[8];
    unpack(q, fresh(mine + d));
    #pragma unroll
    for (int i = 0; i < 8; i++) q[i] *= 0.08838834764831845f;  // 1 / sqrt(HEAD)
    Seen seen = {-INFINITY, 0.f, {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f}};
    for (int first = begin + warp * 2 * HELD; first < end; first += KEYS) {
        uint4 k[HELD], v[HELD];
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            int s = min(first + 2 * i + half, end - 1);
            k[i] = fresh(keys + (u64)s * HEAD + d);
            v[i] = fresh(values + (u64)s * HEAD + d);
        }
        float score[HELD], top = seen.most;
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            int s = first + 2 * i + half;
            score[i] = dot(q, k[i]) + slope * (float)(s - position);
            if (s >= end) score[i] = -INFINITY;
            top = fmaxf(top, score[i]);
        }
        float level = top == -INFINITY ? 0.f : top, keep = __expf(seen.most - level);
        seen.most = top;
        seen.weight *= keep;
        #pragma unroll
        for (int i = 0; i < 8; i++) seen.gathered[i] *= keep;
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            float share = __expf(score[i] - level), f[8];
            unpack(f, v[i]);
            seen.weight += share;
            #pragma unroll
            for (int j = 0; j < 8; j++) seen.gathered[j] += share * f[j];
        }
    }
    if (own && warp == 0) {  // the new token itself, at distance 0
        uint4 k = fresh(mine + HEAD + d), v = fresh(mine + 2 * HEAD + d);
        float score = dot(q, k), f[8];
        unpack(f, v);
        if (half == 0) {
            *(uint4*)(keys + (u64)position * HEAD + d) = k;
            *(uint4*)(values + (u64)position * HEAD + d) = v;
            join(seen, score, 1.f, f);
        }
    }
    float other[8];
    #pragma unroll
    for (int i = 0; i < 8; i++) other[i] = __shfl_xor_sync(~0u, seen.gathered[i], 16);
    join(seen, __shfl_xor_sync(~0u, seen.most, 16), __shfl_xor_sync(~0u, seen.weight, 16), other);
    if (half == 0) {
        #pragma unroll
        for (int i = 0; i < 8; i++) shared.heads[warp][d + i] = seen.gathered[i];
        if (d == 0) shared.heads[warp][HEAD] = seen.most, shared.heads[warp][HEAD + 1] = seen.weight;
    }
    __syncthreads();
    number = weight = 0;
    most = -INFINITY;
    if (threadIdx.x < HEAD) {
        #pragma unroll
        for (int w = 0; w < WARPS; w++) most = fmaxf(most, shared.heads[w][HEAD]);
        float level = most == -INFINITY ? 0.f : most;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float share = __expf(shared.heads[w][HEAD] - level);
            number += shared.heads[w][threadIdx.x] * share;
            weight += shared.heads[w][HEAD + 1] * share;
        }
    }
    __syncthreads();
}

// Every row's and head's attention, long ones by several multiprocessors: who comes last adds up.
__device__ __forceinline__ void attention(
    const u16* qkv, u16* out, const long long* meta, const float* slopes, float* parts, int* tickets,
    u16* keys, u16* values, Shared& shared, int warp, int lane)
{
    for (int unit = blockIdx.x; unit < ROWS * HEADS * SPLITS; unit += GRID) {
        int split = unit / (ROWS * HEADS), which = unit % (ROWS * HEADS), row = which / HEADS, head = which % HEADS;
        int position = (int)meta[2 * ROWS + row], first = (int)meta[3 * ROWS + row];
        int count = max(position - first, 0);
        int share = (count + SPLITS * KEYS - 1) / (SPLITS * KEYS) * KEYS;
        int splits = share ? (count + share - 1) / share : 1;
        if (split >= splits) continue;
        int begin = min(first, position) + split * share, end = min(begin + share, position);
        u64 base = (u64)(meta[row] + head * meta[ROWS + row] * HEAD);
        float number, most, weight;
        attend(
            number, most, weight, qkv + (u64)which * 3 * HEAD, keys + base, values + base, slopes[head],
            begin, end, position, split == 0, shared, warp, lane);
        int d = threadIdx.x;
        if (splits > 1) {
            float* mine = parts + (u64)(which * SPLITS + split) * (HEAD + 2);
            if (d < HEAD) mine[d] = number;
            if (d == 0) mine[HEAD] = most, mine[HEAD + 1] = weight;
            __threadfence();
            __syncthreads();
            if (d == 0) {
                shared.ticket = atomicAdd(tickets + which, 1);
                if (shared.ticket == splits - 1) tickets[which] = 0;
                __threadfence();
            }
            __syncthreads();
            if (shared.ticket != splits - 1) continue;
            const float* all = parts + (u64)which * SPLITS * (HEAD + 2);
            most = -INFINITY;
            for (int i = 0; i < splits; i++) most = fmaxf(most, fresh_float(all + i * (HEAD + 2) + HEAD));
            number = weight = 0;
            for (int i = 0; d < HEAD && i < splits; i++) {
                float part = __expf(fresh_float(all + i * (HEAD + 2) + HEAD) - most);
                number += fresh_float(all + i * (HEAD + 2) + d) * part;
                weight += fresh_float(all + i * (HEAD + 2) + HEAD + 1) * part;
            }
        }
        if (d < HEAD) out[(u64)which * HEAD + d] = (u16)pack(number / weight, 0.f);
    }
}

// What the products of a step read and write, besides weights.
struct Numbers {
    const u16* before;  // (ROWS, C): what enters the block
    u16* x;             // (ROWS, C)
    u16* qkv;           // (ROWS, 3 C)
    u16* seen;          // (ROWS, C)
    u16* wide;          // (ROWS, 4 C)
};

// Registers with what a product is applied to, or a quarter of it.
__device__ __forceinline__ void take_inputs(
    Inputs& in, int product, int quarter, bool first, const Numbers& numbers, const u64* block, Shared& shared,
    int warp, int lane)
{
    const u16* from = product == QKV ? numbers.before : product == DENSE ? numbers.seen
        : product == UP ? numbers.x : numbers.wide;
    if (first || product == DOWN) take(in, from, quarters_of(product) * C, quarter * C, warp, lane);
    if (first && product == QKV)
        normalize(in, (const u16*)block[G_IN], (const u16*)block[S_IN], shared, warp, lane);
    if (first && product == UP)
        normalize(in, (const u16*)block[G_POST], (const u16*)block[S_POST], shared, warp, lane);
}

// What becomes of a product's sum, bias and residual included.
__device__ __forceinline__ void put(int product, float total, int row, int channel, const Numbers& numbers) {
    if (product == QKV) numbers.qkv[row * 3 * C + channel] = (u16)pack(total, 0.f);
    if (product == DENSE || product == DOWN) numbers.x[row * C + channel] = (u16)pack(total, 0.f);
    if (product == UP) {  // GELU in its tanh form; tanh(u) = 2 sigmoid(2 u) - 1
        float inner = 0.7978845608028654f * (total + 0.044715f * total * total * total);
        numbers.wide[row * 4 * C + channel] = (u16)pack(total / (1.f + __expf(-2.f * inner)), 0.f);
    }
}

// One unit of a product, by all warps.
__device__ __forceinline__ void do_unit(
    Inputs& in, int product, int unit, bool first, const Numbers& numbers, const u64* block, Shared& shared,
    const char* ring, int& slot, Ahead& ahead, int& turn, int warp, int lane)
{
    int channel = threadIdx.x & (TILE - 1), row = threadIdx.x / TILE;  // of what this thread finishes
    bool mine = row < ROWS;
    int to = unit * tiles_of(product) * TILE + channel;
    const u16* bias = (const u16*)block[2 * product + 1];
    u16 bias_there[2] = {0, 0}, x_there[2] = {0, 0};  // asked for early, since they come from afar
    #pragma unroll
    for (int t = 0; t < 2; t++)
        if (mine && t < tiles_of(product)) {
            bias_there[t] = bias[to + t * TILE];
            if (product == DENSE) x_there[t] = fresh_one(numbers.before + row * C + to + t * TILE);
            if (product == DOWN) x_there[t] = fresh_one(numbers.x + row * C + to + t * TILE);
        }
    float sum[2][4] = {};
    for (int quarter = 0; quarter < quarters_of(product); quarter++) {
        take_inputs(in, product, quarter, first && quarter == 0, numbers, block, shared, warp, lane);
        add_up(sum[0], in, ring, slot, ahead, product, shared, warp, lane);
        if (product == DOWN) add_up(sum[1], in, ring, slot, ahead, product, shared, warp, lane);
    }
    #pragma unroll
    for (int t = 0; t < 2; t++) {
        if (t == tiles_of(product)) break;
        float* sums = shared.sums[turn][warp] + (lane >> 2) * 8 + 2 * (lane & 3);
        sums[0] = sum[t][0], sums[1] = sum[t][1], sums[64] = sum[t][2], sums[65] = sum[t][3];
        __syncthreads();
        if (mine) {
            float total = low(bias_there[t]) + low(x_there[t]);
            #pragma unroll
            for (int w = 0; w < WARPS; w++) total += shared.sums[turn][w][channel * 8 + row];
            put(product, total, row, to + t * TILE, numbers);
        }
        turn ^= 1;  // what is read here is not written again before all have come by once more
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode(
    const u16* hidden,      // (ROWS, C)
    u16* x,                 // (ROWS, C): the result
    const long long* meta,  // (4, ROWS), as `kernels.decode_attention` wants it
    const u64* pointers,    // (LAYERS, POINTERS)
    const float* slopes,    // (HEADS)
    u16* qkv,               // (ROWS, 3 C)
    u16* seen,              // (ROWS, C)
    u16* wide,              // (ROWS, 4 C)
    float* parts,           // (ROWS, HEADS, SPLITS, HEAD + 2)
    int* tickets,           // (ROWS, HEADS), zero
    u32* arrived)           // (1), zero once
{
    char* memory = shared_memory();
    Shared& shared = *(Shared*)(memory + WARPS * DEPTH * SLOT_BYTES);
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int i = threadIdx.x; i < LAYERS * POINTERS; i += THREADS) shared.pointers[i] = pointers[i];
    __syncthreads();
    const char* ring = memory + warp * DEPTH * SLOT_BYTES;
    Ahead ahead = {0, 0, (int)blockIdx.x, 0, 0};
    for (int i = 0; i < DEPTH; i++) copy_next(ahead, QKV, shared, shared_at(ring + i * SLOT_BYTES), warp, lane);
    int slot = 0, unit = blockIdx.x, turn = 0;
    u32 turned = ~fresh_word(arrived);
    for (int layer = 0; layer < LAYERS; layer++) {
        const u64* block = shared.pointers + layer * POINTERS;
        Numbers numbers = {layer ? x : hidden, x, qkv, seen, wide};
        for (int product = QKV; product < PRODUCTS; product++) {
            Inputs in;
            bool first = true;
            if (product == DENSE) ask_for(block + G_POST);
            if (product == DOWN && layer + 1 < LAYERS) ask_for(block + POINTERS + G_IN);
            for (; unit < units_of(product); unit += GRID, first = false)
                do_unit(in, product, unit, first, numbers, block, shared, ring, slot, ahead, turn, warp, lane);
            unit -= units_of(product);
            if (product == DOWN && layer + 1 == LAYERS) break;
            come(arrived);
            catch_up(ahead, (product + 1) % PRODUCTS, shared, ring, slot, warp, lane);
            everybody(arrived, turned);
            if (product == QKV) {
                u16 *keys = (u16*)block[KEY], *values = (u16*)block[VALUE];
                attention(qkv, seen, meta, slopes, parts, tickets, keys, values, shared, warp, lane);
                come(arrived);
                everybody(arrived, turned);
            }
        }
    }
}
