#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_UNDER_TSAN)  // which must not look at this file itself
#include <sanitizer/tsan_interface.h>
#endif

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = 64 << 10;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Place {
    const char* file = nullptr;
    int line = 0;
    bool operator==(const Place& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Fiber {
    ucontext_t context;
    State state = State::kReady;
    Place place;  // where it waits
    unsigned index = 0;
    char* stack = nullptr;
    void* tsan = nullptr;
    void* asan = nullptr;
};

// One meeting of the lanes of a warp. Slots alternate, since a lane may be back with its next value before another has
// read the last one.
struct Warp {
    unsigned arrived = 0;
    unsigned mask = 0;
    unsigned gone = 0;
    Place place;
    std::uint64_t slot[2][kWarp];
    unsigned meetings[kWarp];
};

struct Block {
    const Launch* launch;
    const std::function<void()>* kernel;
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    char* shared = nullptr;
    Fiber* current = nullptr;
    ucontext_t scheduler;
    unsigned done = 0;
    void* tsan_scheduler = nullptr;
    void* asan_scheduler = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_bytes = 0;
};

Block* block = nullptr;

[[noreturn]] void fail(const char* what, Place place) {
    std::fprintf(stderr, "emulator: %s, at %s:%d (block %u, %u; thread %u)\n", what,
                 place.file == nullptr ? "the end of the kernel" : place.file, place.line, block->index.x,
                 block->index.y, block->current == nullptr ? ~0u : block->current->index);
    std::fflush(stderr);
    std::abort();
}

// ThreadSanitizer's view of order: all that a fiber did before a release happens before all that follows an acquire of
// the same address.
void release(void* address) {
#if defined(EMULATOR_UNDER_TSAN)
    __tsan_release(address);
#else
    (void)address;
#endif
}

void acquire(void* address) {
#if defined(EMULATOR_UNDER_TSAN)
    __tsan_acquire(address);
#else
    (void)address;
#endif
}

void to_scheduler() {
    Fiber* const me = block->current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(me->state == State::kDone ? nullptr : &me->asan, block->scheduler_stack,
                                   block->scheduler_stack_bytes);
#endif
#if defined(EMULATOR_UNDER_TSAN)
    __tsan_switch_to_fiber(block->tsan_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&me->context, &block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(me->asan, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

void to_fiber(Fiber& fiber) {
    block->current = &fiber;
#if defined(EMULATOR_UNDER_TSAN)
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block->asan_scheduler, fiber.stack, kStackBytes);
#endif
    swapcontext(&block->scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block->asan_scheduler, nullptr, nullptr);
#endif
    block->current = nullptr;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
    acquire(&block->kernel);  // what the host did before the launch
    (*block->kernel)();
    release(&block->launch);  // for the host, after it
    Fiber* const me = block->current;
    me->state = State::kDone;
    ++block->done;
    Warp& warp = block->warps[me->index / kWarp];
    warp.gone |= 1u << me->index % kWarp;
    if ((warp.mask & warp.gone) != 0) fail("a thread ended that a shuffle waits for", warp.place);
    for (;;) to_scheduler();
}

// Stacks are kept from block to block: fresh pages for each would take longer than the block. ThreadSanitizer must not
// see the same stack in two of them, which mapping it anew tells it.
char* stack_of(unsigned thread) {
    static std::vector<char*> stacks;
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    const bool is_new = stacks.size() <= thread;
    if (is_new) stacks.resize(thread + 1);
    char*& stack = stacks[thread];
#if defined(EMULATOR_UNDER_TSAN)
    const bool is_mapped = true;
#else
    const bool is_mapped = is_new;
#endif
    if (is_mapped) {
        void* const memory = mmap(stack, kStackBytes, PROT_READ | PROT_WRITE, kFlags | (is_new ? 0 : MAP_FIXED), -1, 0);
        if (memory == MAP_FAILED) std::abort();
        stack = static_cast<char*>(memory);
    }
    return stack;
}

void arrange(std::vector<std::uint64_t>& items, std::mt19937_64& random) {
    std::iota(items.begin(), items.end(), std::uint64_t{0});
    if (order == Order::kReverse) std::reverse(items.begin(), items.end());
    if (order == Order::kRandom) std::shuffle(items.begin(), items.end(), random);
}

// All that are not done wait. At a barrier that all have reached they go on; otherwise the block hangs.
void open_barrier() {
    const Fiber& first = *std::find_if(block->fibers.begin(), block->fibers.end(),
                                       [](const Fiber& fiber) { return fiber.state != State::kDone; });
    block->current = nullptr;
    for (const Fiber& fiber : block->fibers) {
        if (fiber.state == State::kDone) fail("a barrier that a thread has ended without reaching", first.place);
        if (fiber.state == State::kAtShuffle) fail("a shuffle that some of its lanes never reach", fiber.place);
        if (!(fiber.place == first.place)) fail("threads wait at different barriers, one of them", fiber.place);
    }
    for (Fiber& fiber : block->fibers) fiber.state = State::kReady;
}

// Runs a warp's threads as far as they come without the others; returns whether any of them moved.
bool run_warp(std::uint64_t first, const std::vector<std::uint64_t>& lanes) {
    bool moved = false;
    for (bool again = true; again; moved |= again) {
        again = false;
        for (const std::uint64_t lane : lanes) {
            if (first + lane >= block->fibers.size()) continue;
            Fiber& fiber = block->fibers[first + lane];
            if (fiber.state != State::kReady) continue;
            again = true;
            to_fiber(fiber);
        }
    }
    return moved;
}

void run_block(char* shared, std::mt19937_64& random) {
    const unsigned threads = block->launch->block.x;
    block->shared = shared;
    std::memset(shared, 0xff, block->launch->shared_bytes);  // NaN
    block->fibers = std::vector<Fiber>(threads);
    block->warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
    block->done = 0;
#if defined(EMULATOR_UNDER_TSAN)
    block->tsan_scheduler = __tsan_get_current_fiber();
#endif
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = block->fibers[i];
        fiber.index = i;
        fiber.stack = stack_of(i);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
#if defined(EMULATOR_UNDER_TSAN)
        fiber.tsan = __tsan_create_fiber(0);
#endif
    }
    release(&block->kernel);
    std::vector<std::uint64_t> warps(block->warps.size());
    std::vector<std::uint64_t> lanes(kWarp);
    while (block->done < threads) {
        bool moved = false;
        arrange(warps, random);
        for (const std::uint64_t warp : warps) {
            arrange(lanes, random);
            moved |= run_warp(warp * kWarp, lanes);
        }
        if (!moved) open_barrier();
    }
#if defined(EMULATOR_UNDER_TSAN)
    for (Fiber& fiber : block->fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& kernel) {
    launched_on = current_device;
    std::mt19937_64 random(seed);
    Block here{};
    here.launch = &launch;
    here.kernel = &kernel;
    block = &here;
    std::vector<std::uint64_t> blocks(std::uint64_t{launch.grid.x} * launch.grid.y);
    arrange(blocks, random);
    // Kept until the end, lest a later block's memory be an earlier one's to the sanitizers.
    std::vector<std::unique_ptr<char[]>> shared;
    for (const std::uint64_t i : blocks) {
        here.index = uint3{static_cast<unsigned>(i % launch.grid.x), static_cast<unsigned>(i / launch.grid.x), 0};
        shared.emplace_back(new char[launch.shared_bytes]);
        run_block(shared.back().get(), random);
    }
    acquire(&here.launch);
    block = nullptr;
}

unsigned thread_index() {
    return block->current->index;
}

unsigned block_index_x() {
    return block->index.x;
}

unsigned block_index_y() {
    return block->index.y;
}

unsigned block_size() {
    return block->launch->block.x;
}

unsigned grid_size_x() {
    return block->launch->grid.x;
}

unsigned grid_size_y() {
    return block->launch->grid.y;
}

void* shared_memory() {
    return block->shared;
}

void block_barrier(const char* file, int line) {
    Fiber* const me = block->current;
    me->state = State::kAtBarrier;
    me->place = Place{file, line};
    release(block->shared);  // an address that no other block of the launch has
    to_scheduler();
    acquire(block->shared);
}

std::uint64_t exchange(const char* file, int line, unsigned mask, std::uint64_t value, int distance) {
    Fiber* const me = block->current;
    const unsigned lane = me->index % kWarp;
    Warp& warp = block->warps[me->index / kWarp];
    const Place place{file, line};
    if ((mask >> lane & 1) == 0) fail("a lane calls a shuffle whose mask does not name it", place);
    if ((mask & warp.gone) != 0) fail("a shuffle's mask names a lane that has ended", place);
    if (warp.arrived != 0 && (warp.mask != mask || !(warp.place == place))) {
        fail("lanes of a warp meet in different shuffles, one of them", place);
    }
    warp.mask = mask;
    warp.place = place;
    warp.arrived |= 1u << lane;
    const unsigned turn = warp.meetings[lane]++ % 2;
    warp.slot[turn][lane] = value;
    release(&warp);
    if (warp.arrived == mask) {
        warp.arrived = 0;
        warp.mask = 0;
        const unsigned first = me->index - lane;
        for (unsigned i = 0; i < kWarp; ++i) {
            if ((mask >> i & 1) != 0 && i != lane) block->fibers[first + i].state = State::kReady;
        }
    } else {
        me->state = State::kAtShuffle;
        me->place = place;
        to_scheduler();
    }
    acquire(&warp);
    const unsigned source = lane ^ static_cast<unsigned>(distance);
    // The value of a lane that does not take part is undefined: NaN here.
    return (mask >> source & 1) != 0 ? warp.slot[turn][source] : ~std::uint64_t{0};
}

}  // namespace emulator
